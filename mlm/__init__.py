"""What train.py, downstream.py, data_process.py and model.py stand on: one subject a file. CONTRIBUTING.md has a map."""

import os

os.environ["MPLBACKEND"] = "agg"  # nothing is shown; a notebook names one that may be missing where the program runs

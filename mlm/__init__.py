"""What the programs on top stand on: one subject a file. CONTRIBUTING.md has a map."""

import os

os.environ["MPLBACKEND"] = "agg"  # nothing is shown; a notebook names one that may be missing where the program runs

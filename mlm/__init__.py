"""What train.py, data_process.py and model.py stand on: one subject a file. CONTRIBUTING.md has a map."""

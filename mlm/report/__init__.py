"""What people see of a run. It reads the files that downstream.py leaves, and imports nothing of its wing."""

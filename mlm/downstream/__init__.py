"""What a comparison on labelled tasks needs. It shares files with the report, and imports nothing of its wing."""

"""The machine, its processes and the Hugging Face Hub."""

"""A run: its plan, its steps, its checkpoints, its folder."""

"""An encoder of any family, taking packed chunks: its attention, positions, heads and dropout."""

"""Lines of text to masked micro-batches of tokens."""

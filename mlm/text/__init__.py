"""Text files to lines: found, read in parts, and chosen for training or for testing."""

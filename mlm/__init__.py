"""What the programs on top stand on: six wings over a ground floor. Imports run one way (CONTRIBUTING.md)."""

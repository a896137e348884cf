"""How good a model is: its loss on test text, and what it makes of hidden words."""

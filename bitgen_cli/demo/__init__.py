"""The built-in model and the world it knows."""

"""A client's state, its local steps and its update rule."""

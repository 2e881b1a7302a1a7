"""Attacks on the releases of a run: they measure what can be learned about one record or one client."""

"""Attacks on what a run releases: what can be learned about one record or one client."""

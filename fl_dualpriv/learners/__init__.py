"""Learners: losses of records, and one gradient row per record."""

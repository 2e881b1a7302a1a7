"""Classifiers on cached image features that need no text tower."""

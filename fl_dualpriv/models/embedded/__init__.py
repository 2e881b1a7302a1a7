"""Image towers of embedded models."""

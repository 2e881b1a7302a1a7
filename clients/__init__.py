"""The ClientApp, and one local method per file."""

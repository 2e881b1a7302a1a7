"""Features of images: read, transform, encode, and keep on disk."""

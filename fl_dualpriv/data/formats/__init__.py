"""Formats of files: pixels of images, hashes of files, names of Hugging Face data sets."""

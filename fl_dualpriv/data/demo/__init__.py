"""Images of the embedded demo, drawn when they are read."""

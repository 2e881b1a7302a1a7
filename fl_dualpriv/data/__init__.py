"""Images: the embedded demo, folders, and their division among clients. No torch."""

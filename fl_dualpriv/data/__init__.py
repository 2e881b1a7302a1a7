"""Images: the embedded demo, folders, their division among clients, and the cache of their features. No torch."""

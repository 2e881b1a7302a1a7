"""Files that ship with the library: the embedded demo."""

"""A deployed node: the owner's file, checks, start and lifetime budget."""

"""A deployed node: owner file, checks, start and lifetime budget."""

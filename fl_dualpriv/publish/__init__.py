"""Published prompts: description, export and use."""

"""Prompts: the text tower they run through, and their low-rank factors. torch only."""

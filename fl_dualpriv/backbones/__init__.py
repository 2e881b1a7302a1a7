"""Frozen vision-language models; each heavy library has one import site here."""

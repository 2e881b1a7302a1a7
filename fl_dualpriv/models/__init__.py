"""Frozen vision-language models behind two protocols, and the functions that load them."""

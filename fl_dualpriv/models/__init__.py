"""Frozen vision-language models behind two protocols, and what loads them."""

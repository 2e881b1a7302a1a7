"""Dual-Priv pruning of visual tokens inside and behind image towers."""

"""The private mechanism: clip, noise, plans, accounting and ledger. It depends on neither federation nor models."""

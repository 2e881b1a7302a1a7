"""The private mechanism: clip, noise, sampling terms, plans, accounting and ledger. It knows no federation and no model."""

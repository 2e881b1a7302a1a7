"""The private mechanism: clip, noise, plans, accounting and ledger. It knows neither federation nor models."""

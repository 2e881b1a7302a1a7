"""The ServerApp and what is run with it."""

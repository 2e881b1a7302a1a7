"""The ServerApp, and the scripts that run it to make the result tables."""

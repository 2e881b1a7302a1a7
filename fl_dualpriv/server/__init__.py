"""The server: strategies, rounds, accounting and plug-ins."""

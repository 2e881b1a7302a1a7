"""The two errors that this library defines, and the redacted form of any other error.

Both errors are a ``ValueError``: the input was wrong.
"""


class ConfigError(ValueError):
    """The run cannot use a configuration key, a path, a data set or a model file in the given form."""


class PrivacyError(ValueError):
    """The run would claim a guarantee that it does not have."""


def type_alone(error: Exception) -> str:
    """Return the redacted form of an error for a remote reader: its type only, because messages may quote data."""
    return f"{type(error).__name__}; its message is in the log of the node"

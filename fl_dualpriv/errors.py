"""The two errors this library defines, both ``ValueError``: the input was wrong. And how little to say of others."""


class ConfigError(ValueError):
    """A configuration key, a path, a data set or a model file is not usable as given."""


class PrivacyError(ValueError):
    """The run would claim a guarantee that it does not have."""


def type_alone(error: Exception) -> str:
    """What may be said of an error to somebody who must not read its words: they may quote data."""
    return f"{type(error).__name__}; its words are in the log of the node"

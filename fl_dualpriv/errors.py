"""The two errors this library defines. Both are ``ValueError``: the input was wrong, not the library."""


class ConfigError(ValueError):
    """A configuration key, a path, a data set or a model file is not usable as given."""


class PrivacyError(ValueError):
    """The run would claim a guarantee that it does not have."""

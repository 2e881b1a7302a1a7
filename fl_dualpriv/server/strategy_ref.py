"""Load the class and the options of ``strategy.ref``: a strategy of the app, a user's, or Flower's in an adapter."""

from collections.abc import Mapping

from flwr.serverapp.strategy import Strategy

from fl_dualpriv.config.plugins import FLOWER_TABLE, Value, load_class, plugin_options, unpack_options
from fl_dualpriv.config.schema import StrategyConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.server.flower_adapter import adapt
from fl_dualpriv.server.strategy import RoundStrategy


def load_strategy(config: StrategyConfig, flat: Mapping[str, Value]) -> tuple[type[RoundStrategy], dict[str, object]]:
    """Import the strategy of a run and read its options, before any client is asked.

    Args:
        config: Name of the class, and optionally the folder of its module.
        flat: Flat run configuration, for ``plugin.`` keys.

    Returns:
        The class, and the arguments that it takes beyond those of `RoundStrategy`.

    Raises:
        ConfigError: If the class cannot be imported or is not a strategy, or if an option does not fit.
    """
    flat = unpack_options(flat)
    strategy_class = load_class("strategy.ref", config.ref, Strategy, config.path)
    if not issubclass(strategy_class, RoundStrategy):
        return adapt(strategy_class, flat)
    if stray := [key for key in flat if key.startswith(FLOWER_TABLE)]:
        raise ConfigError(
            f"{stray[0]}: is for Flower's strategies, and {config.ref} is not one of them; remove the key"
        )
    return strategy_class, dict(plugin_options(strategy_class, RoundStrategy, flat))

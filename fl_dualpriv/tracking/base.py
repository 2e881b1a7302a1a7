"""Give the numbers of each round to a tracker, which can neither stop nor delay a run.

Trackers write clock readings, so their files and servers are the operator's: no ε covers them.
"""

import importlib.util
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from fl_dualpriv.config.plugins import load_class
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.errors import ConfigError

SHIPPED = {"tensorboard": ("tensorboard", "TensorBoard"), "mlflow": ("mlflow", "MLflow")}
"""Value of ``output.track`` → the package that it needs, and the class in the module of its name."""
PATIENCE = 5.0
"""Seconds that the end of a run waits for a tracker."""
FOLDER = "tracking"

_log = logging.getLogger("fl_dualpriv")


class Tracker(ABC):
    """What a tracker derives from. Each method may raise any error: the run goes on without the tracker.

    Args:
        folder: Folder for its files, an operator's folder that may not exist yet.
        config: Flat run configuration.

    Example:
        >>> class Printing(Tracker):
        ...     def log(self, server_round, values):
        ...         print(server_round, values)
        >>> Printing(Path("tracking"), {}).log(1, {"accuracy/local": 0.5})
        1 {'accuracy/local': 0.5}
    """

    def __init__(self, folder: Path, config: Mapping[str, ConfigValue]) -> None:
        self.folder, self.config = folder, config

    @abstractmethod
    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a round: accuracies and gains as fractions, ε, failures."""

    def close(self) -> None:  # noqa: B027 - most trackers have nothing to close
        """End, after the last round."""


def check_tracker(name: str) -> None:
    """Check that a tracker can be loaded here.

    Raises:
        ConfigError: If its package is missing, or a class cannot be imported.
    """
    if name in SHIPPED:
        package, _ = SHIPPED[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"output.track = {name!r}: the package {package} is not installed; install fl-dualpriv[{name}]"
            )
    elif name:
        load_class("output.track", name, Tracker)


def _class_of(name: str) -> type[Tracker]:
    if name in SHIPPED:
        name = f"fl_dualpriv.tracking.{name}:{SHIPPED[name][1]}"
    return load_class("output.track", name, Tracker)


class Tracking:
    """A tracker in a thread of its own.

    Guarantee:
        `log` returns at once, and `close` after `PATIENCE` seconds at the latest, whatever the tracker does. After an
        error of the tracker nothing more is given to it, and the log says so once.

    Args:
        name: ``output.track``; empty tracks nothing.
        folder: Folder of the run.
        config: Flat run configuration.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, ConfigValue]) -> None:
        self._calls: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._name, self._thread = name, None
        if name:
            arguments = name, folder / FOLDER, dict(config)
            self._thread = threading.Thread(target=self._run, args=arguments, name="tracker", daemon=True)
            self._thread.start()

    def log(self, server_round: int, values: Mapping[str, float | None]) -> None:
        """Give the numbers of a round to the tracker; those that are None do not exist."""
        if self._thread is not None:
            self._calls.put((server_round, {name: value for name, value in values.items() if value is not None}))

    def close(self) -> None:
        """Wait for the tracker, but not for long."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                _log.warning(
                    "output.track = %r has not ended after %g s; the run ends without it", self._name, PATIENCE
                )

    def _run(self, name: str, folder: Path, config: Mapping[str, ConfigValue]) -> None:
        start = time.monotonic()
        try:
            tracker = _class_of(name)(folder, config)
            while (call := self._calls.get()) is not None:
                tracker.log(*call)
            tracker.close()
        except Exception as error:  # a tracker can raise any error
            seconds = time.monotonic() - start
            _log.warning("output.track = %r failed after %.0f s: %s; the run goes on without it", name, seconds, error)

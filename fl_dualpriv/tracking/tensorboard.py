"""TensorBoard event files, for ``tensorboard --logdir RUN/tracking``."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.tracking.base import Tracker


class TensorBoard(Tracker):
    """Writes one scalar for each number."""

    def __init__(self, folder: Path, config: Mapping[str, ConfigValue]) -> None:
        super().__init__(folder, config)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("configuration", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()

"""Calibrate the noise of a run beside the start of Flower: ``python -m fl_dualpriv.run.calibrate RUN-CONFIG.json``.

Flower and Ray need half a minute until the first process of a run asks for its noise multiplier, and leave a core idle
in it. The multipliers go into the folder of `privacy.limits.SHARED_CALIBRATIONS`.
"""

import json
import os
import sys
import threading
from pathlib import Path

from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.schema import RunConfig


def main(file: Path) -> None:
    """Compute the plans of a flat run configuration."""
    config = RunConfig.from_run_config(json.loads(file.read_text(encoding="utf-8")))
    record_level_plan(config)
    client_level_plan(config)


def _end_with_starter() -> None:
    """End this process when its standard input closes: the process that started it was killed."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would stop the interpreter at its end
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    main(Path(sys.argv[1]))

"""CPU seconds that a process spends before its work: imports of a train message, `node hash`, and the demo's round 1.

Each contestant is a new process. The imports of torch and dp-accounting by themselves show which part no code of ours
can save. The demo runs on Ray with features that are already cached; its figure is the time from the command to the end
of round 1.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine

machine.one_thread()

from benchmarks.harness import BENCH_DIR, CHECKOUT, Cost, RoundsRun, emit, interleaved, timed  # noqa: E402

_DEMO = CHECKOUT / "simulations" / "configs" / "demo.toml"
_COMMAND = Path(sys.executable).with_name("fl-dualpriv")

IMPORTS = {
    "python": "pass",
    "import torch": "import torch",
    "import torch, dp-accounting": "import torch; from dp_accounting import pld, rdp",
    "import torch, open_clip": "import torch; from fl_dualpriv.models import open_clip",
    "train message, imports": "import clients.app; from fl_dualpriv import messages; "
    "from fl_dualpriv.client import round, node",
}
"""Program of each process that only imports."""


def process(*command: str) -> Callable[[], Cost]:
    """Return a contestant that is a whole process."""

    def run() -> None:
        subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)

    return timed(run)


def demo_until_round_1() -> Cost:
    """Run the demo on Ray for one round; return its cost from the command to the end of round 1."""
    folder = Path(tempfile.mkdtemp(prefix="fdp-startup-"))
    changes = {
        "rounds": "1",
        "evaluation.every": "1",
        "resources.feature-cache": str(BENCH_DIR / "features"),
    }
    assignments = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    try:
        return RoundsRun(
            command=[str(_COMMAND), "run", str(_DEMO), "--engine", "ray", "--out", str(folder / "run"), *assignments],
            rounds_file=folder / "run" / "rounds.jsonl",
            first=0,
            last=2,
            log=folder / "log.txt",
            environment={},
        ).measure()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="imports only, once")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    contestants = {name: process(sys.executable, "-c", program) for name, program in IMPORTS.items()}
    headline = {}
    if not options.self_check:
        contestants["node hash"] = process(str(_COMMAND), "node", "hash", str(CHECKOUT))
        contestants["demo on Ray, to round 1"] = demo_until_round_1
    costs = interleaved(contestants, 1 if options.self_check else options.repeats, warm_ups=1)
    headline["train_imports"] = costs["train message, imports"].best
    if not options.self_check:
        headline["node_hash"] = costs["node hash"].best
        headline["round_1"] = min(cost.wall for cost in costs["demo on Ray, to round 1"].samples)
    emit(
        "startup",
        headline=headline,
        costs=costs,
        unit="process",
        details={},
        kind="self-check" if options.self_check else "full",
    )


if __name__ == "__main__":
    main()

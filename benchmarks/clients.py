"""Client-steps per CPU-second of a 50-client cohort without privacy: ours, plain Flower + Ray, and pfl-research.

Fifty clients with ten records each take part in every round. Each makes five full-batch steps, and the server takes the
mean. There are two tasks: a low-rank head over cached features (10 classes x 512, rank 4), and the demo's text tower.
Every contestant must end with the prompt of a plain reference loop. The cost is that of the whole process tree between
two rounds, so start-up and the first rounds do not count.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine

machine.one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.harness import (  # noqa: E402
    BENCH_DIR,
    CHECKOUT,
    Cost,
    Costs,
    RoundsRun,
    assert_equal,
    emit,
    interleaved,
    relative_difference,
)
from benchmarks.images import sketch_folder  # noqa: E402
from benchmarks.our_runs import Engine, export_task, global_prompt, our_run, random_clip, summary  # noqa: E402
from benchmarks.peer_task import Kind, PeerTask, reference, save_task  # noqa: E402
from benchmarks.pfl_environment import pfl_python  # noqa: E402
from fl_dualpriv.config.ranges import ConfigValue  # noqa: E402

CLIENTS, RECORDS, STEPS, N_CLS = 50, 10, 5, 10
_WARM = 3
_ALLOWED = 1e-4


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Number of rounds of each kind of contestant; slow ones need fewer rounds for a measurable time."""

    fast: int
    slow: int


def settings(kind: Kind, rounds: int, supernodes: int, clients: int) -> dict[str, ConfigValue]:
    """Return our configuration of the task."""
    data = sketch_folder(BENCH_DIR / f"sketches-{clients}", N_CLS, {"train": clients, "val": 2, "test": 2})
    common: dict[str, ConfigValue] = {
        "method": "promptfl",
        "rounds": rounds,
        "population": clients,
        "supernodes": supernodes,
        "strategy.ref": "strategies.fedavg:FedAvg",
        "train.local-steps": STEPS,
        "train.sampling-rate": 1.0,
        # With larger steps on the tower, rounding differences grow until results cannot be compared any more.
        "train.global-learning-rate": 0.5 if kind == "head" else 0.05,
        "privacy.randomness": "seeded",
        "privacy.record.mechanism": "none",
        "data.path": str(data / "images"),
        "data.classes": str(data / "classes.json"),
        "data.partition": "iid",
        "evaluation.every": rounds,
        "resources.device": "cpu",
        "resources.feature-cache": str(BENCH_DIR / "features"),
    }
    if kind == "tower":
        return common
    clip = random_clip(BENCH_DIR / "head-clip")
    head: dict[str, ConfigValue] = {
        "backbone.name": f"local-dir:{clip}",
        "prompt.learner": "head",
        "prompt.rank": 4,
        "prompt.init": "random",
    }
    return common | head


class Race:
    """The contestants on one task.

    Args:
        kind: The task, ``head`` or ``tower``.
        folder: Parent of the runs' folders; each run's folder is removed after its result was checked.
        rounds: Number of rounds of each kind of contestant.
        clients: Population, and also the cohort.
    """

    def __init__(self, kind: Kind, folder: Path, rounds: Rounds, clients: int) -> None:
        self._kind: Kind = kind
        self._folder, self._rounds, self._clients = folder / kind, rounds, clients
        self._folder.mkdir(parents=True)
        self._task_file = self._folder / "task.safetensors"
        self.task: PeerTask = export_task(kind, settings(kind, rounds.fast, 1, clients))
        save_task(self._task_file, self.task)
        self._expected = reference(self.task, [rounds.fast, rounds.slow])
        self._runs = 0
        self.differences: dict[str, float] = {}

    def ours(self, name: str, engine: Engine, supernodes: int) -> Callable[[], Cost]:
        """Return our app as a contestant.

        The measurement leaves out the line of the zero-shot scores, and the last round, which ends with scores.
        """
        rounds = self._rounds.fast if engine == "local" else self._rounds.slow

        def run() -> Cost:
            folder = self._fresh(name)
            changes = settings(self._kind, rounds, supernodes, self._clients)
            cost = our_run(folder, changes, engine, first=1 + _WARM, last=rounds).measure()
            summary(folder)
            return self._checked(name, rounds, global_prompt(folder), cost, rounds - 1 - _WARM, folder)

        return run

    def peer(self, name: str, python: Path, module: str, rounds: int) -> Callable[[], Cost]:
        """Return a program of this package as a contestant; it takes the task, a folder and the number of rounds."""

        def run() -> Cost:
            folder = self._fresh(name)
            folder.mkdir()
            cost = RoundsRun(
                command=[str(python), "-m", module, str(self._task_file), str(folder), str(rounds)],
                rounds_file=folder / "rounds.jsonl",
                first=_WARM,
                last=rounds,
                log=folder / "log.txt",
                environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
            ).measure()
            if failures := json.loads((folder / "summary.json").read_text(encoding="utf-8"))["failures"]:
                raise AssertionError(f"{name}: {failures} failures; a run with failures cannot be a measurement")
            prompt = torch.from_numpy(np.load(folder / "prompt.npy"))
            return self._checked(name, rounds, prompt, cost, rounds - _WARM, folder)

        return run

    def plain_flower(self) -> Callable[[], Cost]:
        """Return plain Flower on Ray with two actors as a contestant."""
        return self.peer("plain flower", Path(sys.executable), "benchmarks.plain_flower", self._rounds.slow)

    def pfl(self) -> Callable[[], Cost]:
        """Return pfl in one process as a contestant."""
        return self.peer("pfl", pfl_python(), "benchmarks.pfl_peer", self._rounds.fast)

    def _fresh(self, name: str) -> Path:
        self._runs += 1
        return self._folder / f"{self._runs:02d}-{name.replace(' ', '-')}"

    def _checked(self, name: str, rounds: int, prompt: torch.Tensor, cost: Cost, counted: int, folder: Path) -> Cost:
        start = self.task.start  # compare the learned change, because all contestants share the start
        difference = relative_difference(prompt - start, self._expected[rounds] - start)
        self.differences[name] = max(self.differences.get(name, 0.0), assert_equal(name, difference, _ALLOWED))
        shutil.rmtree(folder)
        steps = counted * self._clients * STEPS
        print(f"{self._kind}, {name}: {steps / cost.cpu:.0f} client-steps per CPU-second", file=sys.stderr, flush=True)
        return Cost(wall=cost.wall / steps, cpu=cost.cpu / steps, peak_mib=cost.peak_mib)


def main(arguments: list[str] | None = None) -> None:
    """Run all contestants and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="a small cohort without Ray; the ratios mean nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--more", action="store_true", help="our cohort on Ray, and plain Flower on the tower: six minutes more"
    )
    options = parser.parse_args(arguments)
    toy = options.self_check
    clients = 4 if toy else CLIENTS
    costs: dict[str, Costs] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fdp-bench-") as name:
        head = Race("head", Path(name), Rounds(fast=6, slow=6) if toy else Rounds(fast=60, slow=32), clients)
        tower = Race("tower", Path(name), Rounds(fast=6, slow=6) if toy else Rounds(fast=8, slow=6), clients)
        contestants: dict[str, Callable[[], Cost]] = {
            "head: ours, cohort": head.ours("ours, cohort", "local", 1),
            "tower: ours, cohort": tower.ours("ours, cohort", "local", 1),
        }
        if not toy:
            contestants |= {
                "head: pfl": head.pfl(),
                "head: ours, a SuperNode each": head.ours("ours, a SuperNode each", "ray", 0),
                "head: plain Flower": head.plain_flower(),
                "tower: pfl": tower.pfl(),
            }
        if not toy and options.more:
            contestants |= {
                "head: ours, cohort on Ray": head.ours("ours, cohort on Ray", "ray", 2),
                "tower: plain Flower": tower.plain_flower(),
            }
        costs = interleaved(contestants, options.repeats)
        for race, kind in ((head, "head"), (tower, "tower")):
            differences |= {f"{kind}: {who}": value for who, value in race.differences.items()}
    ratios = {
        "vs_pfl": ("head: pfl", "head: ours, cohort"),
        "vs_flower": ("head: plain Flower", "head: ours, cohort"),
        "per_client_vs_flower": ("head: ours, a SuperNode each", "head: plain Flower"),
        "tower_vs_pfl": ("tower: pfl", "tower: ours, cohort"),
        "tower_vs_flower": ("tower: plain Flower", "tower: ours, cohort"),
        "ray_cohort_vs_flower": ("head: plain Flower", "head: ours, cohort on Ray"),
    }
    emit(
        "clients",
        headline={
            key: costs[slow].best / costs[fast].best
            for key, (slow, fast) in ratios.items()
            if slow in costs and fast in costs
        },
        costs=costs,
        unit="client-step",
        details={
            "client-steps per CPU-second, best": {name: round(1 / taken.best) for name, taken in costs.items()},
            "differences from the obvious loop": {name: float(f"{d:.1e}") for name, d in differences.items()},
            "failures": 0,
            "peak MiB of the process tree": {n: round(max(c.peak_mib for c in t.samples)) for n, t in costs.items()},
        },
        kind="self-check" if toy else "full",
    )


if __name__ == "__main__":
    main()

"""The runs behind a table. All are checked first, then run in worker processes. A finished run is not repeated."""

import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fl_dualpriv.config.schema import ConfigValue, RunConfig, merge
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_json
from fl_dualpriv.run.file_kinds import SUMMARY, TOTALS, read_totals
from simulations.report import ROOT

FAILED = "failed.json"
"""File in the run folder of a failed trial, instead of a summary; it holds the error."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a variant or method on a base, at an ε, with a seed.

    Attributes:
        base: Name of the base.
        name: Name of the variant or method.
        epsilon: Target ε; ∞ means neither clip nor noise.
        seed: Seed of all randomness.
        settings: The whole run configuration, flat.
        folder: Name of the run's folder. It depends on all values that differ from the defaults, so an edited run is
            run again.
    """

    base: str
    name: str
    epsilon: float
    seed: int
    settings: Mapping[str, ConfigValue]
    folder: str


def make_cell(
    defaults: Mapping[str, ConfigValue],
    layers: Sequence[Mapping[str, ConfigValue]],
    *,
    base: str,
    name: str,
    epsilon: float,
    seed: int,
) -> Cell:
    """Merge the layers, then set ε and the seed; ``{root}`` in a text value becomes the path of the checkout.

    Raises:
        ConfigError: If the run's configuration is not valid. The message names the run.
    """
    settings = merge(defaults, *layers, noise(epsilon), {"seed": seed})
    chosen = json.dumps(dict(sorted(settings.items() - defaults.items())))  # with {root}: the same in every checkout
    settings = {k: v.replace("{root}", str(ROOT)) if isinstance(v, str) else v for k, v in settings.items()}
    try:
        RunConfig.from_run_config(settings)
    except ConfigError as error:
        raise ConfigError(f"{name!r} on {base}, ε = {epsilon:g}: {error}") from error
    folder = f"{base}-{epsilon:g}-{seed}-{zlib.crc32(chosen.encode()):08x}"
    return Cell(base=base, name=name, epsilon=epsilon, seed=seed, settings=settings, folder=folder)


def noise(epsilon: float) -> dict[str, ConfigValue]:
    """Return the configuration keys of a record-level ε; for ∞ the mechanism is "none"."""
    if math.isfinite(epsilon):
        return {"privacy.record.mechanism": "gaussian", "privacy.record.epsilon": epsilon}
    return {"privacy.record.mechanism": "none"}


def shared(cell: Cell) -> tuple[str, int, str, bool]:
    """Return a sort key made of the values on which a run's data, model and features depend.

    A worker process caches these, so runs with the same key should follow each other.
    """
    tokens = [f"{key}={value}" for key, value in sorted(cell.settings.items()) if key.startswith("pruning.visual")]
    return cell.base, cell.seed, " ".join(tokens), math.isfinite(cell.epsilon)


def run(cell: Cell, runs: Path) -> dict[str, Any]:
    """Run a cell in this process, or read an earlier run of it, and return its summary with its seconds.

    Raises:
        RuntimeError: If a call of a client failed. Such a run must not enter a table.
    """
    out = runs / cell.folder
    if not ((out / SUMMARY).exists() and (out / TOTALS).exists()):
        from fl_dualpriv.flower.local import run_local

        shutil.rmtree(out, ignore_errors=True)  # the ledgers of an interrupted run would refuse this one
        run_local(ROOT, {**cell.settings, "output.dir": str(out)})
    totals = read_totals(out)
    if totals["failures"]:
        raise RuntimeError(f"{cell.folder}: {totals['failures']} failures")
    return json.loads((out / SUMMARY).read_text()) | {"seconds": totals["seconds"]}


def was_run(cell: Cell, runs: Path) -> bool:
    """Return True if a cell has a summary or a note of its failure."""
    return any((runs / cell.folder / name).exists() for name in (SUMMARY, FAILED))


def attempt(cell: Cell, runs: Path) -> dict[str, Any]:
    """Run a cell as `run` does, but return an empty summary if it fails, because a trial may diverge.

    The failure is noted in the run's folder, so later calls return an empty summary without another run.
    """
    note = runs / cell.folder / FAILED
    if note.exists():
        return {}
    try:
        return run(cell, runs)
    except (ConfigError, OSError):  # these errors say nothing about the hyper-parameters
        raise
    except Exception as error:
        write_json(note, {"type": type(error).__name__, "message": str(error)})
        return {}


def run_all(cells: Sequence[Cell], runs: Path, workers: int, *, may_fail: bool = False) -> list[dict[str, Any]]:
    """Run all cells and return their summaries in the order of ``cells``; each result is written to stderr.

    Cells with the same data, model and features run one after the other.

    Args:
        cells: Cells to run; cells with equal folders run once.
        runs: Parent folder of all run folders.
        workers: Number of processes, each with one thread.
        may_fail: True gives an empty summary for a run that fails; False raises its error.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, which import torch again
    order = {cell.folder: cell for cell in sorted(cells, key=shared)}
    summaries = []
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_quiet_thread) as pool:
        do = attempt if may_fail else run
        futures = {folder: pool.submit(do, cell, runs) for folder, cell in order.items()}
        for number, cell in enumerate(cells, start=1):
            summary = futures[cell.folder].result()
            summaries.append(summary)
            local = f"{summary['accuracy']['final']['local']:.3f}" if summary else "failed"
            sys.stderr.write(
                f"{number}/{len(cells)} {cell.base} ε {cell.epsilon:g} seed {cell.seed} {cell.name}: {local}\n"
            )
    return summaries


def _quiet_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower otherwise logs dozens of lines per round

"""The runs behind a table: each checked before the first one starts, run in worker processes, and never repeated."""

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
"""Beside where a summary would be: why there is none."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: something named, on a base, at an ε, with a seed.

    Attributes:
        base: Name of the base.
        name: Of the variant or method.
        epsilon: ∞: neither clip nor noise.
        seed: Of everything.
        settings: The whole run configuration, flat.
        folder: Name of the run's folder: from the settings that are no defaults, so that what was edited runs anew.
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
    """Lay the settings over each other, ε and seed on top; ``{root}`` in a text is the checkout.

    Raises:
        ConfigError: If the run's configuration is not valid; it says of which run.
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
    """The keys of record-level ε; ∞: none."""
    if math.isfinite(epsilon):
        return {"privacy.record.mechanism": "gaussian", "privacy.record.epsilon": epsilon}
    return {"privacy.record.mechanism": "none"}


def shared(cell: Cell) -> tuple[str, int, str, bool]:
    """What a run's data, model and features depend on: a process that keeps them runs what shares them in a row."""
    tokens = [f"{key}={value}" for key, value in sorted(cell.settings.items()) if key.startswith("pruning.visual")]
    return cell.base, cell.seed, " ".join(tokens), math.isfinite(cell.epsilon)


def run(cell: Cell, runs: Path) -> dict[str, Any]:
    """Run a cell in this process, or read it if it was run before; returns its summary, with its seconds.

    Raises:
        RuntimeError: If a client failed: such a run is no result.
    """
    out = runs / cell.folder
    if not ((out / SUMMARY).exists() and (out / TOTALS).exists()):
        from fl_dualpriv.flower.local import run_local

        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off: its ledgers would refuse this one
        run_local(ROOT, {**cell.settings, "output.dir": str(out)})
    totals = read_totals(out)
    if totals["failures"]:
        raise RuntimeError(f"{cell.folder}: {totals['failures']} failures")
    return json.loads((out / SUMMARY).read_text()) | {"seconds": totals["seconds"]}


def was_run(cell: Cell, runs: Path) -> bool:
    """Whether a cell has a summary, or a note that it failed."""
    return any((runs / cell.folder / name).exists() for name in (SUMMARY, FAILED))


def attempt(cell: Cell, runs: Path) -> dict[str, Any]:
    """As `run`, but empty where the run fails, now and whenever it is asked for: a trial may diverge."""
    note = runs / cell.folder / FAILED
    if note.exists():
        return {}
    try:
        return run(cell, runs)
    except (ConfigError, OSError):  # not the settings' fault: nothing that a trial may count as a result
        raise
    except Exception as error:
        write_json(note, {"type": type(error).__name__, "message": str(error)})
        return {}


def run_all(cells: Sequence[Cell], runs: Path, workers: int, *, may_fail: bool = False) -> list[dict[str, Any]]:
    """Run all cells, those that share their features in a row; returns their summaries in order and tells each.

    Args:
        cells: What to run; equal folders run once.
        runs: Where the runs lie.
        workers: Processes, one thread each.
        may_fail: The summary of a run that fails is empty; else its error is raised.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which import torch anew
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
    logging.getLogger("flwr").setLevel(logging.WARNING)  # else dozens of lines a round

"""Tune rows with the same number of trials each, on validation data and with seeds that the table does not use.

A trial that fails counts as a trial and is never chosen. Tuning is outside of the ε of any run: on private data it must
be charged as well (docs/privacy.md, section 6), and `charge_of` says how much the filter ``reserve`` would charge.
"""

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.sweep.cells import Cell, Settle, make_cell, raise_all
from fl_dualpriv.sweep.document import Document, Grid, Point, Row

_DRAWS = 10_000


def draw(grid: Grid, trials: int, rng: np.random.Generator) -> list[Point]:
    """Draw distinct random points of a grid such that the counts of a key's values differ by at most one.

    Raises:
        ConfigError: If no even draw of distinct points was found.

    Reference:
        McKay, Beckman and Conover 1979 (Latin hypercube sampling), on a grid.

    Example:
        >>> points = draw({"a": [1, 2], "b": [3, 4]}, 2, np.random.default_rng(0))
        >>> [sorted(dict(p)[key] for p in points) for key in ("a", "b")]
        [[1, 2], [3, 4]]
    """
    for _ in range(_DRAWS):
        columns = [_even(len(values), trials, rng) for values in grid.values()]
        points = list(zip(*columns, strict=True))
        if len(set(points)) == trials:
            return [tuple((key, grid[key][i]) for key, i in zip(grid, point, strict=True)) for point in points]
    raise ConfigError(f"no {trials} distinct points that use all values evenly among {dict(grid)}; offer more values")


def _even(values: int, trials: int, rng: np.random.Generator) -> list[int]:
    # The values that appear once more than others are chosen at random, too.
    return rng.permutation(np.resize(rng.permutation(values), trials)).tolist()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Tuning of one row at one combination of the axes.

    Attributes:
        row: The row.
        point: Values of the axes.
        trials: Runs with the first tuning seed.
    """

    row: Row
    point: Point
    trials: tuple[Cell, ...]

    @property
    def key(self) -> tuple[str, Point]:
        """Key of the choice."""
        return self.row.name, self.point


def entries_of(document: Document, settle: Settle) -> list[Entry]:
    """Return the trials of all rows that are tuned.

    The points that a row tries depend only on its name, its values, the number of trials and the first tuning seed.

    Raises:
        ConfigError: If configurations of trials are not valid. One message lists the problems of all of them.
    """
    tune, problems, entries = document.tune, [], []
    if tune is None or not tune.seeds:
        if tune is not None and any(row.tunes for row in document.rows):
            raise ConfigError(f"{document.file}: tune.seeds is missing; name seeds that the table does not use")
        return []
    for point in document.points:
        for row in document.rows:
            grid = document.grid(row, point)
            if not grid:
                continue
            rng = np.random.default_rng([tune.seeds[0], zlib.crc32(f"{row.name} {point}".encode())])
            try:
                trials = tuple(
                    make_cell(document, row, point, settle, seed=tune.seeds[0], tuned=tuned, split="val")
                    for tuned in draw(grid, tune.trials, rng)
                )
            except ConfigError as error:
                problems.append(str(error))
                continue
            entries.append(Entry(row=row, point=point, trials=trials))
    raise_all(document, problems)
    return entries


def score(cell: Cell, runs: Path) -> float | None:
    """Return the local accuracy of a trial on validation data; None if it failed."""
    summary = None if cell.has_failed(runs) else cell.summary(runs)
    return None if summary is None else summary["accuracy"]["final"]["local"]


def finals_of(document: Document, settle: Settle, entry: Entry, runs: Path) -> list[Cell]:
    """Return the runs of the best trials of an entry with the other tuning seeds. All trials must have ended.

    Raises:
        ConfigError: If all trials failed.
    """
    tune = document.tune
    assert tune is not None
    ranked = sorted(
        (-value, place) for place, cell in enumerate(entry.trials) if (value := score(cell, runs)) is not None
    )
    if not ranked:
        raise ConfigError(f"{entry.row.name}: every trial failed; see {runs / entry.trials[0].folder}/failed.json")
    return [
        make_cell(document, entry.row, entry.point, settle, seed=seed, tuned=entry.trials[place].tuned, split="val")
        for _, place in ranked[: tune.finalists]
        for seed in tune.seeds[1:]
    ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Chosen values of a row at one combination of the axes.

    Attributes:
        tuned: The values.
        validation: Mean local accuracy on validation data over the tuning seeds.
        cells: The tuning runs.
        failed: Number of those that failed.
    """

    tuned: Point
    validation: float
    cells: tuple[Cell, ...]
    failed: int

    @property
    def charge(self) -> float | None:
        """ε that the filter ``reserve`` would charge for the tuning runs; None without a proved ε."""
        return charge_of([cell.settings for cell in self.cells])

    def sentence(self) -> str:
        """Return what was chosen, and what the choice would cost on private data."""
        values = ", ".join(f"{key} = {value}" for key, value in self.tuned)
        runs = f"chose {values}; its {len(self.cells)} tuning runs read validation data, outside of any ε above"
        charge = self.charge
        if charge is None:
            return f"{runs}; no filter bounds them"
        return f"{runs}; the filter reserve would charge ε = {charge:.4g} for all of them"

    def content(self) -> dict[str, Any]:
        """Return the values for a JSON file."""
        return {
            "keys": dict(self.tuned),
            "validation": round(self.validation, 4),
            "runs": len(self.cells),
            "failed": self.failed,
            "epsilon of the tuning, if the data were private": self.charge,
        }


def choose(entry: Entry, finals: Sequence[Cell], runs: Path) -> Choice:
    """Return the finalist with the highest mean over the tuning seeds; among equal means the first one.

    Raises:
        ConfigError: If every finalist failed with at least one seed.
    """
    cells = [*entry.trials, *finals]
    scores: dict[Point, list[float | None]] = {cell.tuned: [] for cell in finals or entry.trials}
    for cell in cells:
        if cell.tuned in scores:
            scores[cell.tuned].append(score(cell, runs))
    means = {
        tuned: statistics.mean(value for value in values if value is not None)
        for tuned, values in scores.items()
        if None not in values
    }
    if not means:
        raise ConfigError(f"{entry.row.name}: every finalist failed with some seed")
    tuned, validation = max(means.items(), key=lambda item: item[1])
    return Choice(
        tuned=tuned,
        validation=validation,
        cells=tuple(cells),
        failed=sum(cell.has_failed(runs) for cell in cells),
    )


def charge_of(runs: Sequence[Mapping[str, ConfigValue]]) -> float | None:
    """Return the ε that the filter ``reserve`` would charge for several runs on the same data, at the δ of their plans.

    The ε of a single run does not cover the choice among the runs, because the values of later runs are chosen after
    the scores of earlier ones are known.

    Guarantee:
        With these runs' whole plans charged at δ / number of runs each, everything that they release together is
        (ε, δ)-DP, for any choice that is made from it (see `ReserveFilter`).

    Args:
        runs: Flat configurations of runs with the same δ and the same unit.

    Returns:
        The sum; None if a run has no proved ε (no noise, or the paper's formulas).
    """
    total = 0.0
    for flat in runs:
        config = RunConfig.from_run_config(flat)
        if (client := client_level_plan(config)) is not None:
            total += replace(client, delta=client.delta / len(runs)).spent(client.rounds)
        elif (record := record_level_plan(config)) is not None:
            total += replace(record, delta=record.delta / len(runs)).spent(record.releases)
        else:
            return None
    return total if math.isfinite(total) else None


Choices = Mapping[tuple[str, Point], Choice]

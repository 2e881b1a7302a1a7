"""The cells of a sweep: one run each, with a configuration, a folder and, once it has ended, a summary."""

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_dualpriv.config.plugins import class_files
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import read_toml
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.run.file_kinds import SUMMARY, TOTALS, read_totals
from fl_dualpriv.sweep.document import EPSILONS, Document, Point, Row, describe, value_text

FAILED = "failed.json"
"""File in the folder of a trial that failed; it holds the error."""

Settle = Callable[[Path, Mapping[str, ConfigValue]], dict[str, ConfigValue]]
"""(configuration file, flat keys) → the complete, checked flat configuration of a run, with absolute paths."""

_MOST_PROBLEMS = 12
_UNSAFE = re.compile(r"[^\w.=-]")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        row: Its row.
        point: Its values of the axes.
        seed: Seed of all its randomness.
        tuned: Values of the tuned keys.
        split: Split of the held-out data that is scored: ``val`` for trials.
        settings: Complete flat run configuration, without the output folder.
        folder: Name of the run's folder. It depends on every value that the sweep or its base sets and on the files of
            classes, so an edited cell is run again.
    """

    row: Row
    point: Point
    seed: int
    tuned: Point
    split: str
    settings: Mapping[str, ConfigValue]
    folder: str

    @property
    def label(self) -> str:
        """Name for messages."""
        tuned = "".join(f", {key} = {value}" for key, value in self.tuned)
        return f"{self.row.name}{describe(self.point)}{tuned}, seed {self.seed}"

    def summary(self, runs: Path) -> dict[str, Any] | None:
        """Return the summary of the finished run, with its seconds; None if it has not finished, or failed.

        Raises:
            ConfigError: If calls of clients failed in it, or its files cannot be read. Such a run must not enter a
                table.
        """
        out = runs / self.folder
        if not ((out / SUMMARY).exists() and (out / TOTALS).exists()):
            return None
        try:
            totals = read_totals(out)
            summary = json.loads((out / SUMMARY).read_text(encoding="utf-8")) | {"seconds": float(totals["seconds"])}
            for when in ("zero_shot", "free", "final"):
                summary["accuracy"][when]["local"]
            failures = int(totals["failures"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{out}: its {SUMMARY} or {TOTALS} cannot be read ({type(error).__name__}: {error}); remove the "
                "folder, and start the sweep again"
            ) from error
        if failures:
            raise ConfigError(
                f"{out}: {failures} calls of clients failed in this run ({self.label}); it cannot be a "
                "result. Find the cause, remove the folder, and start the sweep again"
            )
        return summary

    def has_failed(self, runs: Path) -> bool:
        """Return True if the run is a trial that failed."""
        return (runs / self.folder / FAILED).exists()

    def is_done(self, runs: Path) -> bool:
        """Return True if there is nothing to run."""
        return self.has_failed(runs) or self.summary(runs) is not None


def without_infinity(keys: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """Turn an ε of ∞ into no mechanism, which has neither clip nor noise.

    Example:
        >>> without_infinity({"privacy.record.epsilon": math.inf, "rounds": 2})
        {'rounds': 2, 'privacy.record.mechanism': 'none'}
    """
    changed = dict(keys)
    for unit in ("record", "client"):
        key, mechanism = f"privacy.{unit}.epsilon", f"privacy.{unit}.mechanism"
        if changed.get(key) == math.inf:
            del changed[key]
            changed[mechanism] = "none"
    return changed


def make_cell(
    document: Document, row: Row, point: Point, settle: Settle, *, seed: int, tuned: Point = (), split: str = ""
) -> Cell:
    """Merge the layers of a cell and check its configuration.

    Raises:
        ConfigError: If the configuration is not valid. The message names the cell.
    """
    base, label = read_toml(row.base), f"{row.name}{describe(point)}, seed {seed}"
    own: dict[str, ConfigValue] = {}
    for layer in [*document.layers(row, point), dict(tuned)]:
        own |= layer
    for key, value in point:
        if key in EPSILONS and value != math.inf:
            mechanism = key.replace(".epsilon", ".mechanism")
            if own.get(mechanism) == "none":
                raise ConfigError(f"{label}: {mechanism} = 'none' leaves the axis {key} without effect; remove one")
            if base.get(mechanism, "none") == "none":
                own.setdefault(mechanism, "gaussian")
    keys = without_infinity({**base, **own}) | {"seed": seed} | ({"evaluation.split": split} if split else {})
    try:
        settings = settle(row.base, keys)
    except (ConfigError, PrivacyError) as error:
        raise ConfigError(f"{label}: {error}") from error
    for key, value in point:
        calibrate = key.replace(".epsilon", ".calibrate-to")
        if key in EPSILONS and value != math.inf and settings[calibrate] != "epsilon":
            raise ConfigError(
                f"{label}: {calibrate} = {settings[calibrate]!r} leaves the axis {key} without effect; set it to "
                "'epsilon', or remove the axis"
            )
    return Cell(
        row=row,
        point=point,
        seed=seed,
        tuned=tuned,
        split=split,
        settings=settings,
        folder=_folder(row, point, seed, keys, settings),
    )


def _folder(
    row: Row, point: Point, seed: int, keys: Mapping[str, ConfigValue], settings: Mapping[str, ConfigValue]
) -> str:
    """Return the name of a cell's folder: readable words, and a digest of everything that the sweep decides.

    The digest covers the values that the sweep and its base set, as they were settled, and the content of the files of
    classes, shares and users' modules. It leaves out the resources, which never change a result, and the app's
    defaults.
    """
    decided = {key: settings[key] for key in sorted(keys) if key in settings and not key.startswith("resources.")}
    tables = [Path(str(settings[key])) for key in ("data.classes", "data.class-shares")]
    contents = [zlib.crc32(file.read_bytes()) if file.is_file() else 0 for file in (*tables, *class_files(settings))]
    digest = zlib.crc32(json.dumps([row.name, row.base.name, decided, contents], sort_keys=True).encode())
    values = "".join(f"-{value_text(value)}" for _, value in point)
    return f"{_UNSAFE.sub('_', f'{row.name}{values}-{seed}')[:80]}-{digest:08x}"


def cells_of(
    document: Document, settle: Settle, choices: Mapping[tuple[str, Point], Point] | None = None
) -> list[Cell]:
    """Return the cells of the table: each row at each point with each seed, all checked.

    Args:
        document: The sweep.
        settle: Check of a configuration.
        choices: (row, point) → chosen values of the tuned keys.

    Raises:
        ConfigError: If configurations are not valid. One message lists the problems of all of them.
    """
    cells, problems = [], []
    for point in document.points:
        for row in document.rows:
            for seed in document.seeds:
                tuned = (choices or {}).get((row.name, point), ())
                try:
                    cells.append(make_cell(document, row, point, settle, seed=seed, tuned=tuned))
                except ConfigError as error:
                    problems.append(str(error))
                    break  # other seeds have the same problem
    raise_all(document, problems)
    return cells


def raise_all(document: Document, problems: Sequence[str]) -> None:
    """Raise one error with the problems of several cells, if there are any.

    Raises:
        ConfigError: With all problems, or the first dozen and the number of the others.
    """
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        lines = [*problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ConfigError("\n  ".join([f"{document.file}: no cell was started, because some are not valid:", *lines]))

"""Read a sweep file: a base configuration, axes, rows, seeds, and what may be tuned.

A sweep file is TOML::

    title = "Rates"                         # optional: heading of the table
    base = "demo.toml"                      # beside this file
    seeds = [0, 1]

    [set]                                   # keys of every cell
    rounds = 2

    [axes]                                  # every combination of the values
    "privacy.record.epsilon" = [1.0, inf]   # inf: no clip and no noise

    [[rows]]                                # the lines of the table
    name = "local only"
    method = "local-only"

    [[when]]                                # keys for some cells only
    axes = { "privacy.record.epsilon" = 1.0 }
    rows = ["local only"]
    "train.local-learning-rate" = 0.05

    [tune]                                  # optional, see `fl_dualpriv.sweep.tuning`
    trials = 8
    finalists = 2
    seeds = [1000, 1001]
    [tune.grids]
    "train.local-learning-rate" = [0.05, 0.1, 0.2]
"""

import difflib
import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import flatten
from fl_dualpriv.errors import ConfigError

Grid = Mapping[str, Sequence[ConfigValue]]
Point = tuple[tuple[str, ConfigValue], ...]
"""One combination of values of the axes."""

_TOP = ("title", "note", "base", "seeds", "made-data", "set", "axes", "rows", "when", "tune")
EPSILONS = ("privacy.record.epsilon", "privacy.client.epsilon")
_RESERVED = {"seed": "seeds", "output.dir": "--runs", "output.resume": "the sweep itself"}
_LINES = ("un-tuned", "free rival")
"""Names of lines that every table has."""
_TUNE = ("trials", "finalists", "seeds", "grids")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table for each combination of the axes.

    Attributes:
        name: Name of the line.
        base: File of the configuration.
        keys: Keys of its cells.
        tunes: Keys that are tuned for it.
        grids: Values that may be tried for it, in place of those of ``[tune.grids]``.
        note: Text behind the name, for example a source.
        published: Number that others have published for it, as text, by the values of the axes with commas between,
            by one value, or by ``""``.
    """

    name: str
    base: Path
    keys: Mapping[str, ConfigValue] = field(default_factory=dict)
    tunes: tuple[str, ...] = ()
    grids: Grid = field(default_factory=dict)
    note: str = ""
    published: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class When:
    """Keys and grids of the cells that have some values of the axes and are of some rows."""

    axes: Mapping[str, ConfigValue]
    rows: tuple[str, ...]
    keys: Mapping[str, ConfigValue]
    grids: Grid

    def holds(self, row: Row, point: Point) -> bool:
        """Return True for the cells that this is about."""
        at = dict(point)
        return (not self.rows or row.name in self.rows) and all(
            key in at and _same(at[key], value) for key, value in self.axes.items()
        )


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Budget of tuning, the same for every row at every combination of the axes.

    Attributes:
        trials: Number of distinct values of the tuned keys that are tried with the first seed.
        finalists: Number of the best trials that run with the other seeds too.
        seeds: Seeds of the tuning runs; none of them is a seed of the table.
        grids: Key → values that may be tried.
    """

    trials: int
    finalists: int
    seeds: tuple[int, ...]
    grids: Grid


@dataclass(frozen=True, kw_only=True)
class Document:
    """A sweep file that was read and checked in itself; the configurations of its cells are not checked yet.

    Attributes:
        made_data: True if the data were made by a script. Such a table says so, and has no LaTeX form.
        last: Keys of the command line, for every cell; they take precedence.
    """

    file: Path
    title: str
    note: str
    seeds: tuple[int, ...]
    keys: Mapping[str, ConfigValue]
    axes: Grid
    rows: tuple[Row, ...]
    whens: tuple[When, ...]
    tune: Tune | None
    made_data: bool
    last: Mapping[str, ConfigValue] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """All combinations of the values of the axes; one empty combination without axes."""
        return [tuple(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def layers(self, row: Row, point: Point) -> list[Mapping[str, ConfigValue]]:
        """Return the keys of a cell on top of its base; later ones take precedence."""
        whens = [when.keys for when in self.whens if when.holds(row, point)]
        return [self.keys, row.keys, *whens, self.last, dict(point)]

    def cut(self, last: Mapping[str, ConfigValue], seeds: int | None) -> "Document":
        """Return the same sweep with keys of the command line, and with its first seeds only.

        Raises:
            ConfigError: If a key is an axis, or belongs to the sweep.
        """
        for key in last:
            is_tuned = any(key in row.tunes for row in self.rows)
            if key in self.axes or key in _RESERVED or is_tuned:
                by = "an axis" if key in self.axes else "tuned by a row" if is_tuned else f"decided by {_RESERVED[key]}"
                raise ConfigError(f"--set {key}: is {by} of {self.file}; edit the file")
        return replace(self, last=last, seeds=self.seeds[:seeds])

    def grid(self, row: Row, point: Point) -> dict[str, Sequence[ConfigValue]]:
        """Return the values that are tried for each tuned key of a row; a key with an empty list is not tuned there."""
        offered: dict[str, Sequence[ConfigValue]] = {**(self.tune.grids if self.tune else {}), **row.grids}
        for when in self.whens:
            if when.holds(row, point):
                offered |= when.grids
        return {key: offered[key] for key in row.tunes if offered.get(key)}


def _same(one: ConfigValue, other: ConfigValue) -> bool:
    """Return True for equal values; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class _Reader:
    """Reads parts of the file and collects all problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def add(self, where: str, value: object, allowed: str) -> None:
        self.problems.append(f"{where} = {value!r}: {allowed}")

    def flat(self, where: str, table: object) -> dict[str, ConfigValue]:
        """Read a table of configuration keys."""
        if not isinstance(table, Mapping):
            self.add(where, table, "must be a table of configuration keys")
            return {}
        try:
            return flatten(table)
        except ConfigError as error:
            self.problems.append(f"{where}: {error}")
            return {}

    def grid(self, where: str, table: object, *, may_be_empty: bool = False) -> dict[str, tuple[ConfigValue, ...]]:
        """Read a table of lists of values."""
        grid: dict[str, tuple[ConfigValue, ...]] = {}
        if not isinstance(table, Mapping):
            self.add(where, table, "must be a table of keys and lists of values")
            return grid
        for key, values in _leaves(table).items():
            scalars = isinstance(values, list) and all(isinstance(v, bool | int | float | str) for v in values)
            if not scalars or not (values or may_be_empty):
                self.add(f"{where}.{key}", values, "must be a list of true or false, numbers or texts")
            elif any(isinstance(v, float) and (math.isnan(v) or v == -math.inf) for v in values):
                self.add(f"{where}.{key}", values, "must not hold nan or -inf; inf as an ε means no noise")
            elif len(set(values)) < len(values):
                self.add(f"{where}.{key}", values, "has a value twice; remove one")
            else:
                grid[key] = tuple(values)
        return grid

    def names(self, where: str, values: object) -> tuple[str, ...]:
        """Read a list of texts."""
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return tuple(values)
        self.add(where, values, "must be a list of texts")
        return ()

    def flag(self, where: str, value: object) -> bool:
        if not isinstance(value, bool):
            self.add(where, value, "must be true or false")
        return value is True

    def text(self, where: str, value: object) -> str:
        if not isinstance(value, str):
            self.add(where, value, "must be a text")
            return ""
        return value

    def seeds(self, where: str, values: object) -> tuple[int, ...]:
        """Read a list of seeds."""
        if not (isinstance(values, list) and values) or not all(
            isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
        ):
            self.add(where, values, "must be a list of whole numbers from 0")
            return ()
        if len(set(values)) < len(values):
            self.add(where, values, "has a seed twice; remove one")
        return tuple(values)

    def count(self, where: str, value: object, least: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.add(where, value, f"must be a whole number from {least}")
        return least

    def known(self, where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
        for name in table:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                self.problems.append(f"{where}{name}: unknown; {guess}")

    def base(self, where: str, value: object, folder: Path) -> Path:
        """Read the name of a configuration file beside the sweep file."""
        name = self.text(where, value)
        path = folder / name
        if not path.is_file():
            self.add(where, name, f"no such file beside the sweep file ({path})")
        return path


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys; the leaves may be lists."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        flat |= _leaves(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def read_sweep(file: Path) -> Document:
    """Read a sweep file.

    Raises:
        ConfigError: If it cannot be read or has problems. The message lists all of them.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    read = _Reader()
    read.known("", content, _TOP)
    folder = file.absolute().parent
    base = read.base("base", content.get("base", ""), folder) if "base" in content else None
    axes = read.grid("axes", content.get("axes", {}))
    rows = _rows(read, content.get("rows", []), base, folder)
    document = Document(
        file=file,
        title=read.text("title", content.get("title", file.stem)),
        note=read.text("note", content.get("note", "")),
        seeds=read.seeds("seeds", content.get("seeds", [0])),
        keys=read.flat("set", content.get("set", {})),
        axes=axes,
        rows=rows,
        whens=_whens(read, content.get("when", []), axes, {row.name for row in rows}),
        tune=_tune(read, content["tune"]) if "tune" in content else None,
        made_data=read.flag("made-data", content.get("made-data", False)),
    )
    _check(read, document)
    if read.problems:
        count = f"{len(read.problems)} problem{'s' * (len(read.problems) > 1)}"
        raise ConfigError("\n  ".join([f"{file} has {count}:", *read.problems]))
    return document


def _rows(read: _Reader, tables: object, base: Path | None, folder: Path) -> tuple[Row, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        read.add("rows", tables, "write each row as [[rows]]")
        return ()
    if not tables and base is not None:
        tables = [{"name": base.stem}]
    rows = []
    for number, table in enumerate(tables, start=1):
        rest = dict(table)
        name = read.text(f"rows[{number}].name", rest.pop("name", ""))
        where = f"rows[{name or number}]"
        if not name:
            read.problems.append(f"rows[{number}].name is missing")
        own = read.base(f"{where}.base", rest.pop("base"), folder) if "base" in rest else base
        if own is None:
            read.problems.append(f"{where}.base is missing, and the file has no base; name a configuration file")
        published = rest.pop("published", {})
        if isinstance(published, str):
            published = {"": published}
        if not isinstance(published, Mapping) or not all(isinstance(text, str) for text in published.values()):
            read.add(f"{where}.published", published, "must be a text, or a table of texts by a value of the axes")
            published = {}
        rows.append(
            Row(
                name=name,
                base=own or folder,
                tunes=read.names(f"{where}.tunes", rest.pop("tunes", [])),
                grids=read.grid(f"{where}.grids", rest.pop("grids", {})),
                note=read.text(f"{where}.note", rest.pop("note", "")),
                published=published,
                keys=read.flat(where, rest),
            )
        )
    for name in sorted({row.name for row in rows if [other.name for other in rows].count(row.name) > 1}):
        read.add("rows", name, "two rows have this name; rename one")
    return tuple(rows)


def _whens(read: _Reader, tables: object, axes: Grid, rows: set[str]) -> tuple[When, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        read.add("when", tables, "write each as [[when]]")
        return ()
    whens = []
    for number, table in enumerate(tables, start=1):
        rest, where = dict(table), f"when[{number}]"
        at = read.flat(f"{where}.axes", rest.pop("axes", {}))
        for key, value in at.items():
            if not any(_same(value, other) for other in axes.get(key, ())):
                read.add(f"{where}.axes.{key}", value, f"no such value of the axes; it has {list(axes.get(key, ()))}")
        names = read.names(f"{where}.rows", rest.pop("rows", []))
        for name in sorted(set(names) - rows):
            read.add(f"{where}.rows", name, f"no such row; there are {', '.join(sorted(rows))}")
        grids = read.grid(f"{where}.grids", rest.pop("grids", {}), may_be_empty=True)
        whens.append(When(axes=at, rows=names, grids=grids, keys=read.flat(where, rest)))
    return tuple(whens)


def _tune(read: _Reader, table: object) -> Tune | None:
    if not isinstance(table, Mapping):
        read.add("tune", table, "must be a table")
        return None
    read.known("tune.", table, _TUNE)
    trials = read.count("tune.trials", table.get("trials", 8), 1)
    finalists = read.count("tune.finalists", table.get("finalists", 1), 1)
    if finalists > trials:
        read.add("tune.finalists", finalists, f"must be at most tune.trials = {trials}")
    return Tune(
        trials=trials,
        finalists=finalists,
        seeds=read.seeds("tune.seeds", table.get("seeds", [])),
        grids=read.grid("tune.grids", table.get("grids", {})),
    )


def _check(read: _Reader, document: Document) -> None:
    """Find the problems that concern several parts of the file."""
    if not document.rows:
        read.problems.append('there is no base and no row; name a configuration file, base = "demo.toml"')
    tables = [("set", document.keys), *((f"rows[{row.name}]", row.keys) for row in document.rows)]
    tables += [(f"when[{number}]", when.keys) for number, when in enumerate(document.whens, start=1)]
    for key in document.axes:
        if key in _RESERVED:
            read.problems.append(f"axes.{key}: is decided by {_RESERVED[key]}; remove it")
    for row in document.rows:
        if row.name in _LINES or row.name.startswith("free rival:"):
            read.add("rows.name", row.name, "every table has a line of this name; choose another")
        for key in row.tunes:
            if key in _RESERVED or key == "evaluation.split":
                read.problems.append(f"rows[{row.name}].tunes: {key} is decided by the sweep; remove it")
            elif key in document.axes:
                read.problems.append(f"rows[{row.name}].tunes: {key} is an axis; remove it from one of both")
    for where, keys in tables:
        for key in keys:
            if key in _RESERVED:
                read.problems.append(f"{where}.{key}: is decided by {_RESERVED[key]}; remove it")
            elif key in document.axes:
                read.problems.append(f"{where}.{key}: is an axis; remove it from one of both")
    tuned = [row for row in document.rows if row.tunes]
    if tuned and document.tune is None:
        read.problems.append(f"rows[{tuned[0].name}].tunes: there is no [tune]; add it, or remove tunes")
    if document.tune is None:
        return
    if shared := sorted(set(document.tune.seeds) & set(document.seeds)):
        read.add("tune.seeds", shared, "are seeds of the table too; tune on others, or the table is of chosen seeds")
    for row in tuned:
        for point in document.points:
            grid = document.grid(row, point)
            offered = {key for when in document.whens if when.holds(row, point) for key in when.grids}
            missing = [key for key in row.tunes if key not in grid and key not in offered]
            if missing:
                read.problems.append(f"rows[{row.name}].tunes: {', '.join(missing)} has no values in [tune.grids]")
                break
            size = math.prod(len(values) for values in grid.values())
            if grid and size < document.tune.trials:
                where = f"rows[{row.name}]{describe(point)}"
                read.problems.append(
                    f"{where}: {document.tune.trials} trials, but only {size} combinations of the values of "
                    f"{', '.join(grid)}; offer more values or keys, or lower tune.trials"
                )
                break


def describe(point: Point) -> str:
    """Return the values of the axes in words, with a comma in front; empty without axes.

    Example:
        >>> describe((("privacy.record.epsilon", 4.0), ("prompt.rank", 2)))
        ', ε = 4, prompt.rank = 2'
    """
    return "".join(f", {axis_name(key)} = {value_text(value)}" for key, value in point)


def axis_name(key: str) -> str:
    """Return the heading of an axis."""
    return "ε" if key in EPSILONS else key


def value_text(value: ConfigValue) -> str:
    """Return a value of an axis as a table shows it."""
    if isinstance(value, float):
        return "∞" if value == math.inf else f"{value:g}"
    return str(value)

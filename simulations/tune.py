"""Hyper-parameters of every method, chosen on validation data, with as many trials for each method as for any other.

``python -m simulations.tune simulations/configs/baselines/search.toml`` runs the trials and writes the best settings of
each method, base and ε to ``chosen.toml`` beside it, for `simulations.baselines`. All trials are checked before the
first; those that are already in ``--runs`` are not repeated. A trial that fails counts as a trial and is never chosen.
"""

import argparse
import functools
import itertools
import json
import math
import os
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_dualpriv.config import ConfigValue, app_defaults, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from simulations.cells import Cell, make_cell, run_all, was_run
from simulations.report import CONFIGS, ROOT

Point = dict[str, ConfigValue]  # a value for each key that is tuned
Entry = tuple[str, str, float]  # base, method, ε

CHOSEN = "chosen.toml"
_METHOD_KEYS = {"name", "source", "keys", "tunes", "bases", "values", "with-noise", "without-noise"}
_DRAWS = 10_000


def read(path: Path) -> dict[str, Any]:
    """A search: its methods, bases, ε and the values that may be tried.

    Raises:
        ConfigError: If a method has unknown keys, or tunes a key that has no values.
    """
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    for method in document["methods"]:
        name = method["name"]
        if unknown := set(method) - _METHOD_KEYS - set(document["bases"]):
            raise ConfigError(f"method {name!r}: unknown {', '.join(sorted(unknown))}")
        offered = {key for kind in ("with-noise", "without-noise") for key in _values(document, method, kind)}
        if missing := set(method["tunes"]) - offered:
            raise ConfigError(
                f"method {name!r}: no values to try for {', '.join(sorted(missing))}; add them to [values]"
            )
    return document


def entries(document: Mapping[str, Any]) -> Iterator[tuple[Entry, Mapping[str, Any]]]:
    """What is tuned, one after the other: each method on each of its bases at each ε."""
    for base in document["bases"]:
        for method in document["methods"]:
            if base in method.get("bases", document["bases"]):
                for epsilon in document["epsilons"]:
                    yield (base, method["name"], epsilon), method


def kind_of(epsilon: float) -> str:
    """Which tables of a search hold at this ε."""
    return "with-noise" if math.isfinite(epsilon) else "without-noise"


def _values(document: Mapping[str, Any], method: Mapping[str, Any], kind: str) -> dict[str, list[ConfigValue]]:
    return document["values"].get(kind, {}) | method.get("values", {}).get(kind, {})


def space(document: Mapping[str, Any], method: Mapping[str, Any], epsilon: float) -> dict[str, list[ConfigValue]]:
    """The values of each key that a method tunes at this ε; a clip norm has none without noise."""
    values = _values(document, method, kind_of(epsilon))
    return {key: values[key] for key in method["tunes"] if key in values}


def draw(grid: Mapping[str, Sequence[ConfigValue]], trials: int, rng: np.random.Generator) -> list[Point]:
    """Distinct points of a grid at random, in which each value of a key comes up equally often, give or take one.

    Raises:
        ConfigError: If the grid has fewer points: the method would be tuned with less than the others.

    Reference:
        McKay, Beckman and Conover 1979 (Latin hypercube sampling), on a grid.
    """
    size = math.prod(len(values) for values in grid.values())
    if size < trials:
        raise ConfigError(f"{trials} trials, but only {size} points among {dict(grid)}; offer more values or keys")
    for _ in range(_DRAWS):
        columns = [_even(len(values), trials, rng) for values in grid.values()]
        points = list(zip(*columns, strict=True))
        if len(set(points)) == trials:
            return [{key: grid[key][i] for key, i in zip(grid, point, strict=True)} for point in points]
    raise ConfigError(f"no {trials} distinct points that use all values evenly among {dict(grid)}; offer more values")


def _even(values: int, trials: int, rng: np.random.Generator) -> list[int]:
    # Which values come up once more is random too.
    return rng.permutation(np.resize(rng.permutation(values), trials)).tolist()


@functools.cache
def _defaults() -> Mapping[str, ConfigValue]:
    return app_defaults(ROOT)


@functools.cache
def _config(name: str) -> Mapping[str, ConfigValue]:
    return read_toml(CONFIGS / name)


def cell_of(
    document: Mapping[str, Any], entry: Entry, method: Mapping[str, Any], point: Point, *, seed: int, split: str
) -> Cell:
    """A run of a method with these values, on validation or test data.

    Raises:
        ConfigError: If it is not a valid configuration.
    """
    base, name, epsilon = entry
    settings, kind = document["bases"][base], kind_of(epsilon)
    layers = [_config(settings["config"]), document["common"], settings.get("keys", {})]
    layers += [settings.get(kind, {}), method["keys"], method.get(base, {}), method.get(kind, {}), point]
    return make_cell(
        _defaults(),
        [*layers, {"evaluation.split": split}],
        base=base,
        name=name,
        epsilon=epsilon,
        seed=seed,
    )


def trials_of(document: Mapping[str, Any]) -> dict[Entry, list[tuple[Point, Cell]]]:
    """The trials of every entry. What a method tries depends on its own values alone.

    Raises:
        ConfigError: If a trial is not a valid run, or a method cannot have as many as the others.
    """
    found: dict[Entry, list[tuple[Point, Cell]]] = {}
    for entry, method in entries(document):
        base, name, epsilon = entry
        rng = np.random.default_rng([document["tuning-seed"], zlib.crc32(f"{base} {name} {epsilon:g}".encode())])
        try:
            points = draw(space(document, method, epsilon), document["trials"], rng)
        except ConfigError as error:
            raise ConfigError(f"{name!r} on {base}, ε = {epsilon:g}: {error}") from error
        seed = document["tuning-seed"]
        found[entry] = [(p, cell_of(document, entry, method, p, seed=seed, split="val")) for p in points]
    return found


def best(scores: Sequence[float | None]) -> int:
    """Index of the highest score, the first of equals; None: the trial failed.

    Raises:
        ValueError: If all failed.
    """
    ranked = [(score, -index) for index, score in enumerate(scores) if score is not None]
    if not ranked:
        raise ValueError("every trial failed")
    return -max(ranked)[1]


def to_toml(chosen: Sequence[Mapping[str, Any]], comment: str) -> bytes:
    """Tables ``[[chosen]]``; their values are texts, numbers and one table of such."""

    def value(x: Any) -> str:
        if isinstance(x, Mapping):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in x.items()) + " }"
        return "inf" if x == math.inf else json.dumps(x, ensure_ascii=False)

    lines = [f"# {line}" for line in comment.splitlines()]
    for table in chosen:
        lines += ["", "[[chosen]]", *(f"{key} = {value(x)}" for key, x in table.items())]
    return ("\n".join(lines) + "\n").encode()


def main() -> None:
    """Check everything, run the trials, write what was best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tune")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--base", help="this base only; what was chosen on others stays")
    parser.add_argument("--method", help="this method only, likewise")
    parser.add_argument("--finished", action="store_true", help="run nothing: choose where all trials have been run")
    args = parser.parse_args()
    document = read(args.search)
    every = trials_of(document)
    wanted = {e: t for e, t in every.items() if args.base in (None, e[0]) and args.method in (None, e[1])}
    if not wanted:
        parser.error(f"nothing is called {args.base or args.method!r} in {args.search}")
    if args.finished:
        wanted = {e: own for e, own in wanted.items() if all(was_run(cell, args.runs) for _, cell in own)}
    cells = [cell for trials in wanted.values() for _, cell in trials]
    summaries = iter(run_all(cells, args.runs, args.workers, may_fail=True))
    path = args.search.with_name(CHOSEN)
    before = tomllib.loads(path.read_text(encoding="utf-8"))["chosen"] if path.exists() else []
    chosen = {(c["base"], c["method"], c["epsilon"]): c for c in before}
    for entry, trials in wanted.items():
        own = list(itertools.islice(summaries, len(trials)))
        scores = [s["accuracy"]["final"]["local"] if s else None for s in own]
        index = best(scores)
        chosen[entry] = {
            "base": entry[0],
            "method": entry[1],
            "epsilon": entry[2],
            "trials": len(trials),
            "failed": scores.count(None),
            "validation": round(scores[index] or 0.0, 4),
            "seconds": round(sum(s["seconds"] for s in own if s), 1),
            "keys": trials[index][0],
        }
    comment = (
        f"Written by python -m simulations.tune {args.search.name}: the best of each method's trials on validation\n"
    )
    comment += "data (local accuracy, one seed). Seconds: of all trials together."
    write_bytes(path, to_toml([chosen[entry] for entry in every if entry in chosen], comment))


if __name__ == "__main__":
    main()

"""Tune the hyper-parameters of every method on validation data, with the same number of trials for each method.

``python -m simulations.tune simulations/configs/baselines/search.toml`` runs the trials. Then it runs the best few of
each method, base and ε again with other seeds. It writes the values with the highest mean to ``chosen.toml`` beside the
search file, where `simulations.baselines` reads them. The script checks all trials before the first run, and does not
repeat runs that are already in ``--runs``. A trial that fails counts as a trial and is never chosen.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.config.schema import ConfigValue, app_defaults, read_toml
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.sweep.tuning import charge_of
from fl_dualpriv.sweep.tuning import draw as draw_evenly
from simulations.cells import Cell, make_cell, run_all, was_run
from simulations.report import CONFIGS, ROOT

Point = dict[str, ConfigValue]  # a value for each key that is tuned
Entry = tuple[str, str, float]  # base, method, ε

CHOSEN = "chosen.toml"
_METHOD_KEYS = {"name", "source", "keys", "tunes", "bases", "values", "with-noise", "without-noise"}


def read(path: Path) -> dict[str, Any]:
    """Read a search file: methods, bases, ε and the values that may be tried.

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
    """Yield all entries to be tuned, with their method: each method on each of its bases at each ε."""
    for base in document["bases"]:
        for method in document["methods"]:
            if base in method.get("bases", document["bases"]):
                for epsilon in document["epsilons"]:
                    yield (base, method["name"], epsilon), method


def kind_of(epsilon: float) -> str:
    """Return the name of the search tables that apply at this ε."""
    return "with-noise" if math.isfinite(epsilon) else "without-noise"


def _values(document: Mapping[str, Any], method: Mapping[str, Any], kind: str) -> dict[str, list[ConfigValue]]:
    return document["values"].get(kind, {}) | method.get("values", {}).get(kind, {})


def space(document: Mapping[str, Any], method: Mapping[str, Any], epsilon: float) -> dict[str, list[ConfigValue]]:
    """Return the values of each key that a method tunes at this ε; without noise a clip norm has no values."""
    values = _values(document, method, kind_of(epsilon))
    return {key: values[key] for key in method["tunes"] if key in values}


def draw(grid: Mapping[str, Sequence[ConfigValue]], trials: int, rng: np.random.Generator) -> list[Point]:
    """Draw distinct random points of a grid such that the counts of a key's values differ by at most one.

    Raises:
        ConfigError: If the grid has fewer points than ``trials``, because the method would then get fewer trials than
            the others, or if no even draw with distinct points was found.

    Reference:
        McKay, Beckman and Conover 1979 (Latin hypercube sampling), on a grid.
    """
    size = math.prod(len(values) for values in grid.values())
    if size < trials:
        raise ConfigError(f"{trials} trials, but only {size} points among {dict(grid)}; offer more values or keys")
    return [dict(point) for point in draw_evenly(grid, trials, rng)]


@functools.cache
def _defaults() -> Mapping[str, ConfigValue]:
    return app_defaults(ROOT)


@functools.cache
def _config(name: str) -> Mapping[str, ConfigValue]:
    return read_toml(CONFIGS / name)


def cell_of(
    document: Mapping[str, Any], entry: Entry, method: Mapping[str, Any], point: Point, *, seed: int, split: str
) -> Cell:
    """Return the run of a method with these values, on validation or test data.

    Raises:
        ConfigError: If the configuration is not valid.
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
    """Return the trials of every entry, with the first tuning seed.

    The points that a method tries depend only on its entry, its own values, the number of trials and the seed.

    Raises:
        ConfigError: If a trial is not a valid run, or a method cannot have as many trials as the others.
    """
    trials: dict[Entry, list[tuple[Point, Cell]]] = {}
    for entry, method in entries(document):
        base, name, epsilon = entry
        seed = document["tuning-seeds"][0]
        rng = np.random.default_rng([seed, zlib.crc32(f"{base} {name} {epsilon:g}".encode())])
        try:
            points = draw(space(document, method, epsilon), document["trials"], rng)
        except ConfigError as error:
            raise ConfigError(f"{name!r} on {base}, ε = {epsilon:g}: {error}") from error
        trials[entry] = [(p, cell_of(document, entry, method, p, seed=seed, split="val")) for p in points]
    return trials


def finalists(scores: Sequence[float | None], count: int) -> list[int]:
    """Return the indices of the highest scores; among equal scores the lower index comes first.

    Args:
        scores: Score of each trial; None if the trial failed.
        count: Number of indices to return.

    Raises:
        ValueError: If all trials failed.
    """
    ranked = sorted((-score, index) for index, score in enumerate(scores) if score is not None)
    if not ranked:
        raise ValueError("every trial failed")
    return [index for _, index in ranked[:count]]


def best(scores: Mapping[int, Sequence[float | None]]) -> tuple[int, float]:
    """Return the finalist with the highest mean over seeds, and that mean; among equal means the first one.

    Args:
        scores: Finalist → its score with each seed; None if the run failed.

    Raises:
        ValueError: If every finalist failed with at least one seed.
    """
    means = {
        index: statistics.mean(seed_scores)  # type: ignore[type-var]
        for index, seed_scores in scores.items()
        if None not in seed_scores
    }
    if not means:
        raise ValueError("every finalist failed with some seed")
    return max(means.items(), key=lambda item: item[1])


def to_toml(chosen: Sequence[Mapping[str, Any]], comment: str) -> bytes:
    """Return TOML with a ``[[chosen]]`` table per choice; values are texts, numbers and tables of these."""

    def value(x: Any) -> str:
        if isinstance(x, Mapping):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in x.items()) + " }"
        return "inf" if x == math.inf else json.dumps(x, ensure_ascii=False)

    lines = [f"# {line}" for line in comment.splitlines()]
    for table in chosen:
        lines += ["", "[[chosen]]", *(f"{key} = {value(x)}" for key, x in table.items())]
    return ("\n".join(lines) + "\n").encode()


def leaders(
    document: Mapping[str, Any], summaries: Mapping[Entry, Sequence[Mapping[str, Any]]]
) -> dict[Entry, list[int]]:
    """Return the indices of the finalists of every entry, from the summaries of its trials."""
    return {
        entry: finalists([_score(s) for s in trial_summaries], document["finalists"])
        for entry, trial_summaries in summaries.items()
    }


def finals_of(
    document: Mapping[str, Any],
    trials: Mapping[Entry, Sequence[tuple[Point, Cell]]],
    leading: Mapping[Entry, Sequence[int]],
) -> dict[Entry, list[tuple[int, Cell]]]:
    """Return, for every entry, the finalists' runs with all but the first tuning seed, each with its trial index."""
    methods, seeds = dict(entries(document)), document["tuning-seeds"][1:]
    return {
        entry: [
            (index, cell_of(document, entry, methods[entry], trials[entry][index][0], seed=seed, split="val"))
            for index in indices
            for seed in seeds
        ]
        for entry, indices in leading.items()
    }


def _run(wanted: Mapping[Entry, Sequence[tuple[Any, Cell]]], runs: Path, workers: int) -> dict[Entry, list[Any]]:
    """Run all trials and return their summaries; the summary of a failed trial is empty."""
    cells = [cell for trials in wanted.values() for _, cell in trials]
    summaries = iter(run_all(cells, runs, workers, may_fail=True))
    return {entry: list(itertools.islice(summaries, len(trials))) for entry, trials in wanted.items()}


def _score(summary: Mapping[str, Any]) -> float | None:
    return summary["accuracy"]["final"]["local"] if summary else None


def charge_line(entry: Entry, cells: Sequence[Cell]) -> str:
    """Return the sentence about privacy that is printed and written to the file with each choice."""
    base, method, epsilon = entry
    runs = f"{method} on {base}, ε = {epsilon:g}: {len(cells)} tuning runs read validation data, outside of that ε"
    charge = charge_of([cell.settings for cell in cells]) if math.isfinite(epsilon) else None
    if charge is None:
        return f"{runs}; no filter bounds them"
    return f"{runs}; the filter reserve would charge ε = {charge:.4g} for all of them"


def main() -> None:
    """Check all trials, run them and write the best values."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tune")
    parser.add_argument("--workers", type=int, default=usable_cpus())
    parser.add_argument("--base", help="tune only this base; choices on other bases stay")
    parser.add_argument("--method", help="tune only this method; choices of others stay")
    parser.add_argument("--finished", action="store_true", help="run nothing; choose for entries that are finished")
    args = parser.parse_args()
    document = read(args.search)
    every = trials_of(document)
    wanted = {e: t for e, t in every.items() if args.base in (None, e[0]) and args.method in (None, e[1])}
    if not wanted:
        parser.error(f"no base or method is called {args.base or args.method!r} in {args.search}")
    if args.finished:
        wanted = {e: trials for e, trials in wanted.items() if all(was_run(cell, args.runs) for _, cell in trials)}
    first = _run(wanted, args.runs, args.workers)
    leading = leaders(document, first)
    again = finals_of(document, wanted, leading)
    if args.finished:
        again = {e: finals for e, finals in again.items() if all(was_run(cell, args.runs) for _, cell in finals)}
    second = _run(again, args.runs, args.workers)
    path = args.search.with_name(CHOSEN)
    before = tomllib.loads(path.read_text(encoding="utf-8"))["chosen"] if path.exists() else []
    chosen = {(c["base"], c["method"], c["epsilon"]): c for c in before}
    for entry, more in second.items():
        trial_summaries = first[entry]
        scores = {index: [_score(trial_summaries[index])] for index in leading[entry]}
        for (index, _), summary in zip(again[entry], more, strict=True):
            scores[index].append(_score(summary))
        index, mean = best(scores)
        chosen[entry] = {
            "base": entry[0],
            "method": entry[1],
            "epsilon": entry[2],
            "trials": len(trial_summaries),
            "runs": len(trial_summaries) + len(more),
            "failed": sum(not s for s in (*trial_summaries, *more)),
            "validation": round(mean, 4),
            "seconds": round(sum(s["seconds"] for s in (*trial_summaries, *more) if s), 1),
            "privacy": charge_line(entry, [cell for _, cell in (*wanted[entry], *again[entry])]),
            "keys": wanted[entry][index][0],
        }
        print(chosen[entry]["privacy"])
    comment = (
        f"Written by python -m simulations.tune {args.search.name}: the best of each method's trials on validation\n"
        "data (local accuracy, mean over the tuning seeds). Seconds: of all runs together.\n"
        "Tuning is outside of every ε. On private data it must be charged: the lines `privacy` say what the filter\n"
        "reserve would charge (docs/privacy.md, sections 2 and 6). On public data it costs nothing."
    )
    write_bytes(path, to_toml([chosen[entry] for entry in every if entry in chosen], comment))


if __name__ == "__main__":
    main()

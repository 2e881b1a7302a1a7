"""Compare configurations over seeds, pair by pair: one file of results, with means, spreads and paired intervals.

``python -m simulations.paired simulations/configs/paired/shelf.toml --out docs/results/shelf.json`` runs every row of
the document with every seed, as ``fl-dualpriv run`` does on the local engine. A seed changes the division of the data,
the batches and the noise. The first row is compared with every other: the mean of the differences of one seed each, and
their 95 % interval by Student's t. Accuracies are fractions of test records; differences are points. The script does
not repeat finished runs. It ends with an error if a run has failures.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy import stats

from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.files import write_bytes
from simulations.report import ROOT, Row, run

KINDS = ("local", "neighbour", "harmonic_mean", "general", "new_client")


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return mean and 95 % interval of first − second, in points, over pairs of one seed each.

    Example:
        >>> paired_difference([0.5, 0.6], [0.4, 0.4])["mean"]
        15.0
    """
    gaps = [100 * (a - b) for a, b in zip(first, second, strict=True)]
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    mean = statistics.mean(gaps)
    return {"mean": round(mean, 2), "low": round(mean - half, 2), "high": round(mean + half, 2)}


def summary_of(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean, standard deviation and values in percent; None if a value does not exist."""
    percent = [round(100 * value, 2) for value in values if value is not None]
    if len(percent) < len(values):
        return None
    return {"mean": round(statistics.mean(percent), 2), "std": round(statistics.stdev(percent), 2), "values": percent}


def compared(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the results of rows, each a list of summaries over the same seeds, the first row against the others."""
    results: dict[str, Any] = {}
    for name, summaries in rows.items():
        final = [summary["accuracy"]["final"] for summary in summaries]
        epsilon = max((r["epsilon"] for s in summaries for r in s["privacy"] if r["guarantee"] == "theorem"), default=0)
        results[name] = {"epsilon": epsilon} | {kind: summary_of([score[kind] for score in final]) for kind in KINDS}
    first = next(iter(rows.values()))
    for when, name in (("zero_shot", "un-tuned"), ("free", "free rival")):
        scores = [summary["accuracy"][when] for summary in first]
        results[name] = {"epsilon": 0} | {kind: summary_of([score[kind] for score in scores]) for kind in KINDS}
    results["free rival"]["names"] = sorted({summary["accuracy"]["free"]["rival"] for summary in first})
    local = {name: [s["accuracy"]["final"]["local"] for s in summaries] for name, summaries in rows.items()}
    local |= {"free rival": [summary["accuracy"]["free"]["local"] for summary in first]}
    best, *others = local
    gains = {other: paired_difference(local[best], local[other]) for other in others}
    return {"rows": results, "first": best, "gain in local accuracy, points": gains}


def _row(name: str, row: Mapping[str, Any]) -> Row:
    return Row(name, str(row["config"]), {key: str(value) for key, value in row.get("set", {}).items()})


def main() -> None:
    """Run all rows, and write the file."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="TOML file: seeds, and tables [groups.NAME.ROW] of config and keys")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paired")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    document = tomllib.loads(args.document.read_text("utf-8"))
    groups = {group: {n: _row(n, row) for n, row in rows.items()} for group, rows in document["groups"].items()}
    cells = [(row, seed) for seed in document["seeds"] for rows in groups.values() for row in rows.values()]
    with ThreadPoolExecutor(args.workers) as pool:
        done = list(pool.map(lambda cell: run(cell[0], cell[1], "test", args.runs), cells))
    by_row: dict[Row, list[dict[str, Any]]] = {}
    for (row, _), summary in zip(cells, done, strict=True):
        by_row.setdefault(row, []).append(summary)
    results = {group: compared({name: by_row[row] for name, row in rows.items()}) for group, rows in groups.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    content = {
        "command": f"python -m simulations.paired {args.document} --out {args.out}",
        "commit": commit.stdout.strip(),
        "seeds": document["seeds"],
        "split": "test",
        "groups": results,
    }
    write_bytes(args.out, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    json.dump(content["groups"], sys.stdout, indent=1)


if __name__ == "__main__":
    main()

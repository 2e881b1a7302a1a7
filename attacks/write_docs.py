"""Write docs/attacks.md: `python -m attacks.write_docs`.

A cell is one audit of one configuration, repeated over seeds. The script does not repeat audits that are already in
``--runs``, so an interrupted table can be continued. ``--cells`` selects cells by the start of their names. All cells
take about half an hour of one core.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attacks.inversion import audit_inversion
from attacks.membership import audit_membership
from fl_dualpriv.cli.console import spell_out_what_cannot_be_shown
from fl_dualpriv.config.schema import ConfigValue, RunConfig, app_defaults, merge, read_toml
from fl_dualpriv.files import write_bytes, write_json
from fl_dualpriv.run.tables import epsilon_text

ROOT = Path(__file__).resolve().parents[1]
BASE = "by-class.toml"

PRIVACY: dict[str, dict[str, ConfigValue]] = {
    "none": {"privacy.record.mechanism": "none"},
    "nominal ε = 4, the DP-FPL paper's formulas": {"method": "dpfpl-paper", "pruning.update-keep-ratio": 1.0},
    "ε = 4": {},
    "ε = 1": {"privacy.record.epsilon": 1.0},
}
"""The four privacy settings, as changes of the demo's configuration."""

HEAD: dict[str, ConfigValue] = {
    "prompt.learner": "head",
    "prompt.rank": 8,
    "method": "full",
    "pruning.update-keep-ratio": 1.0,
    "train.local-learning-rate": 5.0,
}
"""A learner that memorises: a head of rank 8 for each client, with ten times the learning rate."""

SHARED_HEAD: dict[str, ConfigValue] = {
    "prompt.learner": "head",
    "method": "promptfl",
    "pruning.update-keep-ratio": 1.0,
}
"""A head of the demo's rank that all clients share."""

CONTEXT: dict[str, ConfigValue] = {
    "rounds": 20,
    "train.local-steps": 5,
    "train.sampling-rate": 1.0,
    "train.local-learning-rate": 2.0,
}
"""The demo's prompt, overfitted: 100 steps on all of the few records, with four times the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One audit, repeated over seeds.

    Attributes:
        name: Start of the names of its files.
        group: Heading of its table.
        label: Label of its row.
        changes: Changes of the demo's configuration.
        options: Keyword arguments of the audit.
        seeds: Number of seeds.
    """

    name: str
    group: str
    label: str
    changes: Mapping[str, ConfigValue]
    options: Mapping[str, int]
    seeds: int = 3

    @property
    def audit(self) -> Callable[..., Any]:
        """The attack function, chosen by the start of the name."""
        return audit_membership if self.name.startswith("membership") else audit_inversion

    def config(self) -> RunConfig:
        """Return the configuration of the run under attack."""
        file = read_toml(ROOT / "simulations" / "configs" / BASE)
        return RunConfig.from_run_config(merge(app_defaults(ROOT), file, self.changes))


def _membership(group: str, name: str, base: Mapping[str, ConfigValue], seeds: int, **options: int) -> list[Cell]:
    cells = []
    for number, (label, changes) in enumerate(PRIVACY.items()):
        if "prompt.learner" in base and "method" in changes:
            continue  # the paper's formulas factorise the prompt, and a head is factorised already
        both = dict(base) | changes  # the paper's formulas replace the method
        cells.append(
            Cell(
                name=f"membership-{name}-{number}", group=group, label=label, changes=both, options=options, seeds=seeds
            )
        )
    return cells


def _inversion(group: str, name: str, base: Mapping[str, ConfigValue]) -> list[Cell]:
    return [
        replace(cell, name=cell.name.replace("membership", "inversion"))
        for cell in _membership(group, name, base, 1, records=1, uploads=8)
    ]


CELLS = (
    *_membership("The demo, 64 records a client", "demo", {}, 3, records=64, trainings=8),
    *_membership("A head that memorises, 100 records a client", "head", HEAD, 3, records=100, trainings=32),
    *_membership("The demo's prompt overfitted, 32 records a client", "overfit", CONTEXT, 3, records=32, trainings=16)[
        :1
    ],
    *_inversion("The demo's prompt", "demo", {}),
    *_inversion("A shared head of rank 2", "head", SHARED_HEAD),
)

ABOUT = """\
Written by `python -m attacks.write_docs` from what the attacks found; not by hand. Every row is
[by-class.toml](../simulations/configs/by-class.toml) with the changes named in the script. An attack finds what leaks
at least: a small number is no proof, ε is.
"""

MEMBERSHIP = """\
Members and non-members are records of one client, divided by a fair coin before each training; nobody is trained on
non-members. Each training is attacked once, with all others of its seed as shadows. *Loss*: a record of small loss is
called a member. *LiRA*: likelihood ratio of a record's confidence over trainings with and without it. AUC and TPR are
means over seeds; [ ] spans the 95 % intervals of all seeds, each of which takes trainings for the independent draws.
*Spread*: standard deviation over single trainings. *Ceiling*: the AUC that no attack can exceed if the claim is true.
"""

INVERSION = """\
The server sees one upload of one local step on one record in round 1, where it knows the whole prompt: the most
favourable view it can have. It knows the clip, the scale of the noise and what public images look like (the demo's
validation split), and looks for the most probable record. *Score*: cosine of true and reconstructed feature.
*Baseline*: the same for the average image, which needs no upload. *Recovered*: share of the squared distance to the
truth that the upload took away, 1 − (1 − score)/(1 − baseline). [ ]: 95 % interval of score − baseline over uploads.
"""


READING = """\
- **The demo hardly leaks even without privacy**: 40 steps of its learning rate do not memorise 32 records. An AUC near
  a half there says nothing about noise. The two other tables show the same attack on prompts that memorise.
- On the demo at ε = 1 no attack passed an AUC of 0.55. A head that memorises passes it at ε = 1 by the loss threshold:
  that is far below what ε = 1 allows, and the reason to read the ceiling and not the attack.
- With 8 trainings a likelihood ratio has 7 shadows and is often the weaker attack; with 16 or 32 it is the stronger
  one where there is something to find.
- The nominal ε of the DP-FPL paper protects nothing from the server: one clean upload gives the image feature and its
  label away, as an upload without privacy does. The paper's noise is on the server's side of that upload. What was run
  are the paper's formulas, not the authors' code ([privacy.md §7](privacy.md)).
- With record-level noise the most probable record is close to the average image: the score falls to the baseline, or
  a little below it where the search follows the noise.
- The intervals of the inversion are wide because uploads differ: images close to the average have little to lose.
- Not attacked, and not protected: *properties* of a client's data set, such as the share of images with one attribute.
  ε at record level bounds what is learned about one record, and such a property is a fact about many. Property
  inference on prompts: Wu et al., USENIX Security 2024. What ε covers: [privacy.md §2](privacy.md).
- Not attacked here: uploads of several steps or many records, later rounds, where the server does not know p_L, noise
  at the class features, top-m residuals, and towers whose Jacobian does not fit into 1 GiB.
"""
"""Written by hand; check it against the tables whenever they change."""


def measure(cell: Cell, seed: int, runs: Path) -> dict[str, Any]:
    """Run one audit, or read its earlier result."""
    path = _path(cell, seed, runs)
    if not path.exists():
        start = time.process_time()
        result = cell.audit(cell.config(), seed, **cell.options)
        write_json(path, asdict(result) | {"cpu_seconds": round(time.process_time() - start, 1)})
    return json.loads(path.read_text(encoding="utf-8"))


def _path(cell: Cell, seed: int, runs: Path) -> Path:
    return runs / f"{cell.name}-{seed}.json"


def document(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the whole page for the measured cells.

    Args:
        results: Name of a cell → one result per seed.
    """
    parts = ["# Attacks", ABOUT.strip()]
    for heading, about, kind in (
        ("Membership inference on published personal prompts", MEMBERSHIP, "membership"),
        ("Gradient inversion by a curious server", INVERSION, "inversion"),
    ):
        parts += [f"## {heading}", about.strip()]
        cells = [cell for cell in CELLS if cell.name.startswith(kind) and results.get(cell.name)]
        for group in dict.fromkeys(cell.group for cell in cells):
            rows = [_row(cell, results[cell.name]) for cell in cells if cell.group == group]
            options = next(cell.options for cell in cells if cell.group == group)
            settings = ", ".join(f"{name} = {value}" for name, value in options.items())
            header = _HEADERS[kind]
            parts += [f"### {group} ({settings})", "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows])]
    return "\n\n".join([*parts, "## Reading the tables", READING.strip()]) + "\n"


_HEADERS = {
    "membership": (
        "| privacy | claimed ε | loss AUC | LiRA AUC | spread | loss TPR at 1 % FPR | LiRA TPR at 1 % FPR | ceiling "
        "| members, non-members | seeds |"
    ),
    "inversion": (
        "| privacy | claimed ε | score | baseline | score − baseline | recovered | label back (chance) | seeds |"
    ),
}


def _row(cell: Cell, results: Sequence[Mapping[str, Any]]) -> str:
    claim = results[0]["epsilon_claimed"]
    claimed = epsilon_text(claim) if isinstance(claim, float) else claim
    seeds = ", ".join(map(str, range(len(results))))
    if cell.name.startswith("membership"):
        areas = [_area(results, attack) for attack in ("loss_threshold", "lira")]
        rates = [_mean([f[attack]["tpr_at_1_fpr"] for f in results]) for attack in ("loss_threshold", "lira")]
        spread = statistics.stdev([auc for f in results for auc in f["auc_by_training"]])
        counts = [sum(f["loss_threshold"][kind] for f in results) for kind in ("members", "non_members")]
        cells = [*areas, f"{spread:.3f}", *(f"{rate:.3f}" for rate in rates), f"{results[0]['auc_ceiling']:.3f}"]
        return f"| {cell.label} | {claimed} | " + " | ".join([*cells, f"{counts[0]}, {counts[1]}", seeds]) + " |"
    score, base = (_mean([f[key] for f in results]) for key in ("inversion_score", "baseline_score"))
    low, high = min(f["advantage_low"] for f in results), max(f["advantage_high"] for f in results)
    label = f"{_mean([f['label_accuracy'] for f in results]):.2f} ({results[0]['label_chance']:.2f})"
    cells = [f"{score:.3f}", f"{base:.3f}", f"{score - base:+.3f} [{low:+.3f}, {high:+.3f}]"]
    return (
        f"| {cell.label} | {claimed} | "
        + " | ".join([*cells, f"{1 - (1 - score) / (1 - base):.2f}", label, seeds])
        + " |"
    )


def _area(results: Sequence[Mapping[str, Any]], attack: str) -> str:
    low, high = min(f[attack]["auc_low"] for f in results), max(f[attack]["auc_high"] for f in results)
    return f"{_mean([f[attack]['auc'] for f in results]):.3f} [{low:.3f}, {high:.3f}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> None:
    """Run the missing audits, then write the page from all results."""
    spell_out_what_cannot_be_shown()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "attacks")
    parser.add_argument("--cells", default="", help="run only cells whose name starts with this")
    parser.add_argument("--seeds", type=int, default=3, help="most seeds per cell; 0 only writes the page")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "attacks.md")
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):  # outermost, so that an interrupted page has all rows
        for cell in CELLS:
            if cell.name.startswith(options.cells) and seed < cell.seeds:
                result = measure(cell, seed, options.runs)
                sys.stdout.write(f"{cell.name} seed {seed}: {result['cpu_seconds']} CPU-s\n")
                sys.stdout.flush()
    results = {
        cell.name: [measure(cell, s, options.runs) for s in range(cell.seeds) if _path(cell, s, options.runs).exists()]
        for cell in CELLS
    }
    write_bytes(options.document, document(results).encode())


if __name__ == "__main__":
    main()

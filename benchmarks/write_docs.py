"""Write docs/benchmarks.md from the stored results of the benchmarks: `python -m benchmarks.write_docs`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import CHECKOUT, RESULTS

DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Target of a figure."""

    what: str
    at_least: float | None = None
    at_most: float | None = None

    def reached(self, value: float) -> bool:
        """Return True if the value meets the target."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        """The target as a text for the table."""
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


TARGETS: dict[str, dict[str, Target]] = {
    "text_tower": {
        "ratio_c10": Target(what="77-token CoOp step / ours, 10 classes", at_least=10),
        "ratio_c37": Target(what="the same, 37 classes", at_least=13),
        "ratio_c100": Target(what="the same, 100 classes", at_least=15),
        "grad_diff": Target(what="largest relative difference of the gradients", at_most=1e-5),
        "peak_share": Target(what="share of one thread's sgemm peak, 10 classes, 8 clients", at_least=0.7),
    },
    "per_example": {
        "over_nonprivate": Target(what="exact per-example step / non-private step, batch 16", at_most=4),
        "over_nonprivate_topm": Target(what="the same with top-3 residuals, 100 classes", at_most=2),
        "vs_opacus": Target(what="Opacus on 77 tokens / exact step, batch 8", at_least=17),
    },
    "soft_prompt": {
        "over_nonprivate_b8": Target(
            what="exact per-example step of a soft prompt / non-private, batch 8", at_most=1.05
        ),
        "over_nonprivate_b32": Target(what="the same, batch 32", at_most=1.05),
    },
    "mllm_memory": {
        "vs_hooks": Target(what="peak memory, ours / DP-SGD with hooks, all visual tokens, worse batch", at_most=0.7),
        "vs_hooks_pruned": Target(what="the same, both with pruned visual tokens", at_most=0.7),
        "little_vs_hooks": Target(what="ours one by one with checkpointing / hooks, all tokens", at_most=0.7),
        "little_vs_hooks_pruned": Target(what="the same, both pruned", at_most=0.7),
        "little_vs_zeroth": Target(what="the same / zeroth-order, all tokens", at_most=1.0),
        "little_vs_zeroth_pruned": Target(what="the same, both pruned", at_most=1.0),
    },
    "dpfpl_round": {
        "warm_ratio": Target(what="the paper's round / the same formulas on our engine, warm cache", at_least=25),
    },
    "clients": {
        "vs_pfl": Target(what="pfl / ours, cohort, on the head", at_least=4),
        "vs_flower": Target(what="plain Flower + Ray / ours, cohort, on the head", at_least=15),
        "per_client_vs_flower": Target(what="ours with a SuperNode per client / plain Flower", at_most=1.1),
    },
    "growth": {
        "growth": Target(what="cost of a client-step, 10,000 / 100 clients", at_most=1.2),
    },
    "startup": {
        "train_imports": Target(what="CPU seconds of the imports of a train message", at_most=2.5),
        "node_hash": Target(what="CPU seconds of `fl-dualpriv node hash`", at_most=2),
        "round_1": Target(what="seconds from `make demo` to the end of round 1 on Ray, features cached", at_most=20),
    },
}

BESIDE: dict[str, dict[str, str]] = {
    "mllm_memory_gpu": {
        "vs_hooks": "LLaVA-1.5-7B's shape, bf16, batch 8, on a GPU: peak memory, ours / DP-SGD with hooks, all tokens",
        "vs_hooks_pruned": "the same, both pruned",
        "vs_hooks_as_published": "the same model, ours with pruned tokens / hooks with all; published: 0.857",
        "little_vs_hooks": "ours one by one with checkpointing / hooks, all tokens",
        "little_vs_hooks_pruned": "the same, both pruned",
        "little_vs_zeroth": "ours one by one with checkpointing / zeroth-order, all tokens",
        "little_vs_zeroth_pruned": "the same, both pruned",
        "time_vs_hooks": "time, ours / hooks, all tokens",
        "time_vs_hooks_pruned": "the same, both pruned",
        "little_time_vs_zeroth": "time, ours one by one with checkpointing / zeroth-order, all tokens",
        "little_time_vs_zeroth_pruned": "the same, both pruned",
    },
    "mllm_memory": {
        "7b_vs_hooks": "LLaVA-1.5-7B in bf16, batch 8, counted: ours / hooks, all tokens",
        "7b_vs_hooks_pruned": "the same, both pruned",
        "7b_little_vs_zeroth": "the same model, ours one by one with checkpointing / zeroth-order, all tokens",
        "7b_little_vs_zeroth_pruned": "the same, both pruned",
        "7b_vs_hooks_as_published": "the same model, ours with pruned tokens / hooks with all; published: 0.857",
        "vs_hooks_as_published": "the small model, ours with pruned tokens / hooks with all; published: 0.857",
        "time_vs_hooks": "time, ours / hooks, all tokens",
        "time_vs_hooks_pruned": "the same, both pruned",
        "little_time_vs_zeroth": "time, ours one by one with checkpointing / zeroth-order, all tokens",
        "little_time_vs_zeroth_pruned": "the same, both pruned",
    },
    "soft_prompt": {
        "over_nonprivate_8x512_b8": "the same with 8 blocks of width 512, batch 8",
        "over_nonprivate_8x512_b32": "the same, batch 32",
    },
    "dpfpl_round": {
        "cold_ratio": "the same, image features computed in the round",
        "warm_ratio_exact_dp": "the paper's round / our round with exact record-level DP, warm cache",
        "cold_ratio_exact_dp": "the same, image features computed in the round",
        "warm_ratio_feature_dp": "the paper's round / our round with record-level DP at the class features, warm cache",
        "warm_ratio_without_dp": "the paper's round / our round without privacy, warm cache",
    },
    "clients": {
        "tower_vs_pfl": "pfl / ours, cohort, on the demo's text tower",
        "tower_vs_flower": "plain Flower + Ray / ours, cohort, on the demo's text tower",
        "ray_cohort_vs_flower": "plain Flower + Ray / ours, cohort on Ray, on the head",
    },
}
"""Descriptions of figures without a target."""

NOT_REACHED = """\
- `over_nonprivate` ≤ 4: reached 5.3. One record is one backward pass; the arithmetic alone is 8.5 times a non-private
  step of 16 records, and the ratio is below that only because sixteen cotangents fill the processor better than one. At
  the measured cost of the non-private step, 4 would need the exact step at 107 % of the processor's peak
  ([log.md](log.md), 2026-11-25). What is cheaper is another estimator: top-m residuals (biased), or noise at the class
  features (another mechanism).
- `vs_hooks_pruned` <= 0.7: 0.75 at batch 8, weights included (0.27 at batch 32). With few visual tokens what is left is
  the text behind the prompt, which both keep, and the weights. Checkpointing halves it (0.50) for more time. Of
  LLaVA-1.5-7B with pruned tokens and batch 8 the weights alone are 0.83 of what DP-SGD holds, so that no method gets
  30 % below it; ours takes 0.90 of it, one by one with checkpointing 0.83. One pass of 8 keeps the keys and values of
  all blocks where zeroth-order keeps nothing: at batch 8 ours is at or below it only one by one with checkpointing (of
  the 7B model 0.99 with all tokens, 0.998 with pruned ones, weights included).
- `dpfpl_round` compares like with like: the DP-FPL paper's formulas, whose epsilon is nominal, on both sides, with
  equal results. A round with *exact record-level DP* is not 25 times cheaper than the paper's with a batch of 8:
  `warm_ratio_exact_dp` says by how much. (At the paper's batch of 32 the image tower costs four times more there.)
- `per_client_vs_flower` is 1.06 by the best of three and 1.11 by the medians: single runs spread by a quarter, so it
  is at its bound of 1.1 rather than safely below. What is left of it: a client's round has nine values to read and
  check where plain Flower has one, and as many small tensor operations.
- Other work ran on the machine beside most of these measurements (not beside `clients`, which took twelve minutes with
  our cohort on Ray among the contestants; without it, as it runs by default now, it should take nine).
- Resident peaks of processes beside `mllm_memory` are left out: they were taken with `getrusage`, in which Linux hands
  a parent's peak on to its child, so all came out alike. The next run takes the program's own.
- A cold cache saves little in its first round: the images have to be encoded once either way.
- On a GPU (`mllm_memory_gpu`) the peaks of the allocator are those that were counted on tensors without values, to
  four digits. There a step with pruned tokens is short and bound by starting kernels: ours, which runs what is in
  front of the prompt in a pass of its own, takes longer than one pass of the whole sequence, and one example at a time
  many times longer. `python -m benchmarks.gpu` did not end within the minutes that a GPU was at hand. So
  the rows of rates and peak memory for the shapes of ViT-B/16 and ViT-L/14, and for several actors on one device, are
  missing.
- `soft_prompt` was measured on the processor of that machine, which was idle: on a busy one, single runs of the same
  two steps spread by half, and their ratio came out between 0.97 and 1.09.
- `train_imports` ≤ 2.5: torch and dp-accounting (with scipy.stats) are all of it, to a tenth of a second. A client
  needs both: it computes rows, and it computes ε before it spends. At commit c984a31 it was 5 CPU seconds, on another
  machine.
- `round_1` ≤ 20 s: 76 CPU seconds on two cores. Three processes import torch, torchvision, open_clip and dp-accounting
  (7 to 8 CPU seconds each), Flower's and Ray's own programs take about 25, and the selection of the start, two scores
  of 40 clients and the round itself are the rest. At commit bffc3d9 it was 44 s in turn with 40 to 43 s. The whole
  demo, whose end no longer waits for Flower and Ray, went from 72 to 63 s.
- Plain Flower on the demo's text tower is not in the default run (`--more`); pfl on that tower is.
"""
"""Written by hand."""

_RULES = """\
Peers take turns in one run, at least three times. A ratio is one of the least CPU seconds of each, of the whole process
tree (daemons included), and only of figures from one run. One torch thread per process. Warm rounds
are dropped. Before a time counts, results are compared (the bound is in each benchmark) and failures must be zero.
Spread is (most − least) / median of the CPU seconds.
"""


def latest(lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the last result line of each benchmark."""
    return {line["benchmark"]: line for line in map(json.loads, filter(str.strip, lines))}


def document(results: Mapping[str, Mapping[str, Any]], not_reached: str = NOT_REACHED) -> str:
    """Return the whole page."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.write_docs` from what `make bench` measured; not by hand.",
        "## Rules\n\n" + _RULES.strip(),
        "## Targets\n\n" + _targets(results),
        "## What was not reached, and why\n\n" + not_reached.strip(),
    ]
    parts += [_section(name, results[name]) for name in (*TARGETS, "mllm_memory_gpu", "gpu") if name in results]
    return "\n\n".join(parts) + "\n"


def _targets(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| benchmark | figure | measured | target | reached |", "|---|---|---|---|---|"]
    for name in (*TARGETS, *(name for name in BESIDE if name not in TARGETS)):
        targets = TARGETS.get(name, {})
        headline = results[name]["headline"] if name in results else {}
        for key, target in targets.items():
            value = headline.get(key)
            shown, verdict = ("not measured", "-") if value is None else (_show(value), _verdict(target, value))
            lines.append(f"| {name} | {target.what} (`{key}`) | {shown} | {target.text} | {verdict} |")
        for key, what in BESIDE.get(name, {}).items():
            if key in headline:
                lines.append(f"| {name} | {what} (`{key}`) | {_show(headline[key])} | - | - |")
    return "\n".join(lines)


def _verdict(target: Target, value: float) -> str:
    return "yes" if target.reached(value) else "**no**"


def _section(name: str, line: Mapping[str, Any]) -> str:
    machine = line["machine"]
    versions = ", ".join(
        f"{k} {v}" for k, v in machine.items() if k not in ("cpu", "cores", "memory_gib", "load", "system")
    )
    table = [
        f"| contestant | CPU-s per {line['unit']}, best | median | spread | wall-s, best | repeats |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {who} | {c['cpu_best']:.4g} | {c['cpu_median']:.4g} | {100 * c['spread']:.0f} % | {c['wall_best']:.4g} "
        f"| {c['repeats']} |"
        for who, c in line["costs"].items()
    ]
    details = [f"- {key}: {_detail(value)}" for key, value in line["details"].items()]
    about = (
        f"{line['time']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, load "
        f"{machine['load']} at the end; {versions}."
    )
    return "\n\n".join([f"## {name}", about, "\n".join(table), "\n".join(details)])


def _detail(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_detail(inner)}" for key, inner in value.items())
    return str(value)


def _show(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    lines = options.results.read_text(encoding="utf-8").splitlines()
    unfinished = options.document.with_name(f".{options.document.name}")
    unfinished.write_text(document(latest(lines)), encoding="utf-8")
    unfinished.replace(options.document)


if __name__ == "__main__":
    main()

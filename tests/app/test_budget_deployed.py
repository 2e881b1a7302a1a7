"""The budget of docs/deploy.md, under each filter, on a real node: it refuses at the right round and says what is left.

A legitimate server asks for runs on the owner's terms until the budget ends. The round that must be refused, and the
number of releases that the rest buys, are computed here from the accountant's functions and not by the filters.
"""

import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.files import read_metadata
from fl_dualpriv.flower.app_bundle import build_bundle, digest_of
from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.node.health import count
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    SampledGaussians,
    composed_epsilon,
    renyi_bound,
    renyi_divergence,
)
from fl_dualpriv.run.file_kinds import PROGRESS, read_totals
from tests.app.run_folders import events_of, lines
from tests.app.test_rogue_server import ROOT, run_config, write_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a process a message, and each imports torch

EPSILON, DELTA, WORST = 8.0, 1e-5, (0.2, 0.8)
"""Of docs/deploy.md: ε, δ, and the owner's largest q and smallest z."""


def budget_table(name: str) -> str:
    """The ``[budget]`` of docs/deploy.md, with another filter in place of ``reserve`` if one is named."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\[budget\].*?(?=^\[)", text, flags=re.DOTALL | re.MULTILINE)
    table, found = re.subn(r'^filter = "reserve"', f'filter = "{name}"', table, flags=re.MULTILINE)
    assert found == 1
    if name != "reserve":
        table, removed = re.subn(r"^(expected-runs|max-run-epsilon) = .*\n", "", table, flags=re.MULTILINE)
        assert removed == 2
    return table


def read_budget() -> dict[str, Any]:
    """The ``[budget]`` of docs/deploy.md, as its numbers."""
    return tomllib.loads(budget_table("reserve"))["budget"]


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where every smaller one does."""
    return next(n for n in itertools.count() if not fits(n + 1))


def epsilon(terms: tuple[float, float], releases: int, delta: float) -> float:
    """PLD ε of releases at q and z."""
    return composed_epsilon((SampledGaussians(*terms, releases),), delta, COARSE_GRID)


@dataclass(kw_only=True)
class Owner:
    """One node with its owner's file and state, and the server that asks it for runs."""

    deployment: Any
    superlink: Any
    app: Path
    root: Path
    images: Path
    clip: Path
    runs: list[Path] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.root / "state"

    def run(self, terms: tuple[float, float], steps: int, rounds: int) -> Path:
        """Ask for a run and wait for its end; its output folder."""
        out = self.root / f"run-{len(self.runs)}"
        self.runs.append(out)
        changes = {
            "rounds": rounds,
            "population": 1,
            "method": "promptfl",
            "train.local-steps": steps,
            "train.sampling-rate": terms[0],
            "privacy.record.noise-multiplier": terms[1],
            "privacy.record.delta": DELTA,
            "privacy.arithmetic": "integer",  # the owner demands it
            "data.partition": "by-node",
            "evaluation.every": 1000,
        }
        self.superlink.submit(self.app, run_config(self.images, self.clip, out, [], **changes))
        ends = [out / "summary.json", out / "error.json"]
        self.deployment.wait_until(lambda: any(end.exists() for end in ends), 300)
        return out

    def ledger(self) -> list[dict[str, Any]]:
        return lines(self.state / "ledger.jsonl")

    def events(self) -> list[tuple[int, int]]:
        """Round and releases of each event."""
        return [(e["server_round"], e["releases"]) for e in events_of(self.state / "ledger.jsonl")]

    def refusals(self) -> list[tuple[str, str]]:
        """The request and the reason of each refusal."""
        file = self.state / "refusals.jsonl"
        return [(line["asked"], line["reason"]) for line in lines(file)] if file.exists() else []

    def files(self) -> dict[str, bytes]:
        """All that the node keeps, but for the notes of refusals."""
        found = [path for path in self.state.rglob("*") if path.is_file() and path.name != "refusals.jsonl"]
        return {str(path.relative_to(self.state)): path.read_bytes() for path in found}

    def balance(self) -> str:
        """The node's health line after its start: rounds, and what is left."""
        return count(read_node_file(self.root / "node.toml"))


@pytest.fixture
def start(deployment: Any, images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Iterator[Callable[[str], Owner]]:
    """Start a SuperLink and a node of docs/deploy.md under a filter; both end with the test."""

    def started(name: str) -> Owner:
        app = write_app(tmp_path / "app", rogue=False)
        node_file = tmp_path / "node.toml"
        folders = f'state-dir = "{tmp_path / "state"}"\ndata-path = "{images}"\n'
        allowed = f'[app]\nallowed = ["{digest_of(build_bundle(app))}"]\n'
        node_file.write_text(f"{folders}\n{budget_table(name)}\n{allowed}", encoding="utf-8")
        superlink = deployment.superlink(f"superlink-{name}")
        deployment.node(f"node-{name}", superlink, node_file, "--health-seconds", "3600")  # it costs a process
        return Owner(
            deployment=deployment, superlink=superlink, app=app, root=tmp_path, images=images, clip=tiny_clip_dir
        )

    yield started
    for program in deployment.programs:
        program.end()
    for program in deployment.programs:
        program.process.wait(timeout=60)
    deployment.programs.clear()


def answered(out: Path) -> list[int]:
    """The failures of each round: 1 where the only client refused and counted as zero."""
    assert not (out / "error.json").exists(), (out / "error.json").read_text()
    return [line["failures"] for line in lines(out / PROGRESS) if line["round"]]


def refused_at_once(owner: Owner, terms: tuple[float, float], steps: int) -> str:
    """Ask for a run of one round that must be refused and must change nothing; the reason."""
    files, before = owner.files(), owner.refusals()
    out = owner.run(terms, steps, 1)
    ((asked, reason),) = owner.refusals()[len(before) :]
    assert asked == "train, round 1"
    assert owner.files() == files
    assert reason in json.loads((out / "error.json").read_text())["message"]  # the server is told the same words
    return reason


def divergence_most(terms: tuple[float, float]) -> tuple[float, float, int]:
    """The order that is the best at the worst terms, its bound, and the most releases at ``terms`` within it."""
    orders = [2 + quarter / 4 for quarter in range(33)]
    order = max(orders, key=lambda a: renyi_bound(EPSILON, DELTA, a) / renyi_divergence(*WORST, a))
    bound = renyi_bound(EPSILON, DELTA, order)
    return order, bound, largest(lambda n: n * renyi_divergence(*terms, order) <= bound)


@pytest.mark.parametrize(
    ("name", "terms", "steps", "rounds"), [("worst-terms", (0.15, 1.0), 4, 4), ("renyi", (0.2, 1.0), 10, 3)]
)
def test_a_node_refuses_the_round_that_its_budget_does_not_cover(
    start: Callable[[str], Owner], name: str, terms: tuple[float, float], steps: int, rounds: int
) -> None:
    order, bound, most = divergence_most(terms)
    if name == "worst-terms":
        most = largest(lambda n: epsilon(WORST, n, DELTA) <= EPSILON)
    paid = most // steps
    rest = most - paid * steps
    assert 0 < paid < rounds
    assert rest > 0
    owner = start(name)
    out = owner.run(terms, steps, rounds)

    # The run goes on to its end; the refused rounds are zeros.
    assert answered(out) == [0] * paid + [1] * (rounds - paid)
    assert read_totals(out)["failures"] == rounds - paid
    assert owner.events() == [(r, steps) for r in range(1, paid + 1)]
    header, *events = owner.ledger()
    expected = {
        "worst-terms": {
            "max-sampling-rate": 0.2,
            "min-noise-multiplier": 0.8,
            "max-correlated-releases": 0,
            "min-correlated-noise-multiplier": 0.0,
        },
        "renyi": {"order": order},
    }[name]
    assert header["header"] == {"filter": name, "epsilon": EPSILON, "delta": DELTA, **expected}
    assert len(events) == paid
    assert read_metadata(owner.state / "prompt.safetensors")["server-round"] == str(paid)

    # Each refusal says what is left, and what that buys.
    cost = renyi_divergence(*terms, order)
    left = {
        "worst-terms": f"{paid * steps} of {most} releases at the worst terms are spent, {rest} are left. The round "
        f"asks for {steps} more",
        "renyi": f"Rényi divergence {paid * steps * cost:.4g} of {bound:.4g} at order {order:g} is spent, "
        f"{bound - paid * steps * cost:.4g} is left. The round, {steps} releases at q = {terms[0]:g} and z = "
        f"{terms[1]:g}, has divergence {steps * cost:.4g}",
    }[name]
    words = (
        f"the budget of this node's data is ε = 8 at δ = 1e-05; {left}. The rest buys {rest} releases at q = "
        f"{terms[0]:g} and z = {terms[1]:g}: the round is refused"
    )
    assert owner.refusals() == [(f"train, round {r}", words) for r in range(paid + 1, rounds + 1)]
    assert owner.balance().startswith(f"{paid} rounds answered; ")
    assert owner.balance().split("; ")[1] in words

    # The rest buys exactly that many releases, of any run.
    assert answered(owner.run(terms, rest, 1)) == [0]
    assert owner.events()[paid:] == [(1, rest)]
    assert len(owner.ledger()) == 1 + paid + 1
    assert len(owner.refusals()) == rounds - paid


def test_a_node_reserves_whole_plans_and_refuses_a_run_that_does_not_fit(start: Callable[[str], Owner]) -> None:
    terms, steps, too_many = (0.2, 1.2), 4, 12
    budget = read_budget()
    runs, most_of_one = budget["expected-runs"], budget["max-run-epsilon"]
    costs = [epsilon(terms, n, DELTA / runs) for n in range(too_many + 1)]
    first = costs[2 * steps]
    # Neither the limit of a run nor what is left admits the second run, and the rest buys less than it asks.
    assert first <= most_of_one
    assert costs[too_many] > max(most_of_one, EPSILON - first)
    rest = max(n for n, cost in enumerate(costs) if cost <= min(most_of_one, EPSILON - first))
    assert 0 < rest < too_many

    owner = start("reserve")
    out = owner.run(terms, steps, 2)
    assert answered(out) == [0, 0]
    header, plan, *events = owner.ledger()
    assert header["header"] == {
        "filter": "reserve",
        "epsilon": EPSILON,
        "delta": DELTA,
        "expected-runs": runs,
        "composition": "sum",
        "delta-prime": 0.0,
    }
    assert {name: plan["plan"][name] for name in ("releases", "sampling_rate", "noise_multiplier")} == {
        "releases": 2 * steps,
        "sampling_rate": terms[0],
        "noise_multiplier": terms[1],
    }
    assert [(e["run"], e["server_round"], e["releases"]) for e in events] == [
        (plan["plan"]["run"], r, steps) for r in (1, 2)
    ]
    assert owner.refusals() == []

    balance = (
        f"ε = {first:.4g} is reserved for 1 of {runs} runs, ε = {EPSILON - first:.4g} and {runs - 1} runs are left"
    )
    assert owner.balance() == f"2 rounds answered; {balance}"
    assert refused_at_once(owner, terms, too_many) == (
        f"the budget of this node's data is ε = 8 at δ = 1e-05, at most ε = {most_of_one:g} a run; {balance}. The "
        f"whole plan of this run, {too_many} releases at q = {terms[0]:g} and z = {terms[1]:g}, costs ε = "
        f"{costs[too_many]:.4g} at δ = {DELTA / runs:.3g} and does not fit. The rest buys {rest} releases at q = "
        f"{terms[0]:g} and z = {terms[1]:g}: the round is refused"
    )

    # A smaller run fits, of exactly the size that the refusal names.
    assert answered(owner.run(terms, rest, 1)) == [0]
    third = owner.ledger()[4:]
    assert [(line.get("plan") or line)["releases"] for line in third] == [rest, rest]
    assert third[0]["plan"]["run"] == third[1]["run"] != plan["plan"]["run"]

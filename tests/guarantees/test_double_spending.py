"""Two processes over one client's folder, a second server, an app installed anew: one budget, spent once."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_dualpriv.client.node import RunContext
from fl_dualpriv.client.state import digest
from fl_dualpriv.files import read_tensors
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import filter_of
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent

STEPS = 2
"""Releases of a round."""

Train = Callable[..., Any]


@pytest.fixture(scope="module")
def run_context(make_run_context: Callable[..., RunContext]) -> RunContext:
    return make_run_context({"method": "full", "prompt.learner": "head"})


Limit = int | str | None
"""Room for so many rounds of any run; or for the whole plan of one run, ``"one run"``; None: no budget."""


def budget_of(run_context: RunContext, limit: Limit) -> Budget | None:
    """Room for so many rounds by the filter of worst terms, which are the plan's, or for one reserved plan."""
    plan = run_context.plan
    assert plan is not None
    if limit is None:
        return None
    choice = FilterChoice(name="reserve" if isinstance(limit, str) else "worst-terms")
    budget = Budget(
        epsilon=1.0,
        delta=plan.delta,
        max_sampling_rate=plan.sampling_rate,
        min_noise_multiplier=plan.noise_multiplier,
        max_clip_norm=10.0,
        trusts_server=False,
        scores=False,
        seeded_noise=False,
        filter=choice,
    )
    if isinstance(limit, str):
        most = ReserveFilter(budget).cost(plan.releases, plan.sampling_rate, plan.noise_multiplier)
    else:
        most = WorstTermsFilter(budget).epsilon(limit * STEPS)
    return replace(budget, epsilon=most)


Released = list[tuple[str, int, str]]
"""Run, round and digest of an upload."""


def side_by_side(asks: list[Callable[[], Released]]) -> Released:
    """Run each in a process of its own, all let go at once; what they say was released."""
    start_read, start_write = os.pipe()
    children = []
    for ask in asks:
        said_read, said_write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(start_write)
                os.read(start_read, 1)  # returns when the parent closes its end
                os.write(said_write, json.dumps(ask()).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(said_write)
        children.append((child, said_read))
    os.close(start_read)
    os.close(start_write)
    released: Released = []
    for child, said in children:
        with os.fdopen(said) as file:
            released += [(token, server_round, content) for token, server_round, content in json.load(file)]
        assert os.waitpid(child, 0)[1] == 0
    return released


def asking(node: Any, tokens: list[str], rounds: range) -> Callable[[], Released]:
    def ask() -> Released:
        answers = [(t, r, node.train(r, t)) for r in rounds for t in tokens]
        return [(t, r, digest(answer.values)) for t, r, answer in answers if answer.partitions]

    return ask


def race(
    tiny_node: Train, run_context: RunContext, folder: Path, budget: Budget | None, tokens: list[list[str]]
) -> None:
    """Let processes ask for rounds at once until nobody gets any; every release has its event, and they fit."""
    plan = run_context.plan
    assert plan is not None
    node = tiny_node(run_context=run_context, folder=folder, budget=budget)
    released = side_by_side([asking(node, mine, range(1, 4)) for mine in tokens])
    content = Ledger(folder / "ledger.jsonl").read()
    assert content.damaged == 0
    paid = [(event.run, event.server_round) for event in content.events]
    # Who asks once more may get what was sent before, bit by bit.
    rounds = [(token, server_round) for token, server_round, _ in set(released)]
    assert len(set(rounds)) == len(rounds), "a round was released twice"
    assert sorted(paid) == sorted(rounds), "events and releases differ"
    if budget is not None:
        assert filter_of(budget).share(content) <= 1, "the owner's budget is spent twice"
    else:
        assert content.releases() <= plan.releases, "the plan is spent twice"


@contextlib.contextmanager
def slow_pen(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Between looking and writing some time goes by: what a lock must stand, and what a race without one needs."""
    record = Ledger.record

    def slowly(self: Ledger, event: LedgerEvent) -> None:
        time.sleep(0.02)
        record(self, event)

    patch.setattr(Ledger, "record", slowly)
    yield


SERVERS = [[["a"], ["b"]], [["same"], ["same"]]]
LIMITS = pytest.mark.parametrize(
    "limit", [None, 1, "one run"], ids=["plan of three rounds", "budget of one round", "budget of one run"]
)


def warm(tiny_node: Train, run_context: RunContext, folder: Path, budget: Budget | None) -> None:
    """The accountant's numbers are kept by this process, for those it forks."""
    node = tiny_node(run_context=run_context, folder=folder, budget=budget)
    for token in ("a", "b"):
        for server_round in (1, 2, 3):
            node.train(server_round, token)


@LIMITS
@pytest.mark.parametrize("tokens", SERVERS, ids=["two servers", "one server twice"])
def test_two_processes_cannot_spend_a_budget_twice(
    tiny_node: Train,
    run_context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: Limit,
    tokens: list[list[str]],
) -> None:
    budget = budget_of(run_context, limit)
    warm(tiny_node, run_context, tmp_path / "warm", budget)
    for attempt in range(3):
        race(tiny_node, run_context, tmp_path / str(attempt), budget, tokens)
    with slow_pen(monkeypatch):
        race(tiny_node, run_context, tmp_path / "slow", budget, tokens)


@LIMITS
@pytest.mark.parametrize("tokens", SERVERS, ids=["two servers", "one server twice"])
def test_without_the_lock_it_is_spent_twice(
    tiny_node: Train,
    run_context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: Limit,
    tokens: list[list[str]],
) -> None:
    """Broken on purpose: the property above notices."""
    budget = budget_of(run_context, limit)
    warm(tiny_node, run_context, tmp_path / "warm", budget)
    monkeypatch.setattr(Ledger, "exclusive", lambda self: contextlib.nullcontext())

    def races() -> None:
        for attempt in range(20):
            race(tiny_node, run_context, tmp_path / str(attempt), budget, tokens)

    with slow_pen(monkeypatch), pytest.raises(AssertionError, match=r"twice|differ"):
        races()


def test_eight_processes_write_each_line_whole(tmp_path: Path) -> None:
    """Also who asks for no lock, as the server of a run, tears no line of another."""
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def write(who: str) -> Released:
        for server_round in range(1, 26):
            ledger.record(
                LedgerEvent(
                    run=who * 300,
                    unit="client",
                    server_round=server_round,
                    releases=1,
                    sampling_rate=0.5,
                    noise_multiplier=1.0,
                )
            )
        return []

    side_by_side([lambda who=who: write(who) for who in "abcdefgh"])
    content = ledger.read()
    assert content.damaged == 0
    for who in "abcdefgh":
        assert [event.server_round for event in content.events if event.run == who * 300] == list(range(1, 26))


# --- one after the other ----------------------------------------------------------------------------------------------


@LIMITS
@pytest.mark.parametrize("trick", ["second server", "app installed anew", "both", "restart"])
def test_nothing_a_server_can_do_resets_the_budget(
    tiny_node: Train, run_context: RunContext, tmp_path: Path, limit: Limit, trick: str
) -> None:
    """Only who can write to the owner's disk could: the ledger is a file there."""
    budget = budget_of(run_context, limit)
    folder, left = tmp_path / "state", limit if isinstance(limit, int) else 3
    for server_round in range(1, left + 1):
        node = tiny_node(run_context=run_context, folder=folder, budget=budget)  # each a process that knows nothing
        assert node.train(server_round).partitions == (0,)
    before = Ledger(folder / "ledger.jsonl").path.read_bytes()
    if trick in ("app installed anew", "both"):
        (folder / "prompt.safetensors").unlink()
        (folder / "ledger.lock").unlink()
    token = "another" if trick in ("second server", "both") else "t"
    for server_round in range(1, 5):
        node = tiny_node(run_context=run_context, folder=folder, budget=budget)
        found = node.train(
            server_round, token, torch.ones(run_context.prompt_shape)
        )  # the same would get the same again
        assert found.partitions == ()
        assert "refused" in found.failed[0]
    assert Ledger(folder / "ledger.jsonl").path.read_bytes() == before
    refusals = [json.loads(line) for line in (folder / "refusals.jsonl").read_text().splitlines()]
    assert [line["asked"] for line in refusals] == [f"train, round {r}" for r in (1, 2, 3, 4)]
    assert {line["run"] for line in refusals} == {token}


def test_a_new_run_gets_a_new_prompt_and_what_is_left_of_the_old_budget(
    tiny_node: Train, run_context: RunContext, tmp_path: Path
) -> None:
    budget = budget_of(run_context, 3)
    node = tiny_node(run_context=run_context, folder=tmp_path, budget=budget)
    done = [(token, r) for token in ("first", "second") for r in (1, 2) if node.train(r, token).partitions]
    assert done == [("first", 1), ("first", 2), ("second", 1)]
    metadata = read_tensors(tmp_path / "prompt.safetensors")[1]
    assert (metadata["run-token"], metadata["server-round"]) == ("second", "1")


def test_under_reserve_a_second_run_that_does_not_fit_gets_nothing(
    tiny_node: Train, run_context: RunContext, tmp_path: Path
) -> None:
    """The first run may stop after one round: its whole plan is spent."""
    node = tiny_node(run_context=run_context, folder=tmp_path, budget=budget_of(run_context, "one run"))
    done = [(token, r) for token, r in (("first", 1), ("second", 1), ("first", 2)) if node.train(r, token).partitions]
    assert done == [("first", 1), ("first", 2)]
    assert [plan.run for plan in Ledger(tmp_path / "ledger.jsonl").read().plans] == ["first"]

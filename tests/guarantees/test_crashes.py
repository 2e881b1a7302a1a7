"""kill -9, or a power cut, at any point of a client's round: no release without its event, and none is made twice.

A forked process plays real rounds and kills itself at its k-th point: a call that changes the disk (a write also half
done), a draw of noise, the moment before the reply, or any line of our own code. What it was about to draw and to hand
out it notes first, in a file of its own. The process that restarts and is asked for everything again is this one.
"""

import functools
import os
import random
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fl_dualpriv.client.round
from fl_dualpriv import messages
from fl_dualpriv.client.node import RunContext
from fl_dualpriv.client.state import digest
from fl_dualpriv.privacy import ledger as ledger_module
from fl_dualpriv.privacy import release
from fl_dualpriv.privacy.accounting import COARSE_GRID, epsilon
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to learn what was synced")
STEPS = 2
"""Releases of a client's round."""

Notes = list[dict[str, Any]]
Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def client(
    arithmetic: str,
    make_run_context: Callable[..., RunContext],
    tiny_node: Callable[..., Any],
    in_a_process: Callable[..., Notes],
    tmp_path: Path,
) -> "Client":
    # The head needs no text tower: more crashes in the same time.
    run_context = make_run_context({"privacy.arithmetic": arithmetic, "method": "full", "prompt.learner": "head"})
    return Client(tmp_path, functools.partial(tiny_node, run_context=run_context), in_a_process)


class Client:
    """Plays, crashes, restarts and judges rounds of one client, each time in a fresh folder.

    Args:
        tmp_path: Room.
        node: Makes the node over a folder.
        in_a_process: Plays in a process that dies.
    """

    budget: Budget | None = None

    def __init__(self, tmp_path: Path, node: Callable[..., Any], in_a_process: Callable[..., Notes]) -> None:
        self._tmp_path, self._node, self._in_a_process = tmp_path, node, in_a_process
        self._tries = 0

    def fresh(self) -> None:
        self._tries += 1
        self.root = self._tmp_path / str(self._tries)
        self.root.mkdir()
        self.notes_file = self._tmp_path / f"{self._tries}.notes"
        self.node = self._node(folder=self.root / "owner" / "state", budget=self.budget)

    def play(self, tracer: Any) -> None:
        """What one server asks for: two of its three rounds."""
        for server_round in (1, 2):
            tracer.doing = ("t", server_round)
            if (answer := self.node.train(server_round)).partitions:
                tracer.note(released=(*tracer.doing, digest(answer.values)))
            tracer.point()

    def points(self, *, lines: bool = False, mutate: Mutation | None = None) -> int:
        self.fresh()
        notes = self._in_a_process(self.notes_file, self.root, self.play, lines=lines, mutate=mutate)
        assert sum("released" in note for note in notes) == 2
        assert sum("drawn" in note for note in notes) == 2 * STEPS
        return notes[-1]["points"]

    def crash(self, *fatal: int, lines: bool = False, mutate: Mutation | None = None) -> Notes:
        """Kill it at the first point; start it again, kill it at the second; and so on."""
        self.fresh()
        notes: Notes = []
        for kill_at in fatal:
            notes = self._in_a_process(self.notes_file, self.root, self.play, kill_at, lines, mutate)
        return notes

    def judge(self, notes: Notes, mutate: Mutation | None = None) -> None:
        """After a crash: every release has its event; then restart, ask again for everything, and count."""
        made = [tuple(note["drawn"]) for note in notes if "drawn" in note]
        handed_out = [tuple(note["released"]) for note in notes if "released" in note]
        draws: list[int] = []
        ledger = Ledger(self.root / "owner" / "state" / "ledger.jsonl")
        self._check_events(ledger, made)
        assert len({upload[:2] for upload in handed_out}) == len(set(handed_out))  # one upload of a round
        with pytest.MonkeyPatch.context() as patch:
            for name in ("gaussian_noise", "rounded_gaussian"):
                patch.setattr(release, name, counting(getattr(release, name), draws))
            if mutate is not None:
                mutate(patch)
            for token in ("t", "second server"):
                for server_round in (1, 2, 3, 4):
                    draws.clear()
                    answered = self.node.train(server_round, token).partitions
                    if draws:
                        assert (token, server_round) not in made, "a second release of the same round"
                        made += [(token, server_round)] * len(draws)
                    elif answered:  # what was sent, or was about to be
                        assert made.count((token, server_round)) == STEPS
        self._check_events(ledger, made)
        content, plan = ledger.read(), self.node.run_context.plan
        assert len(made) <= sum(event.releases for event in content.events) <= plan.releases
        if self.budget is not None:
            assert content.epsilon(self.budget.delta) <= self.budget.epsilon

    def _check_events(self, ledger: Ledger, made: list[tuple[str, int]]) -> None:
        for event in (content := ledger.read()).events:
            assert made.count((event.run, event.server_round)) <= event.releases
        paid = {(event.run, event.server_round) for event in content.events}
        assert set(made) <= paid, "a release without its event"


def counting(draw: Callable[..., Any], draws: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        draws.append(1)
        return draw(*arguments)

    return counted


def some(points: int, count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(1, points + 1), min(count, points)))


MANY = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("arithmetic", "step"),
    [("float", 9), pytest.param("float", 1, marks=MANY), pytest.param("integer", 1, marks=MANY)],
)
def test_a_client_killed_at_any_change_of_the_disk_and_any_draw(client: Client, step: int) -> None:
    points = client.points()
    assert points >= 40
    # The second round repeats the first, in files that are there.
    first = range(1, points // 2 + 1, -(-step // 3))
    for k in [*first, *range(points // 2 + 1, points + 1, step)]:
        client.judge(client.crash(k))


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("count", [8, pytest.param(300, marks=MANY)])
def test_a_client_killed_at_any_line_of_ours(client: Client, count: int) -> None:
    points = client.points(lines=True)
    for k in some(points, count):
        client.judge(client.crash(k, lines=True))


@pytest.mark.parametrize("arithmetic", ["float"])
@pytest.mark.parametrize("count", [7, pytest.param(10**9, marks=MANY)])
@pytest.mark.parametrize("after", [(), (0,)], ids=["power cut", "killed, restarted, power cut"])
def test_a_power_cut_leaves_no_release_without_its_event(
    client: Client, lose_power: Callable[..., None], after: tuple[int, ...], count: int
) -> None:
    """What was not synced is gone, also where an earlier process had left it without syncing it."""
    points = client.points()
    # A restart matters most where the first event is half done.
    for k in some(points if not after else points // 2, count):
        notes = client.crash(k, *after)
        lose_power(client.root, notes, keep_prompts=k % 2 == 0)
        client.judge(notes)


@pytest.mark.parametrize("arithmetic", ["float"])
def test_crashes_do_not_stretch_the_owners_budget(client: Client) -> None:
    client.fresh()
    plan = client.node.run_context.plan
    two_rounds = epsilon(plan.sampling_rate, plan.noise_multiplier, 2 * STEPS, plan.delta, COARSE_GRID)
    client.budget = Budget(
        epsilon=two_rounds,
        delta=plan.delta,
        max_sampling_rate=plan.sampling_rate,
        min_noise_multiplier=plan.noise_multiplier,
        max_clip_norm=10.0,
        trusts_server=False,
        scores=False,
        seeded_noise=False,
        filter=FilterChoice(name="worst-terms", max_round_releases=STEPS),
    )
    client.fresh()  # now with the budget
    for token in ("t", "second server"):  # the accountant's numbers are kept by this process, for those it forks
        client.node.train(1, token)
    client.node.train(2)
    for pair in zip(some(client.points(), 6), reversed(some(client.points() // 4, 6)), strict=True):
        client.judge(client.crash(*pair))


# --- broken on purpose ------------------------------------------------------------------------------------------------


def event_after_release(patch: pytest.MonkeyPatch) -> None:
    """The ledger is written when the state is kept."""
    record, finish = Ledger.record, fl_dualpriv.client.round.TrainRound._finish
    waiting: list[tuple[Ledger, LedgerEvent]] = []

    def late(self: Any, *arguments: Any) -> None:
        finish(self, *arguments)
        while waiting:
            record(*waiting.pop())

    patch.setattr(Ledger, "record", lambda self, event: waiting.append((self, event)))
    patch.setattr(fl_dualpriv.client.round.TrainRound, "_finish", late)


def event_is_a_buffer(patch: pytest.MonkeyPatch) -> None:
    """The ledger is kept in memory and written at the end of a round: killed in between, it is lost."""
    record, run = Ledger.record, fl_dualpriv.client.round.TrainRound.run
    waiting: list[tuple[Ledger, LedgerEvent]] = []

    def flushing(self: Any) -> messages.Uploads:
        uploads = run(self)
        while waiting:
            record(*waiting.pop())
        return uploads

    patch.setattr(Ledger, "record", lambda self, event: waiting.append((self, event)))
    patch.setattr(fl_dualpriv.client.round.TrainRound, "run", flushing)


def rounds_are_not_remembered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fl_dualpriv.client.round, "check_round", lambda *arguments: None)


def the_file_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    patch.setattr(os, "fsync", lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode) and fsync(handle))


def the_names_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger_module, "_sync_names", lambda folder: None)


@pytest.mark.parametrize("arithmetic", ["float"])
@pytest.mark.parametrize(
    ("mutate", "power_cut"),
    [
        (event_after_release, False),
        (event_is_a_buffer, False),
        (rounds_are_not_remembered, False),
        (the_file_is_not_synced, True),
        (the_names_are_not_synced, True),
    ],
)
def test_the_property_catches_what_is_broken_on_purpose(
    client: Client, lose_power: Callable[..., None], mutate: Mutation, power_cut: bool
) -> None:
    caught = 0
    for k in some(client.points(mutate=mutate), 25):
        notes = client.crash(k, mutate=mutate)
        if power_cut:
            lose_power(client.root, notes, keep_prompts=False)
        try:
            client.judge(notes, mutate)
        except AssertionError as error:
            assert "of the same round" in str(error) or "without its event" in str(error)  # noqa: PT017
            caught += 1
        if caught == 2:
            return
    pytest.fail(f"caught {caught} times")

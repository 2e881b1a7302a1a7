"""A lifetime budget against adversaries who choose terms after seeing losses, on the real filters and ledger."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import SampledGaussians, composed_epsilon, renyi_divergence
from fl_dualpriv.privacy.filters.base import PrivacyFilter
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import filter_of, spend_budget
from fl_dualpriv.privacy.filters.renyi import RenyiFilter
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent, ReservedPlan
from tests.guarantees.adaptive_attack import Grid, State, Strategy, action_losses, after_action

BUDGET = Budget(
    epsilon=8.0,
    delta=1e-5,
    max_sampling_rate=0.2,
    min_noise_multiplier=0.8,
    max_clip_norm=1.0,
    trusts_server=False,
    scores=False,
    seeded_noise=False,
)
"""Of docs/deploy.md."""

NOTHING = LedgerContent(events=(), damaged=0)
Terms = tuple[float, float, int]
"""q, z and releases of one action."""

DEPLOYED = ((0.2, 0.8, 1), (0.2, 3.0, 40))
"""One loud step, or forty quiet ones: composed along the path, these pass δ(8) = 1e-5."""

GAMBLE = ((0.02, 0.25, 1), (0.9999999, 4.0, 1))
"""A release that shows one record in fifty, or a Gaussian one: the worst found for ε = 1, δ = 0.05."""

FINE = Grid(step=0.01, low=-20.0, high=30.0)
SMALL = Grid(step=0.01, low=-6.0, high=8.0)


@dataclass(frozen=True)
class Game:
    """A filter and the actions that a server has against it.

    Attributes:
        chosen: The filter under attack, with the owner's budget.
        terms: Of the actions.
        grid: Of losses.
    """

    chosen: PrivacyFilter
    terms: tuple[Terms, ...]
    grid: Grid

    @property
    def budget(self) -> Budget:
        """(ε, δ) is its claim."""
        assert isinstance(self.chosen, ReserveFilter | RenyiFilter | WorstTermsFilter)
        return self.chosen.budget


def game(choice: FilterChoice, terms: tuple[Terms, ...], epsilon: float, delta: float) -> Game:
    """An owner who allows all the terms."""
    own = replace(
        BUDGET,
        epsilon=epsilon,
        delta=delta,
        max_sampling_rate=max(q for q, _, _ in terms),
        min_noise_multiplier=min(z for _, z, _ in terms),
        filter=choice,
    )
    kinds = {"reserve": ReserveFilter, "renyi": RenyiFilter, "worst-terms": WorstTermsFilter}
    return Game(kinds[choice.name](own), terms, SMALL if epsilon == 1.0 else FINE)


def games() -> list[Game]:
    """Each filter at both budgets, with actions of which it admits some."""
    small = functools.partial(game, epsilon=1.0, delta=0.05)
    deployed = functools.partial(game, epsilon=8.0, delta=1e-5)
    return [
        small(FilterChoice(expected_runs=4), GAMBLE),
        small(
            FilterChoice(expected_runs=4, composition="advanced", delta_prime=0.0125),
            ((0.005, 0.25, 1), (0.9999999, 8.0, 1)),
        ),
        small(FilterChoice(name="renyi", expected_sampling_rate=1.0, expected_noise_multiplier=4.0), GAMBLE),
        small(FilterChoice(name="worst-terms"), ((0.2, 0.8, 1), (0.1, 2.0, 2))),
        deployed(FilterChoice(expected_runs=10), DEPLOYED),
        deployed(
            FilterChoice(expected_runs=10, composition="advanced", delta_prime=1e-6),
            ((0.05, 2.0, 2), (0.02, 3.0, 10)),
        ),
        deployed(FilterChoice(name="renyi", expected_sampling_rate=0.2, expected_noise_multiplier=3.0), DEPLOYED),
        deployed(FilterChoice(name="worst-terms"), ((0.2, 0.8, 1), (0.1, 1.0, 2))),
    ]


# --- the game ---------------------------------------------------------------------------------------------------------


def _runs(index: int, terms: Terms, taken: int, actions_a_run: int) -> tuple[list[ReservedPlan], list[LedgerEvent]]:
    """The lines that an action has left when it was taken so often; each run's plan holds ``actions_a_run`` of it."""
    q, z, releases = terms
    plans = [
        ReservedPlan(run=f"{index}-{run}", releases=releases * actions_a_run, sampling_rate=q, noise_multiplier=z)
        for run in range(math.ceil(taken / actions_a_run))
    ]
    events = [
        LedgerEvent(
            run=f"{index}-{i // actions_a_run}",
            unit="record",
            server_round=i % actions_a_run + 1,
            releases=releases,
            sampling_rate=q,
            noise_multiplier=z,
        )
        for i in range(taken)
    ]
    return plans, events


def admits(chosen: PrivacyFilter, terms: tuple[Terms, ...], actions_a_run: tuple[int, ...]) -> Callable[..., bool]:
    """Whether the real filter admits one more action; its run may have been begun before, and others be open."""

    def ask(state: State, index: int) -> bool:
        made = NOTHING
        for place, taken in enumerate(state):
            plans, events = _runs(place, terms[place], taken, actions_a_run[place])
            reserved = made.plans + tuple(plans) if isinstance(chosen, ReserveFilter) else ()
            made = replace(made, events=(*made.events, *events), plans=reserved)
        plans, events = _runs(index, terms[index], state[index] + 1, actions_a_run[index])
        try:
            chosen.check(made, plans[-1], events[-1])
        except PrivacyError:
            return False
        return True

    return ask


def attack(against: Game, *, removed: bool = True, actions_a_run: tuple[int, ...] | None = None) -> Strategy:
    """The best strategy against a filter. By default each action is a run of its own."""
    actions = [action_losses(q, z, n, against.grid, removed=removed) for q, z, n in against.terms]
    asked = admits(against.chosen, against.terms, actions_a_run or (1,) * len(actions))
    return Strategy(actions, asked, against.budget.epsilon, against.grid)


def _check_value(against: Game, strategy: Strategy) -> None:
    claim, budget, won = against.chosen.claim(), against.budget, strategy.value()
    assert won <= budget.delta, (
        f"{claim}: δ({budget.epsilon:g}) is at least {won:.3g}, and the budget says {budget.delta:g}"
    )
    assert any(strategy.admits(strategy.start, index) for index in range(len(against.terms))), f"{claim}: no game"


def no_adaptive_server_passes_delta() -> None:
    """Exact on the grid: a filter that is proved for (ε, δ) cannot be beaten, whatever the server chooses and when."""
    for against in games():
        for removed in (True, False):
            _check_value(against, attack(against, removed=removed))


def small_games_stay_within_delta() -> None:
    """`no_adaptive_server_passes_delta` for the games at ε = 1 and the removal of the record: a second."""
    for against in games():
        if against.budget.epsilon == 1.0:
            _check_value(against, attack(against))


def two_servers_that_alternate_do_not_pass_delta() -> None:
    """Both have a run open on one ledger, and in each turn the one goes on that the loss so far suggests."""
    for against in games():
        first, (q, z, releases) = against.terms
        shorter = replace(against, terms=(first, (q, z, max(1, releases // 4))))
        _check_value(shorter, attack(shorter, actions_a_run=(2, 4)))


def rare_disasters_do_not_pass_delta() -> None:
    """Runs that show the record with probability δ, or δ over the number of runs, and cost no ε at that δ.

    A tenth of δ a run is δ for ten; δ a run would be ten times as much.
    """
    delta, terms = 1e-5, ((0.9e-6, 0.1, 1), (0.9e-5, 0.1, 1))
    for choice in (
        FilterChoice(expected_runs=10),
        FilterChoice(expected_runs=10, composition="advanced", delta_prime=1e-7),
    ):
        against = replace(game(choice, terms, 8.0, delta), grid=replace(FINE, step=0.05, high=40.0))
        _check_value(against, attack(against))


def monte_carlo(against: Game, plays: int = 400_000, seed: int = 0) -> tuple[float, float]:
    """Play the best strategy with real noise, record in and out.

    Returns:
        P[guess "in" | in] − e^ε P[guess "in" | out], and its standard error.
    """
    strategy, epsilon = attack(against), against.budget.epsilon
    rng, losses = np.random.default_rng(seed), against.grid.losses
    shares = []
    for there in (True, False):
        loss = np.zeros(plays)
        waiting: dict[State, np.ndarray] = {strategy.start: np.arange(plays)}
        while waiting:
            state, players = waiting.popitem()
            places = np.clip(np.searchsorted(losses, loss[players], side="right") - 1, 0, None)
            choices = strategy.solve(state)[1][places]
            for index, (q, z, releases) in enumerate(against.terms):
                going = players[choices == index]
                if len(going):
                    present = there * (rng.random((len(going), releases)) < q)
                    x = present + z * rng.standard_normal((len(going), releases))
                    loss[going] += np.log1p(q * np.expm1((2 * x - 1) / (2 * z * z))).sum(axis=1)
                    after = after_action(state, index)
                    waiting[after] = np.concatenate([waiting[after], going]) if after in waiting else going
        shares.append(float((loss > epsilon).mean()))
    inside, outside = shares
    variance = inside * (1 - inside) + math.exp(2 * epsilon) * outside * (1 - outside)
    return inside - math.exp(epsilon) * outside, math.sqrt(variance / plays)


def played_games_stay_within_delta() -> None:
    """A filter that holds loses at most 0.05; four standard errors above it refute it."""
    for against in games():
        if against.budget.epsilon == 1.0:
            won, error = monte_carlo(against)
            assert won <= 0.05 + 4 * error, f"{against.chosen.claim()}: won {won:.4f} ± {error:.4f} of at most 0.05"


# --- rules that the game does not show --------------------------------------------------------------------------------


def event(releases: int, q: float = 0.2, z: float = 0.8, run: str = "a", server_round: int = 1) -> LedgerEvent:
    """A round of a run."""
    return LedgerEvent(
        run=run, unit="record", server_round=server_round, releases=releases, sampling_rate=q, noise_multiplier=z
    )


def plan(releases: int, q: float = 0.2, z: float = 0.8, run: str = "a") -> ReservedPlan:
    """The plan of a run."""
    return ReservedPlan(run=run, releases=releases, sampling_rate=q, noise_multiplier=z)


def a_reserved_plan_is_never_refunded(folder: Path) -> None:
    """A run takes all of the budget and stops after one step: nothing is left for another."""
    ledger, chosen, quiet = Ledger(folder / "ledger.jsonl"), ReserveFilter(BUDGET), (0.2, 3.0)
    most = chosen.affordable(NOTHING, *quiet)
    spend_budget(ledger, BUDGET, plan(most, *quiet), event(1, *quiet))
    made = ledger.read()
    assert made.plans == (plan(most, *quiet),)
    assert made.releases() == 1 < most
    second = functools.partial(spend_budget, ledger, BUDGET, plan(1, *quiet, "b"), event(1, *quiet, "b"))
    assert _is_refused(second), "what the first run left of its plan was given to a second"
    spend_budget(ledger, BUDGET, plan(most, *quiet), event(1, *quiet, server_round=2))


def what_runs_may_show_and_the_composition_stay_within_delta() -> None:
    """Under advanced composition δ′ is a part of δ: ten runs that show a record at rate q need 10 q + δ′ ≤ δ."""
    q = 0.09 * BUDGET.delta
    choice = FilterChoice(expected_runs=10, composition="advanced", delta_prime=BUDGET.delta / 2)
    chosen = ReserveFilter(replace(BUDGET, min_noise_multiplier=0.05, filter=choice))
    admitted = admits(chosen, ((q, 0.05, 1),), (1,))((9,), 0)
    assert not admitted or 10 * q + choice.delta_prime <= BUDGET.delta, "δ′ was not set aside"
    smaller = 0.9 * (BUDGET.delta - choice.delta_prime) / 10
    assert admits(chosen, ((smaller, 0.05, 1),), (1,))((9,), 0)


def all_divergences_are_bounded_at_the_order_of_the_owners_file(folder: Path) -> None:
    """The owner expects loud runs, and quiet ones come, for which a higher order would admit more."""
    own = replace(BUDGET, filter=FilterChoice(name="renyi", expected_sampling_rate=0.2, expected_noise_multiplier=0.8))
    ledger, fixed = Ledger(folder / "ledger.jsonl"), RenyiFilter(own)
    order, bound = fixed.order, fixed.bound
    for run in range(200):
        q, z, releases = DEPLOYED[1]
        if _is_refused(
            functools.partial(
                spend_budget, ledger, own, plan(releases, q, z, str(run)), event(releases, q, z, str(run))
            )
        ):
            break
    made = ledger.read()
    assert made.events
    total = sum(e.releases * renyi_divergence(e.sampling_rate, e.noise_multiplier, order) for e in made.events)
    assert total <= bound, f"divergence {total:.4g} at the fixed order {order:g}, at most {bound:.4g}"


def all_releases_fit_at_the_worst_terms(folder: Path) -> None:
    """Quiet rounds only, until nothing more is admitted: as many loud ones have an ε within the budget."""
    own = replace(BUDGET, filter=FilterChoice(name="worst-terms"))
    ledger = Ledger(folder / "ledger.jsonl")
    for run in range(100):
        quiet = (3, 0.05, 3.0, str(run))
        if _is_refused(functools.partial(spend_budget, ledger, own, plan(*quiet), event(*quiet))):
            break
    made = ledger.read().releases()
    assert made
    spent = composed_epsilon((SampledGaussians(0.2, 0.8, made),), own.delta)
    assert spent <= own.epsilon, (
        f"{made} releases are ε = {spent:.4g} at the worst terms, and the budget {own.epsilon:g}"
    )


def a_damaged_line_is_charged_at_the_worst(folder: Path) -> None:
    """Under each filter a ledger with a damaged line admits what is left beside its worst reading, or nothing."""
    for choice, worst in (
        (FilterChoice(name="worst-terms", max_round_releases=5), (5, 0.2, 0.8)),
        (FilterChoice(name="renyi", max_round_releases=2), (2, 0.2, 0.8)),
        (FilterChoice(name="reserve", max_run_epsilon=4.5), (1, 0.2, 0.8)),  # ε = 4.28 at δ / 10
        (FilterChoice(name="reserve"), None),
    ):
        own = replace(BUDGET, filter=choice)
        ledger = Ledger(folder / f"{choice.name}-{choice.max_run_epsilon}.jsonl")
        chosen = filter_of(own)
        before = chosen.affordable(NOTHING, 0.2, 0.8)
        with ledger.path.open("a") as file:
            file.write('{"time": "2026-1\n')
        left = chosen.affordable(ledger.read(), 0.2, 0.8)
        if worst is None:
            assert left == 0, f"{choice.name}: a ledger with a damaged line is not closed"
            assert _is_refused(functools.partial(spend_budget, ledger, own, plan(1), event(1)))
        else:
            assert left < before, f"{choice.name}: a damaged line is free"
            clean = replace(NOTHING, events=(event(worst[0], run="lost"),))
            assert left <= chosen.affordable(clean, 0.2, 0.8), f"{choice.name}: a damaged line costs too little"


def the_numbers_of_a_filter_come_from_the_owners_file(folder: Path) -> None:
    """A ledger whose header says another order, ε, or number of runs admits nothing."""
    for choice, key, value in (
        (FilterChoice(name="renyi"), "order", 3.25),
        (FilterChoice(name="renyi"), "epsilon", 80.0),
        (FilterChoice(name="reserve"), "expected-runs", 1),
        (FilterChoice(name="reserve"), "filter", "worst-terms"),
        (FilterChoice(name="worst-terms"), "min-noise-multiplier", 2.0),
    ):
        own = replace(BUDGET, filter=choice)
        path = folder / f"{choice.name}-{key}.jsonl"
        spend_budget(Ledger(path), own, plan(1), event(1))
        (header,) = Ledger(path).read().headers
        other = Ledger(folder / f"other-{path.name}")
        other.begin({**header, key: value})
        assert _is_refused(functools.partial(spend_budget, other, own, plan(1), event(1))), (
            f"{key} = {value!r} was believed"
        )


def the_header_is_on_disk_before_the_first_event(folder: Path) -> None:
    """Each line is synced by itself: header, then plan, then event."""
    ledger = Ledger(folder / "ledger.jsonl")
    synced: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        sync = os.fsync

        def noted(handle: int) -> None:
            sync(handle)
            lines = ledger.path.read_text().splitlines() if ledger.path.exists() else []
            # The name of the file is synced before its first line, and by other handles.
            if lines and os.fstat(handle).st_ino == ledger.path.stat().st_ino:
                synced.append([_kind(line) for line in lines])

        patch.setattr(os, "fsync", noted)
        spend_budget(ledger, BUDGET, plan(2), event(1))
    assert synced == [["header"], ["header", "plan"], ["header", "plan", "event"]], synced


def _kind(line: str) -> str:
    return next((kind for kind in ("header", "plan") if f'"{kind}"' in line), "event")


def _is_refused(call: Callable[[], None]) -> bool:
    try:
        call()
    except PrivacyError:
        return True
    return False

"""Pure DP beside Gaussian releases, events and plans of a selected start, and how filters charge them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.node.lifetime import lifetime_of
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    SampledGaussians,
    composed_epsilon,
    mixed_epsilon,
    multiplier_of_pure,
    pure_renyi_divergence,
)
from fl_dualpriv.privacy.calibration import calibrate_beside
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import spend_budget
from fl_dualpriv.privacy.filters.pay import check_single_run
from fl_dualpriv.privacy.filters.renyi import RenyiFilter
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent, ReservedPlan
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.selection import Selection, choice, largest_entry, vote_sum

DELTA = 1e-4
STEPS = SampledGaussians(0.1, 1.0, 10)
VOTE = Selection(form="federated", noise_multiplier=3.0)
STEP = LedgerEvent(run="a", unit="record", server_round=1, releases=2, sampling_rate=0.1, noise_multiplier=1.0)


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.5, 1.0, 4.0, 30.0, 1000.0])
def test_the_gaussian_of_a_pure_release_dominates_it(epsilon: float) -> None:
    mu = 1 / multiplier_of_pure(epsilon)
    assert 0 < mu < math.inf
    for x in np.linspace(0, min(epsilon, 100.0), 21):
        of_pure = -math.expm1(x - epsilon) / (1 + math.exp(-epsilon))  # of randomised response
        of_gaussian = norm.cdf(mu / 2 - x / mu) - math.exp(x) * norm.cdf(-mu / 2 - x / mu)
        assert of_gaussian >= of_pure - 1e-12
    if epsilon == 1.0:
        assert mu == pytest.approx(2 * norm.ppf(math.e / (1 + math.e)))


def test_mixed_releases_cost_more_than_each_and_at_most_the_sum() -> None:
    steps = composed_epsilon((STEPS,), DELTA)
    for pure in ((0.5,), (0.2, 0.3), (2.0,)):
        both = mixed_epsilon((STEPS,), pure, DELTA)
        assert max(steps, sum(pure)) < both < steps + sum(pure)
    assert mixed_epsilon((STEPS,), (), DELTA) == steps
    assert mixed_epsilon((), (0.5, 0.25), DELTA) == 0.75
    assert mixed_epsilon((STEPS,), (60.0,), DELTA) == steps + 60  # no PLD: e^60 has no digits left for δ
    gaussian = mixed_epsilon((STEPS, SampledGaussians(1.0, multiplier_of_pure(0.5), 1)), (), DELTA)
    assert mixed_epsilon((STEPS,), (0.5,), DELTA) < gaussian


def test_the_renyi_divergence_of_pure_dp_is_that_of_randomised_response() -> None:
    p = math.exp(0.7) / (1 + math.exp(0.7))
    by_hand = math.log(p**3 * (1 - p) ** -2 + (1 - p) ** 3 * p**-2) / 2
    assert pure_renyi_divergence(0.7, 3.0) == pytest.approx(by_hand, rel=1e-8)
    assert by_hand <= pure_renyi_divergence(0.7, 3.0) <= min(0.7, 3 * 0.7**2 / 2)
    assert pure_renyi_divergence(800.0, 64.0) == pytest.approx(800, rel=1e-3)


@pytest.mark.parametrize(("others", "pure"), [((SampledGaussians(1.0, 3.0, 1),), ()), ((), (0.5,))])
def test_steps_are_calibrated_beside_a_selection(others: tuple[SampledGaussians, ...], pure: tuple[float, ...]) -> None:
    noise = calibrate_beside(2.0, DELTA, 0.1, 20, others, pure)
    both = mixed_epsilon((SampledGaussians(0.1, noise, 20), *others), pure, DELTA)
    assert 0.99 * 2 <= both <= 2
    with pytest.raises(PrivacyError, match="leaves nothing for 20 releases"):
        calibrate_beside(0.4, DELTA, 0.1, 20, others, pure)


# --- ledger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [VOTE, choice(0.5)], ids=["vote", "choice"])
def test_a_selection_is_a_line_of_the_ledger(selection: Selection, tmp_path: Path) -> None:
    ledger, event = Ledger(tmp_path / "ledger.jsonl"), selection.event("a")
    ledger.record(event)
    ledger.record(STEP)
    made = ledger.read()
    assert made.events == (event, STEP)
    assert (made.selections(), made.selections("a"), made.selections("b")) == ((event,), (event,), ())
    assert (made.releases(), made.steps(), made.steps("a"), made.last_round("a")) == (3, 2, 2, 1)
    together = mixed_epsilon((SampledGaussians(0.1, 1.0, 2), *selection.charges), selection.pure, DELTA)
    assert made.epsilon(DELTA) == pytest.approx(together)
    first, second = (json.loads(line) for line in ledger.path.read_text().splitlines())
    assert ("kind" in first) == ("pure_epsilon" in first) == bool(selection.pure_epsilon)
    assert not {"kind", "pure_epsilon"} & second.keys()


@pytest.mark.parametrize(
    "unsound",
    [
        replace(VOTE.event("a"), releases=2),
        replace(VOTE.event("a"), sampling_rate=0.5),
        replace(VOTE.event("a"), kind="correlated"),
        replace(STEP, pure_epsilon=0.5),
        replace(STEP, kind="exponential", pure_epsilon=0.5),
        replace(choice(0.5).event("a"), noise_multiplier=2 * choice(0.5).noise_multiplier),
        replace(choice(0.5).event("a"), pure_epsilon=math.nan),
        replace(choice(0.5).event("a"), pure_epsilon=0.0),
        replace(STEP, server_round=-1),
    ],
)
def test_what_no_accountant_can_charge_is_refused(unsound: LedgerEvent, tmp_path: Path) -> None:
    assert replace(choice(0.5).event("a"), pure_epsilon=0.4).is_sound  # the Gaussian of ε = 0.5 dominates that, too
    assert not unsound.is_sound
    with pytest.raises(ValueError, match="accounted for"):
        Ledger(tmp_path / "ledger.jsonl").record(unsound)


def test_a_damaged_line_may_have_been_anything(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(choice(0.5).event("a"))
    ledger.record(STEP)
    with ledger.path.open("a") as file:
        file.write('{"torn\n')
    made = ledger.read()
    worst = SampledGaussians(1.0, 1.0, 2)  # the highest rate, the least noise and the most releases that appear
    assert made.charges() == tuple(sorted((SampledGaussians(0.1, 1.0, 2), worst)))
    assert made.epsilon(DELTA) > composed_epsilon((worst,), DELTA)


def record_plan(selection: Selection) -> RecordLevelPlan:
    return RecordLevelPlan(
        clip_norm=1.0,
        noise_multiplier=1.0,
        sampling_rate=0.1,
        releases=4,
        delta=DELTA,
        trusts_server=False,
        personal=True,
        selection=selection,
    )


def test_a_folder_without_a_budget_has_one_selection(tmp_path: Path) -> None:
    plan = record_plan(VOTE)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    check_single_run(plan, ledger.read(), VOTE.event("a"))
    ledger.record(VOTE.event("a"))
    check_single_run(plan, ledger.read(), STEP)
    for event in (VOTE.event("b"), choice(0.1).event("b")):
        with pytest.raises(PrivacyError, match="2 selections of a start"):
            check_single_run(plan, ledger.read(), event)
    for other in (None, replace(VOTE, noise_multiplier=4.0)):
        with pytest.raises(PrivacyError, match="does not cover all"):
            check_single_run(replace(plan, selection=other), ledger.read(), STEP)
    ledger.record(STEP)
    ledger.record(replace(STEP, server_round=2))
    with pytest.raises(PrivacyError, match="4 releases are in the ledger"):
        check_single_run(plan, ledger.read(), replace(STEP, server_round=3))
    torn = Ledger(tmp_path / "torn.jsonl")
    torn.path.write_text('{"torn\n')
    with pytest.raises(PrivacyError, match="damaged lines, which may be a selection"):
        check_single_run(plan, torn.read(), VOTE.event("a"))


# --- filters ----------------------------------------------------------------------------------------------------------

BUDGET = Budget(
    epsilon=8.0,
    delta=1e-4,
    max_sampling_rate=0.2,
    min_noise_multiplier=0.5,
    max_clip_norm=1.0,
    trusts_server=False,
    scores=False,
    seeded_noise=False,
    filter=FilterChoice(expected_runs=2),
)


def plan_with(selection: Selection, run: str = "a") -> ReservedPlan:
    return ReservedPlan(
        run=run,
        releases=4,
        sampling_rate=0.1,
        noise_multiplier=1.0,
        selection_multiplier=selection.noise_multiplier,
        selection_epsilon=selection.pure_epsilon,
    )


@pytest.mark.parametrize("selection", [VOTE, choice(0.5)], ids=["vote", "choice"])
def test_reserve_charges_the_whole_plan_once(selection: Selection, tmp_path: Path) -> None:
    ledger, plan, chosen = Ledger(tmp_path / "ledger.jsonl"), plan_with(selection), ReserveFilter(BUDGET)
    for event in (selection.event("a"), STEP, replace(STEP, server_round=2)):
        spend_budget(ledger, BUDGET, plan, event)
        charges = (SampledGaussians(0.1, 1.0, 4), *selection.charges)
        together = mixed_epsilon(charges, selection.pure, chosen.run_delta, COARSE_GRID)
        assert chosen.charges(ledger.read()) == [pytest.approx(together)]
    assert ledger.read().plans == (plan,)
    with pytest.raises(PrivacyError, match="selected already"):
        spend_budget(ledger, BUDGET, plan, selection.event("a"))
    with pytest.raises(PrivacyError, match="4 of the 4 reserved releases"):
        spend_budget(ledger, BUDGET, plan, replace(STEP, server_round=3))
    other = Selection(form="federated", noise_multiplier=2.0)
    with pytest.raises(PrivacyError, match=r"is not in the run's plan, 4 releases at .* after a"):
        spend_budget(ledger, BUDGET, plan_with(selection, "b"), other.event("b"))


def test_a_plan_of_a_selection_only_is_sound(tmp_path: Path) -> None:
    ledger, plan = Ledger(tmp_path / "ledger.jsonl"), replace(plan_with(choice(0.5)), releases=0)
    spend_budget(ledger, BUDGET, plan, choice(0.5).event("a"))
    assert ReserveFilter(BUDGET).charges(ledger.read()) == [0.5]
    assert not replace(plan, selection_multiplier=0.0, selection_epsilon=0.0).is_sound
    assert not replace(plan, selection_epsilon=0.7).is_sound


def test_renyi_adds_the_divergence_of_a_choice(tmp_path: Path) -> None:
    own = replace(BUDGET, filter=FilterChoice(name="renyi"))
    ledger, chosen = Ledger(tmp_path / "ledger.jsonl"), RenyiFilter(own)
    spend_budget(ledger, own, plan_with(choice(0.5)), choice(0.5).event("a"))
    assert chosen.spent(ledger.read()) == pure_renyi_divergence(0.5, chosen.order)


def test_worst_terms_refuse_a_release_of_all_records(tmp_path: Path) -> None:
    own = replace(BUDGET, filter=FilterChoice(name="worst-terms"))
    with pytest.raises(PrivacyError, match=r"outside the worst terms of the owner's file: q = 1, at most 0.2"):
        spend_budget(Ledger(tmp_path / "ledger.jsonl"), own, plan_with(VOTE), VOTE.event("a"))


def test_an_owner_s_least_noise_holds_for_the_selection() -> None:
    plan = record_plan(choice(3.0))
    with pytest.raises(PrivacyError, match=r"a selection of the start at noise multiplier .* at least 0.5"):
        BUDGET.check_plan(plan, reproducible=False)
    BUDGET.check_plan(replace(plan, selection=choice(1.0)), reproducible=False)


@pytest.mark.parametrize("selection", [VOTE, choice(0.5)], ids=["vote", "choice"])
def test_the_lifetime_of_a_budget_shows_the_selection(selection: Selection, tmp_path: Path) -> None:
    node = tmp_path / "node.toml"
    node.write_text(
        f'state-dir = "{tmp_path / "state"}"\n[budget]\nepsilon = 8.0\ndelta = 1e-4\nmax-sampling-rate = 0.2\n'
        "min-noise-multiplier = 0.5\nmax-clip-norm = 1.0\nexpected-runs = 2\n",
        encoding="utf-8",
    )
    ledger = Ledger(tmp_path / "state" / "ledger.jsonl")
    spend_budget(ledger, BUDGET, plan_with(selection), selection.event("a"))
    lifetime = lifetime_of(node)
    words = "after a choice of the start at ε = 0.5" if selection.pure_epsilon else "after a vote on the start at z = 3"
    assert lifetime.selection == lifetime.jsonable()["last-run"]["selection"] == words
    assert words in lifetime.words()
    admitted = {admission.filter: admission.runs for admission in lifetime.admissions}
    assert admitted["reserve"] == 2
    assert admitted["worst-terms"] == 0
    assert (admitted["renyi"] or 0) >= 2
    assert (admitted["path"] or 0) >= (admitted["renyi"] or 0)


# --- votes ------------------------------------------------------------------------------------------------------------


def test_votes_keep_the_order_of_the_counts() -> None:
    right = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    floats, integers = vote_sum(right, "float"), vote_sum(right, "integer")
    assert floats.value.tolist() == pytest.approx([1.0, 0.0, -1.0])  # counts 3, 2, 1 minus their mean
    assert integers.value.tolist() == [3.0, 0.0, -3.0]
    assert integers.grid == pytest.approx(1 / 3)
    assert floats.sensitivity == pytest.approx(math.sqrt(3) / 2)
    assert integers.sensitivity * (integers.grid or 0) == pytest.approx(floats.sensitivity)
    assert largest_entry(torch.tensor([1.0, 4.0, 4.0])) == 1

"""What must hold of the selection of a start: sensitivity, law, ledger, composition. Also called on broken code."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from flwr.app import Message
from torch import Tensor

import fl_dualpriv.client.selection
from fl_dualpriv import messages
from fl_dualpriv.config.plans import record_level_plan, start_selection_terms
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.privacy import release as release_module
from fl_dualpriv.privacy import selection
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import spend_budget
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.release import release
from fl_dualpriv.tasks.candidates import answered_rightly
from tests.guarantees import run_checks
from tests.guarantees.run_checks import APP_DIR, DELTA, Federation

CANDIDATES = "a photo of a {} | a drawing of a {} | art {}"
FORMS: tuple[selection.Form, ...] = ("federated", "client")
ARITHMETICS: tuple[Arithmetic, ...] = ("float", "integer")
ROUNDING = 1 + 1e-12


# --- the votes --------------------------------------------------------------------------------------------------------


def votes(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def no_vote_exceeds_the_sensitivity() -> None:
    """All rows of up to ten candidates, and in real units, which is what the noise is scaled to."""
    for candidates in range(2, 11):
        largest = 0.0
        for row, arithmetic in itertools.product(itertools.product((0, 1), repeat=candidates), ARITHMETICS):
            clean = selection.vote_sum(votes(row), arithmetic)
            unit, norm = clean.grid or 1.0, float(clean.value.norm())
            assert norm <= clean.sensitivity * ROUNDING, f"{row} moves the votes by {norm * unit:.3f}, stated less"
            largest = max(largest, norm * unit)
        assert largest <= math.sqrt(candidates) / 2 * ROUNDING
        if candidates % 2 == 0:
            assert abs(largest - math.sqrt(candidates) / 2) < 1e-9, "the sensitivity is larger than it must be"


def one_record_moves_the_votes_by_at_most_the_sensitivity() -> None:
    """All data sets of three records on three candidates, each with one record removed."""
    rows = list(itertools.product((0, 1), repeat=3))
    for data, arithmetic in itertools.product(itertools.combinations_with_replacement(rows, 3), ARITHMETICS):
        whole = selection.vote_sum(votes(*data), arithmetic)
        for removed in range(3):
            rest = selection.vote_sum(votes(*(row for i, row in enumerate(data) if i != removed)), arithmetic)
            moved = float((whole.value - rest.value).norm())
            assert moved <= whole.sensitivity * ROUNDING, f"removing {data[removed]} moves the votes by {moved:.3f}"


def the_noise_of_votes_has_the_stated_scale() -> None:
    """z·√K/2 on each of K entries, also where no record votes."""
    for arithmetic in ARITHMETICS:
        clean = selection.vote_sum(torch.zeros(0, 4000, dtype=torch.bool), arithmetic)
        noised = release(clean, 2.0, KeyedRandom(StreamKey(seed=0, purpose="check")))
        std, stated = float(noised.std()), 2.0 * math.sqrt(4000) / 2
        assert abs(std / stated - 1) < 0.05, f"noise of {std:.2f} on a vote, stated {stated:.2f} ({arithmetic})"


def an_unreadable_record_is_a_zero_row() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(5, 3, 8, generator=generator)
    features = torch.randn(6, 8, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    fine = answered_rightly(classes, ClientData(features=features, labels=labels))
    spoilt = features.clone()
    spoilt[3], spoilt[4, 0], spoilt[5, 2] = math.nan, math.inf, -math.inf
    found = answered_rightly(classes, ClientData(features=spoilt, labels=labels))
    assert not found[3:].any(), "a record that cannot be read votes"
    assert torch.equal(found[:3], fine[:3])


def a_row_of_votes_depends_on_its_record_only() -> None:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(7, 11, 33, generator=generator)
    data = ClientData(features=torch.randn(20, 33, generator=generator), labels=torch.arange(20) % 11)
    whole = answered_rightly(classes, data)
    assert whole.any()
    for i in range(20):
        alone = answered_rightly(classes, ClientData(features=data.features[i : i + 1], labels=data.labels[i : i + 1]))
        assert torch.equal(alone[0], whole[i]), f"the votes of record {i} depend on other records"


# --- the exponential mechanism ----------------------------------------------------------------------------------------


class _Grid:
    """A source whose uniforms are given."""

    reproducible = True

    def __init__(self, uniform: float) -> None:
        self._uniform = uniform

    def words(self, count: int) -> np.ndarray:
        raise AssertionError("the choice draws one uniform, and no words")

    def uniforms(self, count: int) -> np.ndarray:
        assert count == 1
        return np.array([self._uniform])


_POINTS = 500


def law(counts: tuple[int, ...], epsilon: float) -> np.ndarray:
    """The probability of each candidate, to within 1/_POINTS."""
    table = torch.tensor(counts)
    drawn = [selection.choose(table, epsilon, _Grid((i + 0.5) / _POINTS)) for i in range(_POINTS)]
    return np.bincount(drawn, minlength=len(counts)) / _POINTS


def the_choice_has_the_law_of_the_exponential_mechanism() -> None:
    """By hand: counts 3, 1, 0 at ε = log 2 have weights 8, 2, 1."""
    found = law((3, 1, 0), math.log(2))
    assert np.abs(found - np.array([8, 2, 1]) / 11).max() <= 1.01 / _POINTS, f"the choice has the law {found}"
    assert law((900, 0, 899), 50.0).tolist() == [1, 0, 0]  # no overflow


def one_record_changes_a_choice_by_at_most_e_to_the_epsilon() -> None:
    epsilon, slack = 0.7, 1.5 / _POINTS
    for counts in ((0, 0, 0), (2, 0, 1), (3, 3, 0)):
        for row in itertools.product((0, 1), repeat=3):
            before = law(counts, epsilon)
            after = law(tuple(c + b for c, b in zip(counts, row, strict=True)), epsilon)
            for p, q in ((before, after), (after, before)):
                assert (p <= math.exp(epsilon) * q + (1 + math.exp(epsilon)) * slack).all(), (
                    f"a record {row} beside {counts} changes the law from {before} to {after}"
                )


# --- the composition --------------------------------------------------------------------------------------------------


def plan_of(changes: dict[str, Any]) -> RecordLevelPlan:
    defaults = app_defaults(APP_DIR) | {"prompt.init": "select", "prompt.candidates": CANDIDATES, "rounds": 4}
    plan = record_level_plan(RunConfig.from_run_config(defaults | changes))
    assert plan is not None
    return plan


def steps_of(plan: RecordLevelPlan) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    sampled = dp_accounting.PoissonSampledDpEvent(plan.sampling_rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, plan.releases)


def delta_of(plan: RecordLevelPlan, epsilon: float) -> float:
    """δ of steps and selection together, from dp-accounting and, for a choice, by hand.

    Randomised response has the loss ±ε_s with probability 1/(1 + e^∓ε_s), so the two together have the δ of the steps
    at ε ∓ ε_s in these shares.
    """
    steps, start = steps_of(plan), plan.selection
    assert start is not None
    if not start.pure_epsilon:
        accountant = pld.PLDAccountant()
        accountant.compose(steps)
        return float(accountant.compose(dp_accounting.GaussianDpEvent(start.noise_multiplier)).get_delta(epsilon))
    accountant, share = pld.PLDAccountant().compose(steps), 1 / (1 + math.exp(-start.pure_epsilon))
    more, less = (accountant.get_delta(epsilon + sign * start.pure_epsilon) for sign in (-1, 1))
    return share * float(more) + (1 - share) * float(less)


def the_selection_is_composed_with_the_steps(folder: Path) -> None:
    """In both forms: the plan spends at most its target, as recomputed, and its ledger states the same ε."""
    for form in FORMS:
        target = 4.0  # the default, so that plans are calibrated once
        plan = plan_of({"prompt.select": form})
        stated, start = plan.epsilon(), plan.selection
        assert start is not None
        assert stated <= target, f"{form}: a plan for ε = {target} spends {stated:.3f}"
        assert stated >= 0.98 * target, f"{form}: a plan for ε = {target} states {stated:.3f} only"
        assert delta_of(plan, stated) <= plan.delta * 1.001, f"{form}: ε = {stated:.3f} is less than both spend"
        assert delta_of(plan, 0.97 * stated) > plan.delta, f"{form}: ε = {stated:.3f} is far more than both spend"
        assert 0.97 * target / 4 <= start.epsilon(plan.delta) <= target / 4, "the selection has a quarter by itself"
        ledger = Ledger(folder / f"{form}.jsonl")
        ledger.record(start.event("a"))
        for server_round in range(1, 5):
            ledger.record(
                LedgerEvent(
                    run="a",
                    unit="record",
                    server_round=server_round,
                    releases=5,
                    sampling_rate=plan.sampling_rate,
                    noise_multiplier=plan.noise_multiplier,
                )
            )
        assert abs(ledger.read().epsilon(plan.delta) - stated) < 1e-3, f"{form}: the ledger states another ε"


def a_given_multiplier_is_composed_with_the_selection() -> None:
    for form in FORMS:
        plan = plan_of({"prompt.select": form, "privacy.record.calibrate-to": "noise-multiplier"})
        assert plan.noise_multiplier == 1.0
        assert delta_of(plan, plan.epsilon()) <= plan.delta * 1.001, f"{form}: the selection is left out of ε"


def a_reserved_plan_charges_the_selection(folder: Path) -> None:
    """The whole plan is charged before the selection; a second selection is refused."""
    budget = Budget(
        epsilon=10.0,
        delta=1e-4,
        max_sampling_rate=0.2,
        min_noise_multiplier=0.2,
        max_clip_norm=1.0,
        trusts_server=False,
        scores=False,
        seeded_noise=False,
        filter=FilterChoice(expected_runs=2),
    )
    for form in FORMS:
        plan = plan_of({"prompt.select": form})
        ledger, reserved, chosen = Ledger(folder / f"{form}.jsonl"), plan.reserved("a"), ReserveFilter(budget)
        assert plan.selection is not None
        event = plan.selection.event("a")
        spend_budget(ledger, budget, reserved, event)
        (charge,) = chosen.charges(ledger.read())
        at_half = replace(plan, delta=chosen.run_delta)
        assert delta_of(at_half, charge) <= chosen.run_delta * 1.001, f"{form}: a charge of {charge:.3f} is too small"
        try:
            spend_budget(ledger, budget, reserved, event)
        except PrivacyError:
            continue
        raise AssertionError(f"{form}: the filter admits a second selection")


# --- the client -------------------------------------------------------------------------------------------------------


def nodes(federation: Federation, form: selection.Form, **changes: Any) -> tuple[LocalGrid, selection.SelectionTerms]:
    """Two nodes with a client each, and the terms that their honest server offers."""
    given = {"prompt.init": "select", "prompt.candidates": CANDIDATES, "prompt.select": form} | changes
    config = RunConfig.from_run_config(federation.config(given))
    grid = federation.nodes(**given)
    return grid, start_selection_terms(config, record_level_plan(config), 3)


def ask(grid: LocalGrid, terms: selection.SelectionTerms, token: str = "t") -> Tensor | None:
    """Ask the first client for its selection; None: it refused or failed."""
    request = messages.SelectRequest(partitions=(0,), run_token=token, terms=terms)
    (reply,) = grid.send_and_receive([Message(messages.select_content(request), 1, messages.SELECT)])
    assert not reply.has_error(), reply.error.reason
    width = 3 if grid.contexts[1].run_config["prompt.select"] == "federated" else 0
    uploads = messages.read_uploads(reply, (width,))
    assert len(uploads.partitions) + len(uploads.failed) == 1
    return uploads.values[0] if uploads.partitions else None


@contextmanager
def selections_seen(ledger: Ledger) -> Iterator[list[int]]:
    """For each draw of a selection, how many selections the ledger held at that moment."""
    seen: list[int] = []
    draw, choose = release_module.gaussian_noise, fl_dualpriv.client.selection.choose

    def drawn(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
        seen.append(len(ledger.read().selections()))
        return draw(source, shape, std)

    def chosen(counts: Tensor, epsilon: float, source: RandomSource) -> int:
        seen.append(len(ledger.read().selections()))
        return choose(counts, epsilon, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release_module, "gaussian_noise", drawn)
        patch.setattr(fl_dualpriv.client.selection, "choose", chosen)
        yield seen


def _fresh(federation: Federation, name: str) -> Federation:
    return replace(federation, folder=federation.folder / name)


def a_selection_is_in_the_ledger_before_its_draw(federation: Federation) -> None:
    for form in FORMS:
        own = _fresh(federation, form)
        grid, terms = nodes(own, form)
        with selections_seen(own.ledger) as seen:
            assert ask(grid, terms) is not None
        assert seen == [1], f"{form}: at the draw the ledger held {seen} selections"


def a_selection_is_made_once(federation: Federation) -> None:
    """Asked again it is answered by what was saved; where nothing was saved, or by another run, it is refused."""
    for form in FORMS:
        own = _fresh(federation, form)
        grid, terms = nodes(own, form)
        with selections_seen(own.ledger) as seen:
            once, twice = ask(grid, terms), ask(grid, terms)
            assert once is not None
            assert twice is not None
            assert torch.equal(once, twice), f"{form}: a message that was sent twice had two releases"
            assert len(seen) == 1, f"{form}: asked twice, the client drew {len(seen)} times"
            assert ask(grid, terms, "another") is None, f"{form}: a new token is a new selection"
            saved = "sent" if form == "federated" else "prompt"
            (own.folder / "clients" / "client-000" / f"{saved}.safetensors").unlink()  # as if it was killed before
            assert ask(grid, terms) is None, f"{form}: a selection that was paid for once was made twice"
            assert len(seen) == 1
        assert len(own.ledger.read().selections()) == 1


def a_selection_that_a_crash_ended_is_the_same_release_or_none(federation: Federation) -> None:
    """The process dies after the event and before the result is saved."""
    for form, randomness in itertools.product(FORMS, ("os", "seeded")):
        own = _fresh(federation, f"{form}-{randomness}")
        undisturbed = _fresh(federation, f"{form}-{randomness}-undisturbed")
        changes = {"privacy.randomness": randomness}
        grid, terms = nodes(own, form, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fl_dualpriv.client.selection, "release", _die)
            patch.setattr(fl_dualpriv.client.selection, "choose", _die)
            assert ask(grid, terms) is None
        assert len(own.ledger.read().selections()) == 1, f"{form}: the event was not written before the draw"
        again = ask(grid, terms)
        assert len(own.ledger.read().selections()) == 1
        if randomness == "os":
            assert again is None, f"{form}: a second draw for one event"
            continue
        other, terms = nodes(undisturbed, form, **changes)
        expected = ask(other, terms)
        assert again is not None
        assert expected is not None
        assert torch.equal(again, expected), f"{form}: the seeded selection is another one after a crash"


def _die(*given: Any) -> Any:
    raise RuntimeError("the process dies here")


def weaker_selections_are_refused(federation: Federation) -> None:
    for form in FORMS:
        own = _fresh(federation, form)
        grid, terms = nodes(own, form)
        other: selection.Form = "client" if form == "federated" else "federated"
        weaker = (
            replace(terms, noise_multiplier=terms.noise_multiplier / 2),
            replace(terms, pure_epsilon=terms.pure_epsilon + 1),
            replace(terms, private=False),
            replace(terms, arithmetic="integer"),
            replace(terms, form=other),
            replace(terms, candidates=4),
        )
        for offered in weaker:
            assert ask(grid, offered) is None, f"a selection left on these terms: {offered}"
        assert own.ledger.read().events == ()
        assert ask(grid, terms) is not None


def a_start_is_selected_before_round_1(federation: Federation) -> None:
    grid, terms = nodes(federation, "federated")
    assert run_checks.upload_of(run_checks.train(grid, 1)) is not None
    assert ask(grid, terms) is None, "a start was selected after round 1"
    assert not federation.ledger.read().selections()


def an_owner_s_budget_is_charged_for_the_selection(federation: Federation) -> None:
    """Through the app: the plan with its selection stands in the ledger before the draw; a small budget refuses it."""
    for form in FORMS:
        for epsilon, admitted in ((1000.0, True), (0.5, False)):
            own = _fresh(federation, f"{form}-{epsilon:g}")
            own.folder.mkdir(parents=True)
            owner = (
                f'state-dir = "{own.folder / "clients" / "client-000"}"\ndata-path = "{own.images}"\n[budget]\n'
                f"epsilon = {epsilon}\ndelta = {DELTA}\nmax-sampling-rate = 0.15\nmin-noise-multiplier = 0.5\n"
                "max-clip-norm = 1.0\nexpected-runs = 1\n"
            )
            changes = {"prompt.init": "select", "prompt.candidates": CANDIDATES, "prompt.select": form}
            grid, (_, terms) = own.nodes(owner, **changes), nodes(own, form)
            assert (ask(grid, terms) is not None) == admitted, f"{form}: a budget of ε = {epsilon:g}"
            made = own.ledger.read()
            assert len(made.selections()) == len(made.plans) == admitted
            if admitted:
                assert made.plans[0].covers_selection(made.events[0])
                assert made.plans[0].releases == 8

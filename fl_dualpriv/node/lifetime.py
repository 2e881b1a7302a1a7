"""Lifetime budget of a node's owner: the filter's guarantee, the rest, and the runs that each filter would admit."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.privacy.filters.budget import Budget, FilterName

if TYPE_CHECKING:  # the accountant takes a second to load
    from fl_dualpriv.privacy.ledger import LedgerContent, ReservedPlan

_PATH = "no filter: the PLD of terms chosen after earlier runs bounds nothing"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Number of equal runs that one filter would admit to an empty ledger.

    Attributes:
        filter: Name of the filter. ``path`` is the PLD of the terms that happened, which is not a filter.
        runs: Number of runs. None if the owner's file lacks a value that this filter needs.
        note: Reason why there is no number, or the claim that comes with the number.
    """

    filter: str
    runs: int | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """Budget and ledger of an owner.

    Attributes:
        epsilon: ε over the whole lifetime.
        delta: δ over the whole lifetime.
        claim: Rule that holds the budget, in words.
        balance: Spent part and rest, in words.
        share: Spent part of the budget; infinite if the ledger is closed.
        spent: ε of everything in the ledger, for terms fixed beforehand.
        last: Releases, q and z of the last run's plan; without a run, one release at the owner's worst terms.
        selection: Selection of a start in that plan, in words; empty if there is none.
        buys: Number of releases at the terms of ``last`` that are left.
        admissions: Number of runs like ``last`` that each filter would admit.
    """

    epsilon: float
    delta: float
    claim: str
    balance: str
    share: float
    spent: float
    last: tuple[int, float, float]
    buys: int
    admissions: tuple[Admission, ...]
    selection: str = ""

    def words(self) -> str:
        """Return several lines for a person."""
        releases, rate, noise = self.last
        lines = [
            f"lifetime budget: ε = {self.epsilon:g} at δ = {self.delta:g}",
            f"filter {self.claim}",
            f"{self.balance}; the rest buys {self.buys} releases at q = {rate:g} and z = {noise:g}",
            f"ε of everything in the ledger, for terms fixed beforehand: {self.spent:.4g}",
            f"an empty ledger would admit, of runs of {releases} releases at q = {rate:g} and z = {noise:g}"
            f"{self.selection and f', {self.selection}'}:",
        ]
        for admission in self.admissions:
            count = "-" if admission.runs is None else str(admission.runs)
            lines.append(f"  {admission.filter:<12} {count:>6}  {admission.note}".rstrip())
        return "\n".join(lines)

    def jsonable(self) -> dict[str, Any]:
        """Return the content of one JSON object. None replaces infinity, which JSON lacks."""
        releases, rate, noise = self.last
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "filter": self.claim,
            "balance": self.balance,
            "share": self.share if math.isfinite(self.share) else None,
            "epsilon-of-fixed-terms": self.spent if math.isfinite(self.spent) else None,
            "last-run": {"releases": releases, "sampling-rate": rate, "noise-multiplier": noise}
            | ({"selection": self.selection} if self.selection else {}),
            "rest-buys": self.buys,
            "admitted": {a.filter: a.runs for a in self.admissions},
        }


def lifetime_of(file: Path) -> Lifetime:
    """Read an owner's file and the ledger in its state folder.

    Raises:
        ConfigError: If the file cannot be used, or has no budget or no state folder.
        PrivacyError: If another filter began the ledger.
    """
    node = read_node_file(file.resolve())
    if node.budget is None or node.state_dir is None:
        raise ConfigError(f"node file {file}: it needs a [budget] and a state-dir")
    from fl_dualpriv.privacy.filters.base import selection_words
    from fl_dualpriv.privacy.filters.choose import check_header, filter_of
    from fl_dualpriv.privacy.ledger import Ledger

    budget, content = node.budget, Ledger(node.state_dir / "ledger.jsonl").read()
    chosen, last = filter_of(budget), _last_plan(budget, content)
    selecting = next((plan for plan in reversed(content.plans) if plan.selection_multiplier), None)
    if content.plans and selecting is not content.plans[-1]:
        selecting = None
    check_header(content, chosen.header)
    return Lifetime(
        epsilon=budget.epsilon,
        delta=budget.delta,
        claim=chosen.claim(),
        balance=chosen.balance(content),
        share=chosen.share(content),
        spent=content.epsilon(budget.delta),
        last=last,
        buys=chosen.affordable(content, last[1], last[2]),
        admissions=admissions(budget, last) if selecting is None else _admissions_of(budget, selecting),
        selection="" if selecting is None else selection_words(selecting),
    )


def _last_plan(budget: Budget, content: "LedgerContent") -> tuple[int, float, float]:
    if content.plans:
        plan = content.plans[-1]
        return plan.releases, plan.sampling_rate, plan.noise_multiplier
    if steps := [event for event in content.events if not event.is_selection]:
        event = steps[-1]
        return content.steps(event.run), event.sampling_rate, event.noise_multiplier
    return 1, budget.max_sampling_rate, budget.min_noise_multiplier or 1.0


def admissions(budget: Budget, run: tuple[int, float, float]) -> tuple[Admission, ...]:
    """Return the runs of one plan that each filter would admit to an empty ledger, and the PLD of the path beside them.

    Args:
        budget: The owner's limits. Its own choice of a filter is ignored.
        run: Releases, q and z of the plan.
    """
    return (*(_admitted(budget, name, run) for name in get_args(FilterName)), _of_path(budget, run))


def _admissions_of(budget: Budget, plan: "ReservedPlan") -> tuple[Admission, ...]:
    """Return `admissions` for runs whose plan selects a start before its releases."""
    from fl_dualpriv.privacy.accounting import COARSE_GRID, gathered, mixed_epsilon
    from fl_dualpriv.privacy.filters.base import largest
    from fl_dualpriv.privacy.filters.choose import filter_of
    from fl_dualpriv.privacy.filters.reserve import ReserveFilter
    from fl_dualpriv.privacy.ledger import LedgerContent

    one, found = LedgerContent(events=plan.events(), damaged=0), list[Admission]()
    for name in get_args(FilterName):
        if name == "worst-terms" and not budget.min_noise_multiplier > 0:
            found.append(Admission(filter=name, runs=None, note="needs min-noise-multiplier above 0"))
            continue
        try:
            chosen = filter_of(replace(budget, filter=replace(budget.filter, name=name)))
            note = chosen.claim()
        except PrivacyError as error:
            found.append(Admission(filter=name, runs=None, note=str(error)))
            continue
        if isinstance(chosen, ReserveFilter):
            cost = chosen.plan_cost(plan)
            runs = largest(lambda count, c=chosen, e=cost: c.total([e] * count) <= budget.epsilon)
        else:
            runs = int(1 / chosen.share(one))  # shares of equal runs add up; an infinite one admits none
        found.append(Admission(filter=name, runs=runs, note=note))
    path = largest(
        lambda count: (
            mixed_epsilon(gathered(plan.charges() * count), plan.pure * count, budget.delta, COARSE_GRID)
            <= budget.epsilon
        )
    )
    return (*found, Admission(filter="path", runs=path, note=_PATH))


def _admitted(budget: Budget, name: FilterName, run: tuple[int, float, float]) -> Admission:
    from fl_dualpriv.privacy.filters.base import largest
    from fl_dualpriv.privacy.filters.choose import filter_of
    from fl_dualpriv.privacy.filters.reserve import ReserveFilter
    from fl_dualpriv.privacy.ledger import LedgerContent

    releases, rate, noise = run
    if name == "worst-terms" and not budget.min_noise_multiplier > 0:
        return Admission(filter=name, runs=None, note="needs min-noise-multiplier above 0")
    try:
        chosen = filter_of(replace(budget, filter=replace(budget.filter, name=name)))
        note = chosen.claim()
    except PrivacyError as error:
        return Admission(filter=name, runs=None, note=str(error))
    if not isinstance(chosen, ReserveFilter):
        return Admission(
            filter=name, runs=chosen.affordable(LedgerContent(events=(), damaged=0), rate, noise) // releases, note=note
        )
    cost = chosen.cost(releases, rate, noise)
    runs = largest(lambda count: chosen.total([cost] * count) <= budget.epsilon)
    return Admission(filter=name, runs=runs, note=note)


def _of_path(budget: Budget, run: tuple[int, float, float]) -> Admission:
    from fl_dualpriv.privacy.accounting import SampledGaussians
    from fl_dualpriv.privacy.filters.base import most_releases

    releases, rate, noise = run
    runs = most_releases(
        lambda count: (SampledGaussians(rate, noise, count * releases),),
        budget.delta,
        budget.epsilon,
        lambda epsilon: epsilon <= budget.epsilon,
    )
    return Admission(filter="path", runs=runs, note=_PATH)

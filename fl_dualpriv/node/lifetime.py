"""The lifetime budget of a node's owner: what its filter guarantees, what is left, and what each filter would admit."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.privacy.filters.budget import Budget, FilterName

if TYPE_CHECKING:  # the accountant takes a second to load
    from fl_dualpriv.privacy.ledger import LedgerContent


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The number of equal runs that one filter would admit to an empty ledger.

    Attributes:
        filter: Its name; ``path`` is the PLD of the terms that happened, which is no filter.
        runs: How many; None if the owner's file does not say what this filter needs.
        note: Why there is no number, or what the number is worth.
    """

    filter: str
    runs: int | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """An owner's budget and ledger.

    Attributes:
        epsilon: ε for ever.
        delta: δ for ever.
        claim: The rule that holds it, in words.
        balance: What is spent and left, in words.
        share: The part that is spent; infinite if the ledger is closed.
        spent: ε of everything in the ledger, for terms fixed beforehand.
        last: Releases, q and z of the last run's plan; without a run one release at the owner's worst terms.
        buys: Releases at the terms of ``last`` that are left.
        admissions: Runs of ``last`` by each filter.
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

    def words(self) -> str:
        """Several lines for a person."""
        releases, rate, noise = self.last
        lines = [
            f"lifetime budget: ε = {self.epsilon:g} at δ = {self.delta:g}",
            f"filter {self.claim}",
            f"{self.balance}; the rest buys {self.buys} releases at q = {rate:g} and z = {noise:g}",
            f"ε of everything in the ledger, for terms fixed beforehand: {self.spent:.4g}",
            f"an empty ledger would admit, of runs of {releases} releases at q = {rate:g} and z = {noise:g}:",
        ]
        for admission in self.admissions:
            count = "-" if admission.runs is None else str(admission.runs)
            lines.append(f"  {admission.filter:<12} {count:>6}  {admission.note}".rstrip())
        return "\n".join(lines)

    def jsonable(self) -> dict[str, Any]:
        """One JSON object; JSON has no infinity."""
        releases, rate, noise = self.last
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "filter": self.claim,
            "balance": self.balance,
            "share": self.share if math.isfinite(self.share) else None,
            "epsilon-of-fixed-terms": self.spent if math.isfinite(self.spent) else None,
            "last-run": {"releases": releases, "sampling-rate": rate, "noise-multiplier": noise},
            "rest-buys": self.buys,
            "admitted": {a.filter: a.runs for a in self.admissions},
        }


def lifetime_of(file: Path) -> Lifetime:
    """Read an owner's file and the ledger in its state folder.

    Raises:
        ConfigError: If the file cannot be used, or has no budget or no state folder.
        PrivacyError: If another filter has begun the ledger.
    """
    node = read_node_file(file.resolve())
    if node.budget is None or node.state_dir is None:
        raise ConfigError(f"node file {file}: it needs a [budget] and a state-dir")
    from fl_dualpriv.privacy.filters.choose import check_header, filter_of
    from fl_dualpriv.privacy.ledger import Ledger

    budget, content = node.budget, Ledger(node.state_dir / "ledger.jsonl").read()
    chosen, last = filter_of(budget), _last_plan(budget, content)
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
        admissions=admissions(budget, last),
    )


def _last_plan(budget: Budget, content: "LedgerContent") -> tuple[int, float, float]:
    if content.plans:
        plan = content.plans[-1]
        return plan.releases, plan.sampling_rate, plan.noise_multiplier
    if content.events:
        event = content.events[-1]
        return content.releases(event.run), event.sampling_rate, event.noise_multiplier
    return 1, budget.max_sampling_rate, budget.min_noise_multiplier or 1.0


def admissions(budget: Budget, run: tuple[int, float, float]) -> tuple[Admission, ...]:
    """Runs of one plan that each filter would admit to an empty ledger, and the PLD of the path beside them.

    Args:
        budget: The owner's limits; the filter's own name is not looked at.
        run: Releases, q and z.
    """
    return (*(_admitted(budget, name, run) for name in get_args(FilterName)), _of_path(budget, run))


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
    return Admission(filter="path", runs=runs, note="no filter: the PLD of terms that somebody chose bounds nothing")

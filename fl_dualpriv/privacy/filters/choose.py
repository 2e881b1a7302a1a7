"""Choice of the privacy filter, and the only functions that spend a lifetime budget.

A server or a person may choose the terms (q, z, steps) of a run after seeing the releases of earlier runs. The ε of the
terms that occurred, composed afterwards, is then no bound: a server that stops after lucky releases, and continues
after others, leaks more than δ says (arXiv:2602.15815). Each rule here is proved for such choices. A ledger has one
rule for its whole life, and the header of the ledger names it.
"""

import functools
from collections.abc import Mapping

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.filters.base import PrivacyFilter
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.filters.renyi import RenyiFilter
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent, ReservedPlan


def filter_of(budget: Budget) -> PrivacyFilter:
    """Return the filter that the owner's file names."""
    return _filter(budget)


@functools.lru_cache(maxsize=64)
def _filter(budget: Budget) -> PrivacyFilter:
    match budget.filter.name:
        case "reserve":
            return ReserveFilter(budget)
        case "renyi":
            return RenyiFilter(budget)
        case "worst-terms":
            return WorstTermsFilter(budget)


def check_header(made: LedgerContent, now: Mapping[str, object]) -> None:
    """Refuse a ledger that another filter, or the same filter with other numbers, has begun.

    Guarantee:
        The rule that admits a release is the one that admitted all earlier releases. Its numbers come from the owner's
        file; the header only confirms them.

    Raises:
        PrivacyError: If a header differs. The message names the differences.
    """
    for header in made.headers:
        if differences := [
            f"{key} was {header.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(header.keys() | now.keys())
            if header.get(key) != now.get(key)
        ]:
            raise PrivacyError(
                "the ledger was begun with other numbers than the budget has now: "
                + "; ".join(differences)
                + ". A filter is fixed for the life of its ledger: put the old numbers back; the round is refused"
            )


def spend(ledger: Ledger, chosen: PrivacyFilter, plan: ReservedPlan, event: LedgerEvent) -> None:
    """Admit an event by a filter and write it. This is the only way to spend a lifetime budget.

    Guarantee:
        When this returns, the header, the run's plan where plans are reserved, and the event are on disk in this
        order, and the filter has admitted the event; the releases may be made. If it raises, nothing may be released.
        The caller holds the ledger (`Ledger.exclusive`).

    Args:
        ledger: Ledger of one unit's data.
        chosen: Filter of the ledger.
        plan: Whole plan of the event's run.
        event: Releases of one round of this plan.

    Raises:
        PrivacyError: If the filter does not admit the event, or is not the ledger's.
        OSError: If a line cannot be written.
    """
    made = ledger.read()
    check_header(made, chosen.header)
    chosen.check(made, plan, event)
    if not made.headers:
        ledger.begin(chosen.header)
    if isinstance(chosen, ReserveFilter) and plan not in made.plans:
        ledger.reserve(plan)
    ledger.record(event)


def spend_budget(ledger: Ledger, budget: Budget, plan: ReservedPlan, event: LedgerEvent) -> None:
    """Admit and write an event, as `spend` does, by the filter of an owner's budget.

    Raises:
        PrivacyError: As in `spend`, and if a round has more releases than the owner admits in one line of the ledger.
        OSError: As in `spend`.
    """
    most = budget.filter.max_round_releases
    if event.releases > most:
        raise PrivacyError(
            f"a round of {event.releases} releases; the owner of this node admits at most {most} "
            "(budget.max-round-releases): the round is refused"
        )
    spend(ledger, filter_of(budget), plan, event)

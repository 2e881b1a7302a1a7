"""Pay for releases of a plan: check the event, write it to the ledger, and only then hand out the payment.

This is the one way to spend: clients of a federation and loops of your own call `pay`, with an owner's budget or
without one.
"""

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.filters.choose import spend_budget
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.step import Payment


def pay(ledger: Ledger, plan: RecordLevelPlan, event: LedgerEvent, budget: Budget | None = None) -> Payment:
    """Write an event of a plan to the ledger of one unit's data, if it may be spent.

    Guarantee:
        When this returns, the event is on disk, and the releases may be made. Without a budget the ledger never holds
        more than one run's plan, see `check_single_run`. With a budget its filter has admitted the event, see
        `choose.spend`. If it raises, nothing may be released. The caller holds the ledger (`Ledger.exclusive`).

    Args:
        ledger: Ledger of the data that the releases read.
        plan: Plan of the run.
        event: Releases that follow, see `RecordLevelPlan.event`.
        budget: Owner's budget over all runs, or None for a single run.

    Returns:
        The payment for the event's releases. Keep to one payment for each event: two would let through releases that no
        event stands for.

    Raises:
        PrivacyError: If the event may not be spent.
        OSError: If the ledger cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> from fl_dualpriv.privacy.plan import plan_for
        >>> plan = plan_for(epsilon=2.0, delta=1e-5, sampling_rate=0.1, releases=100, clip_norm=1.0)
        >>> ledger = Ledger(pathlib.Path(tempfile.mkdtemp()) / "ledger.jsonl")
        >>> with ledger.exclusive():
        ...     payment = pay(ledger, plan, plan.event("mine", 1, 100))
        >>> ledger.read().steps("mine"), payment.left
        (100, 100)
    """
    payment = Payment(plan, event)
    admit(ledger, plan, event, budget)
    return payment


def admit(ledger: Ledger, plan: RecordLevelPlan, event: LedgerEvent, budget: Budget | None = None) -> None:
    """Write an event of a plan, which may be its selection of a start; guarantee, arguments and errors as in `pay`."""
    if budget is None:
        check_single_run(plan, ledger.read(), event)
        ledger.record(event)
    else:
        spend_budget(ledger, budget, plan.reserved(event.run), event)


def check_single_run(plan: RecordLevelPlan, made: LedgerContent, event: LedgerEvent) -> None:
    """Refuse a round that would spend more than the plan of one run, for a folder without an owner's budget.

    Without such a budget the plan of one run is all that may ever be spent in a folder.

    Raises:
        PrivacyError: If the ledger, damaged lines included, holds too many releases of other runs, or a release on
            weaker terms than this plan's, or a selection of a start that the plan does not have.
    """
    _check_single_selection(plan, made, event)
    if event.is_selection:
        return
    weaker = [
        e
        for e in made.events
        if not e.is_selection and (e.sampling_rate > plan.sampling_rate or e.noise_multiplier < event.noise_multiplier)
    ]
    if weaker:
        raise PrivacyError(
            f"the ledger holds releases of another run at q = {weaker[0].sampling_rate:g} and z = "
            f"{weaker[0].noise_multiplier:g}, which this plan, q = {plan.sampling_rate:g} and z = "
            f"{plan.noise_multiplier:g}, does not cover; the owner of this node has set no budget for more than one "
            "run: the round is refused"
        )
    releases = made.steps(damaged_as=event.releases)
    if releases + event.releases > plan.releases:
        raise PrivacyError(
            f"{releases} releases are in the ledger and the round makes {event.releases} more; the plan accounts for "
            f"{plan.releases}, and the owner of this node has set no budget for more than one run: the round is refused"
        )


def _check_single_selection(plan: RecordLevelPlan, made: LedgerContent, event: LedgerEvent) -> None:
    """Refuse more than the one selection of a start that the plan of one run has, over all runs of a folder."""
    selection = plan.selection
    if event.is_selection and made.damaged:
        raise PrivacyError("the ledger has damaged lines, which may be a selection of a start; another one is refused")
    events = (*made.selections(), event) if event.is_selection else made.selections()
    covered = selection is not None and all(
        (e.noise_multiplier, e.pure_epsilon) == (selection.noise_multiplier, selection.pure_epsilon) for e in events
    )
    if events and not (covered and len(events) == 1):
        raise PrivacyError(
            f"{len(events)} selections of a start, of which the plan of this run does not cover all; the owner of this "
            "node has set no budget for more than one run: the request is refused"
        )

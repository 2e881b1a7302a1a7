"""The private step: rows of records are masked, clipped, added up and noised here, for every learner.

A learner turns a batch into blocks of rows, one row for each record. Its author owes one proof: a row is a function of
its own record and of public numbers. Everything else about sensitivity and noise is in this package, so a new clipping
rule changes one file, and a new learner none.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.clipping import (
    Arithmetic,
    Clip,
    ClippedSum,
    as_clip,
    as_clipped_sum,
    bounded_rows,
    clipped_factors,
    integer_outer_rows,
)
from fl_dualpriv.privacy.ledger import LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.release import release


class Block(Protocol):
    """Rows of some records of one or several clients; clients are numbered by their place in the step."""

    def add_to(self, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None) -> None:
        """Mask and clip each row, and add it to its client's total.

        Args:
            totals: Totals (client, …), float64, which change.
            clip: Clip norm and rule.
            arithmetic: Arithmetic of the sums.
            masks: Factors of 0 and 1, (client, …), or None.
        """
        ...

    def rows_of(self, client: int, shape: Sequence[int]) -> Tensor | None:
        """Return the rows of a client before the clip, (row, …) with this shape of a row, or None if it has none."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBlock:
    """Rows in full.

    Attributes:
        clients: Places of the clients, (client,) int64, each once.
        rows: Rows (client, row, …).
        count: Number of rows that are added. The others are padding. Padding by zero rows needs no count.
    """

    clients: Tensor
    rows: Tensor
    count: int | None = None

    def add_to(self, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None) -> None:
        """See `Block`."""
        rows = self.rows if masks is None else self.rows * masks[self.clients.to(masks.device), None].to(self.rows)
        terms = bounded_rows(rows.flatten(0, 1), clip, arithmetic).unflatten(0, rows.shape[:2])
        totals[self.clients] += terms[:, : self.count].sum(dim=1).to(totals.device)

    def rows_of(self, client: int, shape: Sequence[int]) -> Tensor | None:
        """See `Block`."""
        place = (self.clients == client).nonzero()
        return self.rows[int(place[0, 0])].reshape(-1, *shape) if len(place) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class OuterBlock:
    """Rows that are outer products, left_i ⊗ right_i: a closed form of norm and sum. Such rows have no mask.

    Attributes:
        client: Place of the client.
        left: Left factors (row, rows), float64; zero rows are padding.
        right: Right factors (row, cols), float64.
    """

    client: int
    left: Tensor
    right: Tensor

    def add_to(self, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None) -> None:
        """See `Block`. In integers the outer products are formed, and each is cut down to the grid.

        Raises:
            ValueError: If there are masks.
        """
        if masks is not None:
            raise ValueError("masks apply to prompt gradients; class-feature gradients cannot be masked")
        left, right = clipped_factors(self.left, self.right, clip)
        if arithmetic == "float":
            totals[self.client] += left.T @ right
        else:
            totals[self.client] += integer_outer_rows(left, right, clip).sum(dim=0)

    def rows_of(self, client: int, shape: Sequence[int]) -> Tensor | None:
        """See `Block`."""
        return self.left[:, :, None] * self.right[:, None, :] if client == self.client else None


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedBlock:
    """Rows that are zero but for one line each, for example the line of a record's class.

    Attributes:
        client: Place of the client.
        lines: Index of each row's line, (row,) int64.
        values: That line, (row, cols).
    """

    client: int
    lines: Tensor
    values: Tensor

    def add_to(self, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None) -> None:
        """See `Block`."""
        values = self.values if masks is None else self.values * masks[self.client][self.lines]
        totals[self.client].index_add_(0, self.lines, bounded_rows(values, clip, arithmetic))

    def rows_of(self, client: int, shape: Sequence[int]) -> Tensor | None:
        """See `Block`."""
        if client != self.client:
            return None
        row = torch.arange(len(self.lines), device=self.lines.device)
        return self.values.new_zeros(len(row), *shape).index_put_((row, self.lines), self.values)


class Rows(Protocol):
    """The rows of one batch per client, as a learner makes them.

    Guarantee that every implementation must give:
        A row is a function of its own record, of its client's prompt and of public numbers. A record that cannot be
        used has a row that is zero or not finite. An empty batch has no rows, or zero rows.
    """

    def blocks(self) -> Iterable[Block]:
        """Yield all rows of all clients, each row once."""
        ...

    def zeros(self) -> Tensor:
        """Return a zero total of each client, (client, …) float64, on the device of the sums."""
        ...


def client_rows(rows: Rows, client: int) -> Iterator[Tensor]:
    """Yield the rows of a client before the clip, block by block, (row, …).

    They are what `clipped_sums` adds up: the same code on the same shapes. Every property of the rows that a check
    establishes therefore holds for the terms of the sums. Rows after the last record of the batch are padding.
    """
    shape = rows.zeros().shape[1:]
    for block in rows.blocks():
        own = block.rows_of(client, shape)
        if own is not None:
            yield own


def clipped_sums(
    rows: Rows, clip: Clip | float, arithmetic: Arithmetic = "float", masks: Tensor | None = None
) -> list[ClippedSum]:
    """Compute each client's sum of clipped rows.

    Guarantee:
        A client's value is a sum of one term per record of its batch. Each term has norm at most C and is a function of
        only that record, the prompt and the mask, if the rows are (see `Rows`). So adding or removing one record moves
        its client's value by at most C and no other client's. A record that cannot be used adds a zero term. An empty
        batch gives zeros. In integers the move is exactly that record's own integer row, provided that the rows of the
        other records are the same bit by bit without it: `row_check` tests that before a run. A mask is the same for
        all records of a client, so the term of a record stays a function of that record, as long as the mask is made of
        public numbers.

    Args:
        rows: Rows of one batch per client.
        clip: Clip norm C and rule; a number is the norm of the flat rule.
        arithmetic: Arithmetic of the sums, see `ClippedSum`.
        masks: Factors of 0 and 1, (client, …), that multiply each row before it is clipped. None multiplies nothing.
            Masks must come from public numbers, such as earlier releases.

    Raises:
        ValueError: If the clip norm is out of range, or masks are given for outer products.
    """
    clip = as_clip(clip)
    totals = rows.zeros()
    for block in rows.blocks():
        block.add_to(totals, clip, arithmetic, masks)
    return [as_clipped_sum(total, clip.norm, arithmetic) for total in totals]


class Payment:
    """The releases that one ledger event stands for, counted down one by one.

    Guarantee:
        `private_step` makes a release only if a payment is left for it. So a round, or a loop, makes no more releases
        than its event says, with no weaker noise and no larger batches. The event must have been written to the ledger
        before: `filters.pay.pay` does both.

    Args:
        plan: Plan of the releases.
        event: Event that was written for them.

    Raises:
        PrivacyError: If the event covers less than the plan's releases cost.

    Example:
        >>> from fl_dualpriv.privacy.plan import plan_for
        >>> plan = plan_for(epsilon=2.0, delta=1e-5, sampling_rate=0.1, releases=100, clip_norm=1.0)
        >>> Payment(plan, plan.event("mine", 1, 100)).left
        100
    """

    def __init__(self, plan: RecordLevelPlan, event: LedgerEvent) -> None:
        if event.unit != "record" or event.kind != "gaussian" or event.is_selection:
            raise PrivacyError(f"the event {event} does not pay for steps: it must be of unit record and kind gaussian")
        if event.noise_multiplier > plan.noise_multiplier or event.sampling_rate < plan.sampling_rate:
            raise PrivacyError(
                f"the event pays for q = {event.sampling_rate:g} and z = {event.noise_multiplier:g}, and the plan has "
                f"q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}; write the plan's own event"
            )
        self._left = event.releases

    @property
    def left(self) -> int:
        """Number of releases that may still be made."""
        return self._left

    def check(self) -> None:
        """Refuse a payment that is used up.

        Raises:
            PrivacyError: If no release is left.
        """
        if self._left == 0:
            raise PrivacyError("all releases of the ledger's event were made; write another event before the next step")

    def take(self) -> None:
        """Count one release.

        Raises:
            PrivacyError: If none is left.
        """
        self.check()
        self._left -= 1


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRelease:
    """One private step of some clients.

    Attributes:
        noised: Clipped sums with the clients' noise, (client, …) float64. None if only the server adds noise.
        for_server: Clipped sums without noise, for a server that the plan trusts to add its own; (client, …). None
            if it trusts nobody.
    """

    noised: Tensor | None
    for_server: Tensor | None


def private_step(
    plan: RecordLevelPlan,
    payments: Sequence[Payment],
    rows: Rows,
    sources: Iterable[RandomSource],
    masks: Tensor | None = None,
) -> StepRelease:
    """Make one private step of some clients: clip, add up, add noise.

    Guarantee:
        A client's ``noised`` value is the Gaussian mechanism on its clipped sum, with noise of std z·C also for an
        empty batch, at the plan's multiplier for what the client releases itself. If the batch was a Poisson sample at
        the plan's q (`poisson_sample`), the release costs what one release of the plan's event is accounted at. A sum
        without noise is returned only if the plan trusts the server, whose own noise the plan then accounts for.
        Each release is counted down from a payment. If one is used up, nothing is computed.

    Args:
        plan: Terms of clip and noise.
        payments: Payment of each client.
        rows: Rows of one Poisson batch per client.
        sources: Random source of each client's noise; nothing else uses it. None is taken if no client adds noise.
        masks: See `clipped_sums`.

    Returns:
        What leaves the private side.

    Raises:
        PrivacyError: If a payment is used up, or there is not one for each client.

    Example:
        >>> from fl_dualpriv import ModuleLearner, OsRandom, plan_for
        >>> plan = plan_for(epsilon=2.0, delta=1e-5, sampling_rate=0.5, releases=3, clip_norm=1.0)
        >>> payment, learner = Payment(plan, plan.event("mine", 1, 3)), ModuleLearner(torch.nn.Linear(2, 3))
        >>> rows = learner.rows(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> private_step(plan, [payment], rows, [OsRandom()]).noised.shape, payment.left
        (torch.Size([1, 9]), 2)
    """
    for payment in payments:
        payment.check()
    clean = clean_sums(rows, plan, masks)
    if len(payments) != len(clean):
        raise PrivacyError(f"{len(payments)} payments for the rows of {len(clean)} clients; each client needs its own")
    for payment in payments:
        payment.take()
    for_server = torch.stack([c.value for c in clean]) if plan.trusts_server else None
    if plan.trusts_server and not plan.personal:
        return StepRelease(noised=None, for_server=for_server)
    noised = [release(c, plan.local_noise_multiplier, source) for c, source in zip(clean, sources, strict=True)]
    return StepRelease(noised=torch.stack(noised), for_server=for_server)


def clean_sums(rows: Rows, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
    """Compute each client's clipped sum by a plan, before the noise; see `clipped_sums`."""
    return clipped_sums(rows, plan.clip, plan.arithmetic, masks)

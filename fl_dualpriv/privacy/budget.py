"""What the owner of some data allows to be released about one record of it, ever, and the terms on which.

A plan (`privacy.plan`) is what a run promises; in Flower whoever submits the run writes it. A budget is the owner's:
it lies beside the data, and no message or run configuration can change it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_dualpriv.errors import PrivacyError

if TYPE_CHECKING:  # a SuperNode reads a budget and needs neither torch nor an accountant
    from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent
    from fl_dualpriv.privacy.plan import RecordLevelPlan


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits for one client's data at the record level.

    Attributes:
        epsilon: Bound on ε of everything that was ever released, over all runs and servers, > 0.
        delta: δ at which it is stated, in (0, 1).
        max_sampling_rate: Largest q of a step.
        min_noise_multiplier: Least z of a step.
        max_clip_norm: Largest C of a step.
        trusts_server: Whether a clean clipped sum may go to the server.
        scores: Whether accuracies on the held-out images may leave; say true only if those images are public.
        seeded_noise: Whether noise may come from a seed that others know, which protects nobody: for tests.
        integer_arithmetic: Whether sums and noise must be exact integers; else a run chooses, and may take floats.
    """

    epsilon: float
    delta: float
    max_sampling_rate: float
    min_noise_multiplier: float
    max_clip_norm: float
    trusts_server: bool
    scores: bool
    seeded_noise: bool
    integer_arithmetic: bool = False

    def check_plan(self, plan: "RecordLevelPlan | None", *, reproducible: bool) -> None:
        """Refuse a run whose steps are not on the owner's terms.

        Args:
            plan: What the run's configuration promises; None: it would train without record-level privacy.
            reproducible: Whether its noise comes from a seed.

        Raises:
            PrivacyError: With everything that is wrong.
        """
        if plan is None:
            raise PrivacyError(
                "the run trains without record-level differential privacy; the owner of this node releases nothing "
                'without it: set privacy.record.mechanism = "gaussian" and a method that supports it'
            )
        problems = []
        if not plan.sampling_rate <= self.max_sampling_rate:
            problems.append(f"sampling rate {plan.sampling_rate:g}, at most {self.max_sampling_rate:g}")
        if not plan.noise_multiplier >= self.min_noise_multiplier:
            problems.append(f"noise multiplier {plan.noise_multiplier:g}, at least {self.min_noise_multiplier:g}")
        if not plan.clip_norm <= self.max_clip_norm:
            problems.append(f"clip norm {plan.clip_norm:g}, at most {self.max_clip_norm:g}")
        if plan.trusts_server and not self.trusts_server:
            problems.append("an upload without noise (trusts-server), never")
        if self.integer_arithmetic and plan.arithmetic != "integer":
            problems.append(f'privacy.arithmetic = "{plan.arithmetic}", only "integer"')
        if reproducible and not self.seeded_noise:
            problems.append('noise from a seed (privacy.randomness = "seeded"), never')
        if problems:
            raise PrivacyError(
                "the run is outside of what the owner of this node allows: " + "; ".join(problems) + "; it is refused"
            )

    def check_events(self, made: "LedgerContent", further: "Iterable[LedgerEvent]") -> None:
        """Refuse releases that would bring everything ever released above the owner's ε; before they are made.

        Guarantee:
            After this check, ε at ``delta`` of the ledger with ``further`` is at most ``epsilon``. Whoever calls holds
            the ledger (`Ledger.exclusive`) until the events are written.

        Raises:
            PrivacyError: If they would.
        """
        after = made.epsilon(self.delta, further)
        if not (math.isfinite(after) and after <= self.epsilon):
            raise PrivacyError(
                f"the budget of this node's data is ε = {self.epsilon:g} at δ = {self.delta:g}; with the releases that "
                f"are asked for it would be {after:.4g}: the round is refused"
            )

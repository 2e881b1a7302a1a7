"""Krum and multi-Krum (Blanchard et al. 2017, NeurIPS 30): follow the clients that have many others close to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.plan import ServerUnit
from fl_dualpriv.server.strategy import RoundStrategy, Update


@dataclass(kw_only=True)
class Krum(RoundStrategy):
    """Mean of the ``num_selected`` updates with the lowest scores; one update is Krum, more are multi-Krum.

    The score of an update is the sum of its squared distances to the n − f − 2 other updates that are closest to it.
    f is ``num_byzantine``, the number of clients that may send any update. Of equal scores, the lower partition goes
    first. The rule is robust if n ≥ 2f + 3.
    """

    proved_for: ClassVar[tuple[ServerUnit, ...]] = ("client",)
    unproved_because: ClassVar[str] = "uploads that are sums over records are longer the more records a client has"

    num_byzantine: int = 0
    num_selected: int = 1

    def check_options(self) -> None:
        """Refuse options unless n ≥ 2f + 3 for n clients and f ≥ 0, and at least one and at most n − f are selected."""
        clients = len(self.cards)
        most = min(clients - self.num_byzantine, int(self.divisor()) if self.privacy is not None else clients)
        if not 0 <= 2 * self.num_byzantine <= clients - 3:
            raise ConfigError(
                f"plugin.krum.num-byzantine = {self.num_byzantine} with {clients} clients; it needs 2 f + 3 of them"
            )
        if not 1 <= self.num_selected <= max(1, most):
            raise ConfigError(f"plugin.krum.num-selected = {self.num_selected}; it must be 1 to {max(1, most)}")

    def combine(self, updates: Sequence[Update]) -> Tensor:
        """Return the mean of the selected updates, (n_ctx, ctx_dim); 0 without updates."""
        if not updates:
            return torch.zeros(self.prompt.shape, dtype=torch.float64)
        stack = torch.stack([update.diff for update in updates])
        flat = stack.flatten(1)
        squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        squared.fill_diagonal_(torch.inf)  # an update is not its own neighbour
        near = min(max(1, len(updates) - self.num_byzantine - 2), len(updates) - 1)
        scores = squared.sort(dim=1).values[:, :near].sum(dim=1)
        return stack[torch.argsort(scores, stable=True)[: self.num_selected]].mean(dim=0)

    def sensitivity(self) -> float:
        """Return 2 S, for any size of the cohort. The noise does not shrink as clients join: private Krum is costly.

        Theorem. The move is at most 2 S, and no smaller bound holds for all inputs.

        Proof. Every result is a mean of clipped updates, or 0, so it lies in the ball of radius S. Any two points of
        this ball are at most 2 S apart. Two clusters at S e and −S e whose scores tie but for one client reach 2 S. ∎
        """
        return 2 * self.bound()

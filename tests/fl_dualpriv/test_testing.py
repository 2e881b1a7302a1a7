"""The contract test finds what is wrong with a strategy: each of these breaks one clause of it, and only that."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.server.strategy import RoundStrategy, Update
from fl_dualpriv.testing import check_strategy

RECORDS = ("client", "record")


class NoProof(RoundStrategy):
    def combine(self, updates: Sequence[Update]) -> Tensor:
        return 2 * super().combine(updates)


class Skewed(RoundStrategy):
    """Twice the sum, and the sensitivity of the sum."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return 2 * super().combine(updates)

    def sensitivity(self) -> float:
        return super().sensitivity()


class FirstBound(RoundStrategy):
    """Scales its noise to the clip norm of round 1, which adaptive clipping leaves."""

    def sensitivity(self) -> float:
        assert self.privacy is not None
        return self.privacy.bound / self.divisor()


class RealisedMean(RoundStrategy):
    """Divides by how many came, which is private."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        total = sum((u.diff for u in updates), torch.zeros(self.prompt.shape, dtype=torch.float64))
        return total / max(1, len(updates))

    def sensitivity(self) -> float:
        return self.bound() / self.divisor()


class Median(RoundStrategy):
    """An entry-wise median with the sensitivity of a mean."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        if not updates:
            return torch.zeros(self.prompt.shape, dtype=torch.float64)
        return torch.stack([u.diff for u in updates]).median(dim=0).values

    def sensitivity(self) -> float:
        return self.bound() / self.divisor()


class FollowsTheCohort(RoundStrategy):
    """Noise scaled by a realised count: a bound that would hold, and tells who came."""

    came = 1

    def combine(self, updates: Sequence[Update]) -> Tensor:
        self.came = max(1, len(updates))
        return super().combine(updates)

    def sensitivity(self) -> float:
        return self.bound() * self.came


class ForClientsAlone(RoundStrategy):
    """Two clients of one direction count as one: proved for clients at 2 S, and wrong for sums over records."""

    proved_for = RECORDS

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return max((u.diff for u in updates), key=lambda d: float(d.norm()), default=torch.zeros(self.prompt.shape))

    def sensitivity(self) -> float:
        return 2 * self.bound() if self.privacy and self.privacy.unit == "client" else self.bound() / self.divisor()


class Raises(RoundStrategy):
    def combine(self, updates: Sequence[Update]) -> Tensor:
        return torch.stack([u.diff for u in updates]).sum(dim=0) / self.divisor()

    def sensitivity(self) -> float:
        return super().sensitivity()


class OneNumber(RoundStrategy):
    def combine(self, updates: Sequence[Update]) -> Tensor:
        return super().combine(updates).mean()

    def sensitivity(self) -> float:
        return super().sensitivity()


class NanOfOne(RoundStrategy):
    """A standard deviation of one client is NaN."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        if not updates:
            return super().combine(updates)
        rows = torch.stack([u.diff for u in updates])
        return super().combine(updates) + 0 * rows.std(dim=0)

    def sensitivity(self) -> float:
        return super().sensitivity()


class Peeks(RoundStrategy):
    """Keeps clean uploads for after the noise."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        self._clean = super().combine(updates)
        return self._clean

    def sensitivity(self) -> float:
        return super().sensitivity()

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return prompt + diff + self._clean.to(prompt.dtype)


class WritesCleanState(RoundStrategy):
    def combine(self, updates: Sequence[Update]) -> Tensor:
        self.state["last"] = super().combine(updates)
        return self.state["last"]

    def sensitivity(self) -> float:
        return super().sensitivity()


class SkipsNoise(RoundStrategy):
    """Nothing came: no step, and everybody sees that nothing came."""

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return prompt + diff if any(self._asked_and_answered()) else prompt

    def _asked_and_answered(self) -> list[bool]:
        return [self._round_failures < sum(len(members) for members in self._asked.values())]


class OwnNoise(RoundStrategy):
    def _noised(self, *arguments: Any) -> Tensor:
        return self._combined(arguments[0], arguments[1])


class Random(RoundStrategy):
    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return prompt + random.random() * diff


class HiddenMemory(RoundStrategy):
    velocity: Any = 0.0

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        self.velocity = 0.5 * self.velocity + diff
        return prompt + self.velocity


@dataclass(kw_only=True)
class NumberInState(RoundStrategy):
    count: Any = field(default=0, init=False)

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        self.state["rounds"] = int(self.state.get("rounds", 0)) + 1  # type: ignore[assignment]
        return prompt + diff


class LosesShape(RoundStrategy):
    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return (prompt + diff).flatten()


class BlowsUp(RoundStrategy):
    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return prompt + diff / 0


class MoodyWeight(RoundStrategy):
    calls = itertools.count()

    def weight(self, num_examples: int) -> float:
        return 1 / (1 + next(self.calls))


class NanWeight(RoundStrategy):
    def weight(self, num_examples: int) -> float:
        return float("nan") if num_examples > 70 else 1.0


class ByArrival(RoundStrategy):
    """Follows the order of replies, which the network decides."""

    def _read_uploads(self, server_round: int, replies: Any) -> tuple[list[int], Tensor]:
        replies = list(replies)
        self._first = replies[0].metadata.src_node_id if replies else 0
        return super()._read_uploads(server_round, replies)

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        return prompt + self._first * diff


PLANTED = {
    NoProof: r"overrides combine\(\) but not sensitivity",
    Skewed: r"one client moves combine\(\) by 0.23.*; sensitivity\(\) claims at most 0.116",  # 2 S / 6 and S / 6
    FirstBound: r"one client moves combine\(\) by 0.35.*; sensitivity\(\) claims at most 0.116",  # 3 S / 6 and S / 6
    RealisedMean: "one client moves combine",
    Median: "one client moves combine",
    FollowsTheCohort: "changed with the uploads",
    ForClientsAlone: "one record moves combine",
    Raises: "stack expects a non-empty",
    OneNumber: r"gives \(\); expected a tensor of \(4, 5\)",
    NanOfOne: "is not finite",
    Peeks: "depends on uploads",
    WritesCleanState: "combine\\(\\) writes to state",
    SkipsNoise: "has no noise",
    OwnNoise: "overrides _noised",
    Random: "give another prompt",
    HiddenMemory: "a run resumed from its state",
    NumberInState: r"state\['rounds'\] is a int",
    LosesShape: r"shape \(20,\); expected \(4, 5\)",
    BlowsUp: "not finite",
    MoodyWeight: "changes from call to call",
    NanWeight: "nan",
}


@pytest.mark.parametrize("cls", PLANTED, ids=lambda cls: cls.__name__)
def test_a_planted_fault_is_found(cls: type[RoundStrategy]):
    # Errors of a class's own are no less a finding than ours.
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=PLANTED[cls]):
        check_strategy(cls)


def test_without_noise_of_the_server_the_rest_is_checked():
    check_strategy(NoProof, server_noise=False)
    with pytest.raises(AssertionError, match="another prompt"):
        check_strategy(ByArrival, server_noise=False)


def test_an_option_that_is_refused_is_told():
    from strategies.fedavgm import FedAvgM

    with pytest.raises(AssertionError, match=r"FedAvgM cannot start: .*momentum = 2.0"):
        check_strategy(FedAvgM, momentum=2.0)

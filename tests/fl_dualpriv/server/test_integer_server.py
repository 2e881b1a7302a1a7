"""The server's integer sums, driven by hand-made replies: any order, any upload, any cohort; and what it refuses."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.clipping import integer_rows
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.strategy import RoundStrategy, Update
from strategies.dpfpl import DPFPL
from strategies.fedavg import FedAvg
from tests.made_strategy import made_strategy, quiet, training_messages

SHAPE = (2, 3)
SIZES = (10, 20, 30, 40)
UNIT = 2.0**-20  # of the bound, which is 1


def make(
    cls: type[RoundStrategy] = DPFPL,
    unit: Literal["client", "record"] = "client",
    *,
    sizes: Sequence[int] = SIZES,
    noise: float = 1.0,
    rate: float = 0.75,
    sources: Callable[[StreamKey], RandomSource] = quiet,
) -> RoundStrategy:
    privacy = ServerPrivacy(
        unit=unit,
        bound=1.0,
        noise_multiplier=noise,
        sampling_rate=rate,
        ledger_multiplier=noise,
        ledger=None,
        arithmetic="integer",
    )
    return made_strategy(cls, privacy, sources, sizes=sizes)


def step(strategy: RoundStrategy, uploads: Sequence[Tensor | None], order: Sequence[int] | None = None) -> Tensor:
    """One round from a prompt of zeros, times the divisor, in units of the bound; float64 all the way."""
    requests = training_messages(strategy, 1, torch.zeros(SHAPE, dtype=torch.float64))
    replies = []
    for message in requests:
        (partition,) = messages.read_train(message).partitions
        value = uploads[partition]
        if value is not None:
            content = messages.uploads_content(messages.Uploads(partitions=(partition,), values=value[None]))
            replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(1, [replies[i] for i in order] if order else replies)
    assert arrays is not None
    return messages.from_arrays(arrays) * strategy.divisor() / UNIT


def whole(value: Tensor) -> Tensor:
    """A number of units, read off a result that was divided by the divisor."""
    assert (value - value.round()).abs().max() < 1e-6
    return value.round()


@pytest.mark.parametrize("cls", [DPFPL, FedAvg])
def test_client_updates_are_clipped_weighed_cut_and_added_exactly_in_any_order(cls: type[RoundStrategy]) -> None:
    updates = [3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    weights = [1.0] * 4 if cls is DPFPL else [0.25, 0.5, 0.75, 1.0]
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        clipped = update.double() / max(1.0, float(update.double().norm())) * weight
        expected += integer_rows(clipped[None], 1.0)[0]
    results = [step(make(cls), updates, order) for order in itertools.permutations(range(4))]
    assert torch.equal(whole(results[0]), expected)
    assert all(torch.equal(results[0], other) for other in results)


def test_trusted_sums_are_added_exactly_in_any_order() -> None:
    updates = [
        torch.randint(-(2**22), 2**22, SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(4)
    ]
    results = [step(make(unit="record"), updates, order) for order in itertools.permutations(range(4))]
    assert torch.equal(whole(results[0]), torch.stack(updates).sum(0))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("unit", ["client", "record"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300, -0.5, 5e-324, 12345.678], ids=str)
def test_whatever_one_client_sends_the_result_is_whole_and_bounded(
    unit: Literal["client", "record"], bad: float
) -> None:
    honest = [torch.full(SHAPE, 2.0**-3 if unit == "client" else 4096.0) for _ in range(4)]
    broken = torch.full(SHAPE, bad, dtype=torch.float64)
    without = whole(step(make(unit=unit), [None, *honest[1:]]))
    moved = whole(step(make(unit=unit), [broken, *honest[1:]])) - without
    # A client's update, or ten records
    assert float(moved.norm()) <= (1 if unit == "client" else 10) * 2**20 * (1 + 2**-19)
    if not math.isfinite(bad):
        assert not moved.any()


@pytest.mark.parametrize("unit", ["client", "record"])
def test_nobody_there_releases_whole_noise_of_the_same_scale(unit: Literal["client", "record"]) -> None:
    draws = []
    for seed in range(400):
        strategy = make(unit=unit, noise=1.5, rate=1e-9, sources=KeyedRandom)
        strategy.seed = seed
        result = step(strategy, [None] * 4)
        draws.append(result)
    noise = torch.stack(draws)
    # 2400 draws: the standard error of the deviation is 1.4 %, 5 of them
    assert float(noise.std()) / (1.5 * 2**20) == pytest.approx(1, abs=0.07)
    assert (noise - noise.round()).abs().max() < 1e-6


@dataclass(kw_only=True)
class Median(RoundStrategy):
    """Owes a sensitivity and gives one; in integers that is not enough."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return torch.stack([u.diff for u in updates]).median(dim=0).values

    def sensitivity(self) -> float:
        return 2.0


@dataclass(kw_only=True)
class Cautious(RoundStrategy):
    """More noise than needed."""

    def sensitivity(self) -> float:
        return 2 * super().sensitivity()


@pytest.mark.parametrize(("cls", "hook"), [(Median, "combine"), (Cautious, "sensitivity")])
def test_a_strategy_with_a_sum_of_its_own_is_refused(cls: type[RoundStrategy], hook: str) -> None:
    with pytest.raises(PrivacyError, match=f"overrides {hook}"):
        make(cls)


def test_weights_other_than_zero_and_one_are_refused_for_trusted_sums_alone() -> None:
    make(FedAvg, "client")
    make(FedAvg, "record", sizes=(7, 7, 7))  # all alike: every weight is 1
    with pytest.raises(PrivacyError, match="weighs clients"):
        make(FedAvg, "record")


def test_too_many_records_to_add_up_exactly_are_refused() -> None:
    make(unit="client", sizes=(2**31, 2**31))
    make(unit="record", sizes=(2**31, 2**31 - 1))
    with pytest.raises(ValueError, match="2\\*\\*32"):
        make(unit="record", sizes=(2**31, 2**31))

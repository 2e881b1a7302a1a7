"""Adaptive clipping by itself: bits, their noise, the split of the multiplier, and which way the bound moves."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.privacy.accounting import joint_noise_multiplier
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey

ARITHMETICS: tuple[Arithmetic, ...] = ("float", "integer")


def adaptive(**changes: float) -> AdaptiveClip:
    given = {"start": 1.0, "target_quantile": 0.5, "learning_rate": 0.2, "bit_noise": 5.0, "expected_cohort": 100.0}
    return AdaptiveClip(**given | changes)


def source(step: int = 0) -> RandomSource:
    return KeyedRandom(StreamKey(seed=0, purpose="bits", step=step))


def lengths(*norms: float) -> Tensor:
    """Updates of these norms: (client, 1, 2)."""
    return torch.tensor([[[norm, 0.0]] for norm in norms], dtype=torch.float64)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bits_count_updates_within_the_bound_from_a_half(arithmetic: Arithmetic) -> None:
    # Three are within 2 (one of them exactly), one is not: (3 - 1) / 2. Zeros, nan and inf say nothing.
    found = adaptive().bits(lengths(0.1, 1.0, 2.0, 2.1, 0.0, math.nan, math.inf), 2.0, arithmetic)
    assert found.value * (found.grid or 1.0) == 1.0
    assert found.sensitivity * (found.grid or 1.0) == 0.5
    assert adaptive().bits(torch.zeros(0, 1, 2), 2.0, arithmetic).value == 0.0


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_one_client_moves_the_bits_by_at_most_a_half(arithmetic: Arithmetic) -> None:
    updates = torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(0))
    updates[3], updates[4, 0, 0] = 0.0, math.nan
    whole = adaptive().bits(updates, 4.0, arithmetic)
    for gone in range(30):
        rest = adaptive().bits(torch.cat([updates[:gone], updates[gone + 1 :]]), 4.0, arithmetic)
        assert float((whole.value - rest.value).abs()) <= whole.sensitivity


def test_both_views_together_have_the_planned_multiplier() -> None:
    # sigma_b = 1: the bits' multiplier is 2. z = 1.2: z_Delta = (1/1.44 - 1/4)^(-1/2) = 1.5.
    assert adaptive(bit_noise=1.0).update_noise_multiplier(1.2) == pytest.approx(1.5)
    assert joint_noise_multiplier(1.5, 2.0) == pytest.approx(1.2)


def test_a_client_moves_the_pair_by_at_most_one_over_the_planned_multiplier() -> None:
    """In units of each view's noise: (clipped update / (z_Delta S), bit / sigma_b), for updates of any length."""
    own, total = adaptive(bit_noise=0.8), 1.3
    z = own.update_noise_multiplier(total)
    for length in (1e-9, 0.3, 0.7, 1e3, 1e200):
        clipped, _ = clip_rows(lengths(length), 0.7)
        bit = own.bits(lengths(length), 0.7, "float").value
        squared = float((clipped.norm() / (z * 0.7)) ** 2 + (bit / own.bit_noise) ** 2)
        assert squared <= total**-2 * (1 + 1e-12)


def test_bits_that_leak_more_than_the_whole_round_may_are_refused() -> None:
    for bit_noise in (0.1, 0.65):  # 2 sigma_b <= z
        with pytest.raises(ValueError, match=r"it must exceed 0\.65 clients"):
            adaptive(bit_noise=bit_noise).update_noise_multiplier(1.3)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_shares_noise_has_its_scale_for_nobody_too(arithmetic: Arithmetic) -> None:
    nobody = torch.zeros(0, 1, 2)
    shares = [adaptive().released_share(nobody, 1.0, arithmetic, source(step)) for step in range(400)]
    # 1/2 + N(0, (5 / 100)²); standard errors 0.05 / sqrt(400) = 0.0025 and 0.05 / sqrt(800) = 0.00177, 5 of them
    assert abs(float(np.mean(shares)) - 0.5) < 0.0125
    assert abs(float(np.std(shares)) - 0.05) < 0.0089


@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_the_bound_converges_to_the_quantile_from_both_sides(start: float, quantile: float) -> None:
    """Norms are log-normal: the quantile is exp of the normal one. Flower 1.41 walks the other way."""
    norms = np.exp(np.random.default_rng(0).standard_normal((400, 100)))
    own, bound, late = adaptive(start=start, target_quantile=quantile), start, []
    for r, row in enumerate(norms):
        share = own.released_share(lengths(*row), bound, "float", source(r))
        bound = own.moved(bound, share)
        late += [bound] if r >= 200 else []
    # exp(-0.84) and 1. A walk that forgets over 1 / (0.2 φ) ~ 15 rounds with steps of 0.2 · 0.07 = 0.014 from
    # noise and from cohorts, averaged over 200: within 0.04 of the truth; twice that, for luck.
    target = math.exp({0.2: -0.8416, 0.5: 0.0}[quantile])
    assert abs(math.log(float(np.exp(np.mean(np.log(late)))) / target)) < 0.08


def test_a_step_is_geometric_and_goes_down_when_too_many_are_within() -> None:
    own = adaptive()
    assert own.moved(2.0, 1.0) == pytest.approx(2.0 * math.exp(-0.2 * 0.5))  # all within: the bound is too large
    assert own.moved(2.0, 0.0) == pytest.approx(2.0 * math.exp(+0.2 * 0.5))
    assert own.moved(2.0, 0.5) == 2.0


def test_no_run_of_noise_makes_the_bound_unusable() -> None:
    own, bounds = adaptive(), []
    for share in (-1e9, 1e9):
        bound = 1.0
        for _ in range(100):
            bound = own.moved(bound, share)
        bounds.append(bound)
    assert bounds == [2.0**20, 2.0**-20]

"""Shrinkage on matrices worked out by hand, without noise, and its worth where signal and noise are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fl_dualpriv.methods.shrinkage import shrink_by_norm, shrink_singular_values

Shrink = Callable[[Tensor, Tensor], Tensor]
BOTH = pytest.mark.parametrize("shrink", [shrink_by_norm, shrink_singular_values])


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_one_factor_by_hand() -> None:
    # ‖D‖² = 9 + 16 = 25, d = 4, ν = 1: the factor is 1 − 4/25 = 0.84
    found = shrink_by_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), one(1))
    torch.testing.assert_close(found, torch.tensor([[2.52, 3.36], [0.0, 0.0]]))


def test_less_energy_than_noise_is_nothing() -> None:
    # ‖D‖² = 25, d·ν = 4 × 6.25 = 25
    assert not shrink_by_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), one(6.25)).any()
    assert not shrink_by_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), one(7)).any()


def test_square_singular_values_by_hand() -> None:
    # m = n = 2, ν = 1/2: the scale is √(2/2) = 1, β = 1, and η(y) = √((y² − 2)² − 4)/y = √(y² − 4) from 2 on
    found = shrink_singular_values(torch.tensor([[5.0, 0.0], [0.0, 1.9]]), one(0.5))
    torch.testing.assert_close(found, torch.tensor([[math.sqrt(21), 0.0], [0.0, 0.0]]), atol=1e-6, rtol=1e-6)
    # the same turned: [[3, 4], [4, 3]]·5/7 has the singular values 5 along (1, 1)/√2 and 5/7 along (1, −1)/√2
    turned = shrink_singular_values(torch.tensor([[3.0, 4.0], [4.0, 3.0]]) * 5 / 7, one(0.5))
    torch.testing.assert_close(turned, torch.full((2, 2), math.sqrt(21) / 2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tall", [False, True])
def test_a_row_by_hand(tall: bool) -> None:
    # 1 × 4, ν = 1: the scale is √4 = 2, β = 1/4. σ = 6, y = 3: (9 − 1.25)² − 1 = 59.0625, η = √59.0625/3 = 2.561738
    row = torch.tensor([[6.0, 0.0, 0.0, 0.0]])
    found = shrink_singular_values(row.T if tall else row, one(1))
    assert float(found.flatten()[0]) == pytest.approx(2 * math.sqrt(59.0625) / 3, rel=1e-6)
    # the threshold is y = 1 + √β = 1.5, σ = 3
    assert not shrink_singular_values(row * 2.999 / 6, one(1)).any()
    assert float(shrink_singular_values(row * 3.001 / 6, one(1)).norm()) > 0


@BOTH
def test_without_noise_the_matrix_stays_bit_by_bit(shrink: Shrink) -> None:
    d = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shrink(d, torch.zeros(2, dtype=torch.float64)), d)
    mixed = shrink(d, torch.tensor([0.0, 0.1], dtype=torch.float64))
    assert torch.equal(mixed[0], d[0])
    assert float(mixed[1].norm()) < float(d[1].norm())


@BOTH
def test_zero_stays_zero(shrink: Shrink) -> None:
    for variance in (0.0, 1.0):
        assert torch.equal(shrink(torch.zeros(3, 5), one(variance)), torch.zeros(3, 5))


@BOTH
def test_each_client_is_shrunk_by_itself(shrink: Shrink) -> None:
    d = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    variances = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    together = shrink(d, variances)
    for i in range(4):
        assert torch.equal(together[i], shrink(d[i], variances[i]))


@BOTH
def test_the_error_is_near_the_best_and_below_both_extremes(shrink: Shrink) -> None:
    """A signal of rank one in noise of equal energy: D itself errs by d, zero by d; half of D would err by d/2."""
    n, dim, clients = 4, 128, 400
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(clients, n, 1, generator=g) @ torch.randn(clients, 1, dim, generator=g)
    noisy = signal + torch.randn(clients, n, dim, generator=g)
    error = float((shrink(noisy, torch.ones(clients, dtype=torch.float64)) - signal).square().sum()) / clients
    # The best single factor errs by Σ X²·ν d/(X² + ν d) on average, at most d/2; 400 matrices spread it by about 3 %.
    assert error < 0.55 * n * dim
    if shrink is shrink_singular_values:  # it also drops the noise of the other three rows
        assert error < 0.35 * n * dim


@BOTH
def test_pure_noise_all_but_vanishes(shrink: Shrink) -> None:
    noise = torch.randn(400, 4, 128, generator=torch.Generator().manual_seed(0))
    left = shrink(noise, torch.ones(400, dtype=torch.float64)).square().sum() / noise.square().sum()
    # One factor: E max(0, 1 − d/χ²_d)² = half of the variance of the factor, 2/d, times 1/2: 0.2 %.
    assert float(left) < 0.05

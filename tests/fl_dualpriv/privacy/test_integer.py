"""The rounded Gaussian against mpmath: its law, its error bound, and the digits that it draws when two do not do."""

import math
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtri

from fl_dualpriv.privacy import integer as module
from fl_dualpriv.privacy.integer import LARGEST_STD, NDTRI_ERROR, rounded_gaussian
from fl_dualpriv.privacy.noise import KeyedRandom, OsRandom, StreamKey, gaussian_noise


def keyed(purpose: str = "test") -> KeyedRandom:
    return KeyedRandom(StreamKey(seed=7, purpose=purpose))


class Scripted:
    """The words that it is given, one after the other."""

    reproducible = True

    def __init__(self, *words: int) -> None:
        self._words: Iterator[int] = iter(words)
        self.used = 0

    def words(self, count: int) -> np.ndarray:
        self.used += count
        return np.array([next(self._words) for _ in range(count)], dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        raise AssertionError("integer noise takes words")


def probability(k: int, std: float) -> float:
    """P(round(N(0, std²)) = k), to 50 digits."""
    with mpmath.workdps(50):
        low, high = ((2 * k + sign) / (2 * mpmath.mpf(std)) for sign in (-1, 1))
        return float(mpmath.ncdf(high) - mpmath.ncdf(low))


@pytest.mark.parametrize("std", [0.3, 0.7, 1.0, 2.5, 6.0])
def test_small_scales_have_the_exact_probabilities(std: float) -> None:
    draws = rounded_gaussian(keyed(f"chi-square-{std}"), (200_000,), std).numpy().astype(int)
    values = [k for k in range(-60, 61) if probability(k, std) * len(draws) >= 10]
    expected = np.array([probability(k, std) for k in values]) * len(draws)
    found = np.array([(draws == k).sum() for k in values])
    assert chi_square(found, expected, len(draws)) < stats.chi2.ppf(1 - 1e-6, len(values))
    # The test sees a wrong rounding: down instead of to the nearest.
    down = np.floor(gaussian_noise(keyed(f"floor-{std}"), (len(draws),), std).numpy())
    floored = np.array([(down == k).sum() for k in values])
    assert chi_square(floored, expected, len(draws)) > 10 * stats.chi2.ppf(1 - 1e-6, len(values))


def chi_square(found: np.ndarray, expected: np.ndarray, total: int) -> float:
    """With one more cell for all other integers, if that is more than a few."""
    rest = total - expected.sum()
    statistic = ((found - expected) ** 2 / expected).sum()
    return float(statistic + (found.sum() - expected.sum()) ** 2 / rest if rest > 1 else statistic)


def test_the_error_bound_of_ndtri_holds_with_room() -> None:
    """By its own inverse: the relative error is (Φ(x) − p) / (φ(x) x) to first order, and 2**-46 is small."""
    near_zero, near_half = 2.0 ** -np.arange(1.02, 53.0, 0.25), 0.5 - 2.0 ** -np.arange(3.0, 53.0)
    borders = np.nextafter([math.exp(-2), math.exp(-32), 0.25, 0.125], [0, 0, 0, 0])  # where approximations change
    spread = np.random.default_rng(0).random(1500) / 2
    worst = 0.0
    with mpmath.workdps(60):
        for p in np.concatenate([near_zero, near_half, borders, spread, [2.0**-53, 2.0**-52]]):
            x = mpmath.mpf(float(ndtri(p)))
            error = (mpmath.erfc(-x / mpmath.sqrt(2)) / 2 - mpmath.mpf(float(p))) / (mpmath.npdf(x) * x)
            worst = max(worst, abs(float(error)))
    # 5.0e-16 with scipy 1.17: the bound of 1.4e-14 leaves 25 times as much
    assert worst < NDTRI_ERROR / 10
    assert float(ndtri(0.5)) == 0.0


@pytest.mark.parametrize("std", [1.0, 1.7 * 2**20, 2.0**40], ids=["1", "2^20", "2^40"])
def test_the_fast_way_agrees_with_bisection_at_high_precision(std: float) -> None:
    words = keyed("bisection").words(150)
    found = rounded_gaussian(Scripted(*map(int, words), *[2**63] * 200), (150,), std)
    for word, value in zip(words, found.tolist(), strict=True):
        negative = int(word) < 2**63
        folded = int(word) if negative else 2**64 - 1 - int(word)
        size = module._resolve(Scripted(*[2**63] * 20), folded, 0, math.ceil(64 * std), std)
        assert value == (-size if negative else size)


def border_word(k: int, std: float) -> int:
    """The word in whose interval |N| = k + 1/2 lies, negative."""
    with mpmath.workdps(60):
        return int(mpmath.floor(mpmath.erfc((2 * k + 1) / (2 * mpmath.mpf(std) * mpmath.sqrt(2))) * 2**63))


@pytest.mark.parametrize("std", [1.0, 1e6])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_uniform_on_a_border_is_decided_by_its_next_digits(std: float, k: int) -> None:
    word = border_word(k, std)
    with mpmath.workdps(60):
        exact = mpmath.erfc((2 * k + 1) / (2 * mpmath.mpf(std) * mpmath.sqrt(2))) * 2**127
        digits = int(mpmath.floor(exact)) - (word << 64)
    below, above = Scripted(word, digits - 2), Scripted(word, digits + 2)
    # A smaller V is farther out: |N| >= k + 1/2 rounds to k + 1.
    assert rounded_gaussian(below, (1,), std).item() == -(k + 1)
    assert rounded_gaussian(above, (1,), std).item() == -k + 0.0
    assert below.used == above.used == 2
    # On the border of two words as well, a third one decides.
    third = Scripted(word, digits, 0)
    rounded_gaussian(third, (1,), std)
    assert third.used == 3


def test_tails_go_on_where_52_bits_end() -> None:
    # 52-bit uniforms end at 8.2 std. V = 2**-63 (the smallest word and all further digits at one half) is 9.03 std out.
    with mpmath.workdps(40):
        expected = -round(float(-mpmath.sqrt(2) * mpmath.erfinv(mpmath.mpf(2) ** -64 - 1) * 2**20))
    assert rounded_gaussian(Scripted(0, *[2**63] * 15), (1,), 2.0**20).item() == expected
    assert expected < -9 * 2**20
    # 0, 0, ...: 1023 digits are the most, and 38 std the farthest; 2**-1023 of probability.
    silent = Scripted(*[0] * 16)
    assert -39 * 2**20 < rounded_gaussian(silent, (1,), 2.0**20).item() < -36 * 2**20
    assert silent.used == 16


def test_it_is_the_float_noise_of_the_same_stream_rounded() -> None:
    std = 1.3 * 2**20
    integers, floats = rounded_gaussian(keyed(), (100_000,), std), gaussian_noise(keyed(), (100_000,), std)
    # The float's uniform has 52 bits: far from a border both round to the same integer.
    assert (integers - floats).abs().max() <= 0.5 + 1e-6
    assert (integers == floats.round()).double().mean() > 0.9999


@pytest.mark.parametrize("std", [0.5, 2.0**20, LARGEST_STD], ids=["1/2", "2^20", "2^46"])
def test_draws_are_integers_in_the_exact_range_and_no_negative_zeros(std: float) -> None:
    draws = rounded_gaussian(OsRandom(), (40, 50), std)
    assert draws.shape == torch.Size([40, 50])
    assert draws.dtype == torch.float64
    assert torch.equal(draws, draws.round())
    assert draws.abs().max() < 2**52
    assert not torch.signbit(draws[draws == 0]).any()


def test_no_std_is_no_noise_and_takes_nothing() -> None:
    source = Scripted()
    assert not rounded_gaussian(source, (3, 2), 0.0).any()
    assert source.used == 0
    assert rounded_gaussian(OsRandom(), (0, 4), 1.0).shape == torch.Size([0, 4])


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 2.0**46 + 1], ids=str)
def test_a_scale_out_of_range_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        rounded_gaussian(OsRandom(), (1,), std)


def test_without_the_wider_interval_some_draws_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the largest scale ndtri's own error is some hundredths of a unit.
    right = rounded_gaussian(keyed("wider"), (2000,), LARGEST_STD)
    monkeypatch.setattr(module, "_WIDER", 0.0)
    wrong = rounded_gaussian(keyed("wider"), (2000,), LARGEST_STD) != right
    assert 0 < int(wrong.sum()) < 200

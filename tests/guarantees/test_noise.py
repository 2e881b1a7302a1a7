"""The noise has the distribution and the independence that the accounting assumes."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fl_dualpriv.privacy.noise import (
    KeyedRandom,
    OsRandom,
    RandomSource,
    StreamKey,
    _to_open_unit_interval,
    gaussian_noise,
    poisson_sample,
    random_sources,
)

SOURCES = [pytest.param(OsRandom(), id="os"), pytest.param(KeyedRandom(StreamKey(seed=3, purpose="test")), id="keyed")]


@pytest.mark.parametrize("source", SOURCES)
def test_a_million_draws_have_the_scale(source: RandomSource) -> None:
    draws = gaussian_noise(source, (1_000_000,), 2.5).numpy()
    # The standard error of the sample deviation is 1/sqrt(2n) = 0.07 %; 0.5 % is 7 of them.
    assert abs(draws.std() / 2.5 - 1) < 0.005
    # Mean: 2.5/1000 per standard error; 6 of them. Kurtosis: sqrt(24/n) = 0.005; 6 of them.
    assert abs(draws.mean()) < 6 * 2.5e-3
    assert abs(stats.kurtosis(draws)) < 6 * math.sqrt(24 / 1e6)


@pytest.mark.parametrize("source", SOURCES)
def test_kolmogorov_smirnov_accepts_the_scale_and_rejects_others(source: RandomSource) -> None:
    draws = gaussian_noise(source, (4096,), 1.0).numpy()
    # p < 1e-6 once in a million runs when right; 2/3 and 3/2 of the scale give p far below.
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    assert stats.kstest(draws * 2 / 3, "norm").pvalue < 1e-6
    assert stats.kstest(draws * 3 / 2, "norm").pvalue < 1e-6


def test_zero_std_is_no_noise_and_bad_std_is_refused() -> None:
    assert not gaussian_noise(OsRandom(), (3, 2), 0.0).any()
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std"):
            gaussian_noise(OsRandom(), (1,), std)


def test_uniforms_stay_inside_the_open_interval() -> None:
    low, high = _to_open_unit_interval(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < low < high < 1


BASE = StreamKey(seed=1, purpose="noise", partition=2, server_round=3, step=4)
OTHERS = [
    StreamKey(seed=2, purpose="noise", partition=2, server_round=3, step=4),
    StreamKey(seed=1, purpose="batch", partition=2, server_round=3, step=4),
    StreamKey(seed=1, purpose="noise", partition=3, server_round=3, step=4),
    StreamKey(seed=1, purpose="noise", partition=2, server_round=4, step=4),
    StreamKey(seed=1, purpose="noise", partition=2, server_round=3, step=5),
]


def test_a_key_gives_one_stream() -> None:
    assert np.array_equal(KeyedRandom(BASE).uniforms(100), KeyedRandom(BASE).uniforms(100))


@pytest.mark.parametrize("other", OTHERS, ids=["seed", "purpose", "client", "round", "step"])
def test_streams_of_different_keys_are_independent(other: StreamKey) -> None:
    a = gaussian_noise(KeyedRandom(BASE), (100_000,), 1.0)
    b = gaussian_noise(KeyedRandom(other), (100_000,), 1.0)
    # The correlation of independent draws has standard error 1/sqrt(n) = 0.0032; 6 of them.
    assert abs(float((a * b).mean())) < 6 / math.sqrt(100_000)


def test_two_draws_of_one_source_are_independent() -> None:
    for source in (OsRandom(), KeyedRandom(BASE)):
        a, b = gaussian_noise(source, (100_000,), 1.0), gaussian_noise(source, (100_000,), 1.0)
        assert abs(float((a * b).mean())) < 6 / math.sqrt(100_000)


def test_os_randomness_ignores_the_key_and_says_so() -> None:
    make = random_sources("os")
    assert not make(BASE).reproducible
    assert not np.array_equal(make(BASE).uniforms(10), make(BASE).uniforms(10))
    assert random_sources("seeded")(BASE).reproducible
    with pytest.raises(ValueError, match="randomness"):
        random_sources("numpy")


@pytest.mark.parametrize("source", SOURCES)
def test_poisson_sampling_is_independent_coins(source: RandomSource) -> None:
    n, q, draws = 50, 0.15, 4000
    joined = np.zeros((draws, n))
    for row in joined:
        row[poisson_sample(source, n, q)] = 1
    # Every record joins at rate q: standard error sqrt(q(1-q)/draws) = 0.0056; 6 of them.
    assert np.abs(joined.mean(0) - q).max() < 6 * math.sqrt(q * (1 - q) / draws)
    # Independent coins: the batch size is binomial, with variance n q (1-q) = 6.375 (a fixed-size sampler has 0).
    assert joined.sum(1).var() == pytest.approx(n * q * (1 - q), rel=0.15)
    # Two records join together at rate q²; standard error 0.0023.
    assert abs((joined[:, 0] * joined[:, 1]).mean() - q * q) < 6 * math.sqrt(q * q / draws)


def test_poisson_sampling_extremes() -> None:
    assert len(poisson_sample(OsRandom(), 0, 0.5)) == 0
    assert poisson_sample(OsRandom(), 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert len(poisson_sample(OsRandom(), 5, 0.0)) == 0
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sampling rate"):
            poisson_sample(OsRandom(), 5, rate)


def test_noise_is_added_in_the_shape_asked_for() -> None:
    assert gaussian_noise(OsRandom(), (4, 32), 1.0).shape == torch.Size([4, 32])

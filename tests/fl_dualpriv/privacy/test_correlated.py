"""Correlated noise against theory: factors, sensitivities by brute force, covariance, charges, error."""

import itertools
import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from numpy.linalg import inv

from fl_dualpriv.privacy.accounting import COARSE_GRID, composed_epsilon, gathered
from fl_dualpriv.privacy.correlated import (
    BandedNoise,
    CorrelatedNoise,
    RoundRobin,
    TreeNoise,
    best_bands,
    separation_for,
    square_root_coefficients,
)
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise


def plan(rounds: int, separation: int) -> RoundRobin:
    return RoundRobin(rounds=rounds, separation=separation)


def noises(rounds: int, separation: int) -> list[CorrelatedNoise]:
    schedule = plan(rounds, separation)
    return [TreeNoise(schedule=schedule), *(BandedNoise(schedule=schedule, bands=p) for p in (1, 2, 3, rounds, 99))]


def dense(noise: CorrelatedNoise) -> np.ndarray:
    """C, entry by entry, by its definition and not by our code."""
    rounds = noise.schedule.rounds
    if isinstance(noise, BandedNoise):
        c = [math.comb(2 * k, k) / 4**k for k in range(rounds)]
        return np.array([[c[t - j] if 0 <= t - j < noise.bands else 0 for j in range(rounds)] for t in range(rounds)])
    # Row t (from 1) covers rounds t - 2^v + 1 … t, 2^v the largest power of two that divides t.
    sizes = [next(2**v for v in range(20, -1, -1) if t % 2**v == 0) for t in range(1, rounds + 1)]
    return np.array([[t - size <= j < t for j in range(rounds)] for t, size in enumerate(sizes, 1)], dtype=float)


def patterns(schedule: RoundRobin) -> list[list[int]]:
    """Rounds (from 0) of each of many clients, as the schedule's cohorts say."""
    population = 3 * schedule.separation
    cohorts = [schedule.cohort(t, population).tolist() for t in range(1, schedule.rounds + 1)]
    return [[t for t, cohort in enumerate(cohorts) if client in cohort] for client in range(population)]


# --- schedule -----------------------------------------------------------------------------------------------------


def test_clients_take_turns_at_a_distance_and_no_more_often_than_said() -> None:
    for rounds, separation in ((7, 3), (6, 3), (3, 5), (4, 1)):
        schedule = plan(rounds, separation)
        turns = patterns(schedule)
        assert max(map(len, turns)) == schedule.most_rounds
        assert all(b - a == separation for mine in turns for a, b in itertools.pairwise(mine))
        # Everybody is in exactly one of every so many rounds.
        assert sum(map(len, turns)) == 3 * rounds
    assert plan(6, 3).cohort(4, 10).tolist() == [1, 4, 7]  # 4 mod 3


def test_no_round_is_beyond_the_schedule() -> None:
    for server_round in (0, 7):
        with pytest.raises(ValueError, match="a schedule of 6 rounds"):
            plan(6, 3).cohort(server_round, 10)


def test_the_separation_is_population_over_cohort() -> None:
    assert [separation_for(100, m) for m in (100.0, 20.0, 30.0, 0.5)] == [1, 5, 3, 200]


# --- factors ------------------------------------------------------------------------------------------------------


def test_square_root_coefficients_are_central_binomials() -> None:
    expected = [math.comb(2 * k, k) / 4**k for k in range(20)]
    assert square_root_coefficients(20) == pytest.approx(expected, rel=1e-14)


def test_the_square_root_squares_to_prefix_sums() -> None:
    c = dense(BandedNoise(schedule=plan(16, 1), bands=16))
    assert c @ c == pytest.approx(np.tril(np.ones((16, 16))))


@pytest.mark.parametrize("rounds", [1, 2, 7, 8, 13])
def test_factors_are_lower_triangular_with_a_diagonal_of_ones(rounds: int) -> None:
    """What the proofs rest on: adaptivity, and signs that make equal terms the worst case."""
    for noise in noises(rounds, 2):
        c = dense(noise)
        assert (c == np.tril(c)).all()
        assert (np.diag(c) == 1).all()
        assert (c >= 0).all()


def test_noise_is_the_inverse_of_the_factor_applied_to_fresh_draws() -> None:
    for rounds, separation in ((1, 1), (13, 3), (16, 4)):
        for noise in noises(rounds, separation):
            fresh = torch.randn(rounds, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            memory, made = torch.zeros(noise.memory_rows, 2, 3, dtype=torch.float64), []
            for t in range(rounds):
                row, memory = noise.unit_noise(t + 1, fresh[t], memory)
                assert memory.shape == (noise.memory_rows, 2, 3)
                made.append(row)
            assert torch.stack(made).flatten(1).numpy() == pytest.approx(inv(dense(noise)) @ fresh.flatten(1).numpy())


def test_the_covariance_of_drawn_noise_is_that_of_the_inverse_factor() -> None:
    """Through the generator: 100,000 coordinates; standard error of an entry about sqrt(2 / 100,000) = 0.0045."""
    for noise in (TreeNoise(schedule=plan(6, 2)), BandedNoise(schedule=plan(6, 2), bands=3)):
        memory, rows = torch.zeros(noise.memory_rows, 100_000, dtype=torch.float64), []
        for t in range(1, 7):
            source = KeyedRandom(StreamKey(seed=1, purpose="server-noise", server_round=t))
            row, memory = noise.unit_noise(t, gaussian_noise(source, (100_000,), 1.0), memory)
            rows.append(row.numpy())
        c = dense(noise)
        expected = inv(c) @ inv(c).T
        assert np.abs(np.cov(rows) - expected).max() < 6 * 0.0045 * expected.max()


# --- sensitivity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "separation"), [(1, 1), (5, 1), (8, 3), (9, 2), (12, 4), (6, 20)])
def test_sensitivity_is_the_largest_over_all_patterns_and_moves(rounds: int, separation: int) -> None:
    rng = np.random.default_rng(0)
    for noise in noises(rounds, separation):
        c, largest = dense(noise), 0.0
        for turns in patterns(noise.schedule):
            if not turns:
                continue
            largest = max(largest, float(np.linalg.norm(c[:, turns].sum(axis=1))))
            # Neither other directions, nor shorter moves, nor every choice of signs reaches further.
            moves = rng.standard_normal((200, len(turns), 3))
            moves /= np.maximum(1, np.linalg.norm(moves, axis=2, keepdims=True))
            signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(turns))))[:256, :, None]
            for some in (moves, signs):
                assert np.linalg.norm(c[:, turns] @ some, axis=(1, 2)).max() <= noise.sensitivity * (1 + 1e-12)
        assert noise.sensitivity == pytest.approx(largest)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 7, 8, 100, 1024])
def test_a_trees_sensitivity_to_one_participation_is_the_root_of_its_height(rounds: int) -> None:
    tree = TreeNoise(schedule=plan(rounds, rounds))
    assert tree.sensitivity == pytest.approx(math.sqrt(math.floor(math.log2(rounds)) + 1))
    assert tree.memory_rows == math.floor(math.log2(rounds)) + 1


def test_columns_within_the_bands_do_not_overlap() -> None:
    c = square_root_coefficients(5)
    banded = BandedNoise(schedule=plan(60, 5), bands=5)  # 12 participations
    assert banded.sensitivity == pytest.approx(math.sqrt(12) * np.linalg.norm(c))
    assert BandedNoise(schedule=plan(60, 5), bands=1).sensitivity == pytest.approx(math.sqrt(12))


# --- accounting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "separation"), [(12, 1), (12, 4), (20, 5)])
def test_charges_of_all_rounds_are_one_gaussian_of_the_planned_multiplier(rounds: int, separation: int) -> None:
    for noise in noises(rounds, separation):
        charges = noise.charges(1.7, rounds)
        # No less, up to float rounding, and next to nothing more.
        assert sum(charge.noise_multiplier**-2 for charge in charges) == pytest.approx(1.7**-2, rel=1e-9)
        assert all(charge.sampling_rate == 1 for charge in charges)


def test_epsilon_of_a_run_is_dp_accountings_of_one_gaussian() -> None:
    charges = gathered(TreeNoise(schedule=plan(12, 4)).charges(1.7, 12))
    one = pld.PLDAccountant().compose(dp_accounting.GaussianDpEvent(1.7)).get_epsilon(1e-5)
    assert composed_epsilon(charges, 1e-5, COARSE_GRID) == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("separation", [1, 3])
def test_charges_of_a_part_cover_what_the_part_released(separation: int) -> None:
    """The first t rounds are a Gaussian release of their own, by the leading block of C, with the noise of all."""
    for noise in noises(11, separation):
        sigma, c = noise.sigma(1.7), dense(noise)
        for t in range(1, 12):
            part = max(
                float(np.linalg.norm(c[:t, [r for r in turns if r < t]].sum(axis=1)))
                for turns in patterns(noise.schedule)
            )
            charged = sum(charge.noise_multiplier**-2 for charge in noise.charges(1.7, t))
            assert (part / sigma) ** 2 <= charged * (1 + 1e-12)
            assert charged == pytest.approx((part / sigma) ** 2, rel=1e-9)


def test_a_round_made_again_is_charged_as_another_row() -> None:
    """Twice the same round: C gets its row a second time; the charges cover the sensitivity of that matrix."""
    for noise in noises(9, 3):
        c = dense(noise)
        for again in range(1, 10):
            longer = np.vstack([c, c[again - 1 : again]])
            worst = max(float(np.linalg.norm(longer[:, turns].sum(axis=1))) for turns in patterns(noise.schedule))
            charges = [*noise.charges(1.0, 9), noise.charge(1.0, again, again=True)]
            charged = sum(charge.noise_multiplier**-2 for charge in charges)
            assert charged >= (worst / noise.sigma(1.0)) ** 2 * (1 - 1e-12)


# --- error --------------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_factorisation() -> None:
    for noise in noises(13, 4):
        spread = np.tril(np.ones((13, 13))) @ inv(dense(noise))
        assert noise.prefix_norm() == pytest.approx(np.linalg.norm(spread) / math.sqrt(13))
        assert noise.error() == pytest.approx(noise.sensitivity * noise.prefix_norm())


def test_correlated_noise_has_less_error_in_sums_than_independent_noise() -> None:
    """100 rounds, each client in ten of them: independent noise of z sqrt(10) has sqrt(10 · 50.5) = 22.47 z."""
    schedule = plan(100, 10)
    independent, tree = BandedNoise(schedule=schedule, bands=1), TreeNoise(schedule=schedule)
    best = BandedNoise(schedule=schedule, bands=best_bands(schedule, 64))
    assert independent.error() == pytest.approx(math.sqrt(10 * 50.5))
    assert tree.error() == pytest.approx(18.39, abs=0.01)
    assert best.bands == 10
    assert best.error() == pytest.approx(9.61, abs=0.01)


def test_with_everybody_in_each_round_correlation_gains_nothing() -> None:
    schedule = plan(50, 1)
    assert best_bands(schedule, 64) == 1
    assert TreeNoise(schedule=schedule).error() > BandedNoise(schedule=schedule, bands=1).error()


def test_the_best_bands_stay_within_what_may_be_remembered() -> None:
    schedule = plan(200, 100)
    assert best_bands(schedule, 8) <= 8 < best_bands(schedule, 64) <= 64
    tried = [replace(BandedNoise(schedule=schedule, bands=8), bands=p).error() for p in range(1, 9)]
    assert min(tried) == tried[-1]

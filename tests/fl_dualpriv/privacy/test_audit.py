"""The auditor's statistics: exact cases, mechanisms whose leak is known, and how often the bound is wrong."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from fl_dualpriv.privacy import audit
from fl_dualpriv.privacy.accounting import epsilon as accounted_epsilon
from fl_dualpriv.privacy.audit import (
    epsilon_lower_bound,
    gaussian_epsilon,
    guessing_p_value,
    most_provable,
    one_run_bound,
    separation,
)


def coins(rng: np.random.Generator, m: int) -> np.ndarray:
    return rng.random(m) < 0.5


# --- exact cases ----------------------------------------------------------------------------------------------------


def test_all_of_a_hundred_guesses_right_prove_the_epsilon_that_a_hand_can_compute():
    # q^100 = 0.05 at q = 0.05^0.01 = 0.97048; ln(q / (1 - q)) = 3.4926
    q = 0.05**0.01
    assert epsilon_lower_bound(100, 100, 100, 0.0, 0.95) == pytest.approx(math.log(q / (1 - q)), abs=2e-4)
    assert epsilon_lower_bound(100, 100, 100, 0.0, 0.95) == pytest.approx(3.4926, abs=1e-3)


def test_half_of_the_guesses_right_prove_nothing():
    assert epsilon_lower_bound(1000, 1000, 500, 1e-6, 0.95) == 0.0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 30.0])
def test_without_delta_the_p_value_is_the_binomial_tail(epsilon: float):
    tail = stats.binom.sf(69, 80, expit(epsilon))
    assert guessing_p_value(200, 80, 70, epsilon, 0.0) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize("correct", [1, 40, 63, 80])
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_the_p_value_is_the_formula_of_the_paper_term_by_term(correct: int, epsilon: float):
    m, r, delta = 200, 80, 1e-3  # 2mδ = 0.4 <= 1: nothing was enlarged
    weights = [stats.binom.pmf(k, r, expit(epsilon)) for k in range(r + 1)]
    beta = sum(weights[correct:])
    alpha = max(sum(weights[max(0, correct - i) : correct]) / i for i in range(1, m + 1))
    expected = min(1.0, beta + 2 * m * delta * alpha)
    assert guessing_p_value(m, r, correct, epsilon, delta) == pytest.approx(expected, rel=1e-8)


def test_more_delta_than_the_formula_is_monotone_for_only_enlarges_it():
    m, r, v, delta = 200, 80, 75, 0.01  # 2mδ = 4
    for epsilon in (0.2, 1.0, 2.5, 4.0):
        weights = [stats.binom.pmf(k, r, expit(epsilon)) for k in range(r + 1)]
        alpha = max(sum(weights[max(0, v - i) : v]) / i for i in range(1, m + 1))
        assert guessing_p_value(m, r, v, epsilon, delta) >= min(1.0, sum(weights[v:]) + 2 * m * delta * alpha) - 1e-12


# --- mechanisms whose leak is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_as_bad_as_the_p_value_says(epsilon: float):
    # Each coin is told truly with chance e^ε / (1 + e^ε): exactly ε-DP, and r guesses have a binomial number right.
    for v in range(0, 61, 5):
        exact = stats.binom.sf(v - 1, 60, expit(epsilon))
        assert guessing_p_value(60, 60, v, epsilon, 0.0) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-4, 1e-3, 1e-2])
def test_mechanisms_that_use_up_their_delta_stay_below_the_p_value(delta: float):
    m, epsilon = 60, 1.0
    for v in range(m + 1):
        honest = stats.binom.sf(v - 1, m, expit(epsilon))
        everything = delta + (1 - delta) * honest  # with chance δ all coins are shown: (ε, δ)-DP
        each = stats.binom.sf(v - 1, m, delta + (1 - delta) * expit(epsilon))  # each coin with chance δ
        bound = guessing_p_value(m, m, v, epsilon, delta)
        assert max(everything, each) <= bound + 1e-12
    # The term in δ is what keeps the promise: all 60 right come with chance δ, the binomial tail says 7e-9.
    assert stats.binom.sf(m - 1, m, expit(epsilon)) < 1e-3 * delta
    assert guessing_p_value(m, m, m, epsilon, delta) >= delta


def response_bounds(bound: Callable[[np.ndarray, np.ndarray], float], epsilon: float, m: int, runs: int) -> np.ndarray:
    """Bounds from runs of randomised response; a score is the answer, and chance breaks ties."""
    found = []
    for run in range(runs):
        rng = np.random.default_rng([7, run])
        present = coins(rng, m)
        answer = np.where(rng.random(m) < expit(epsilon), present, ~present)
        found.append(bound(answer + 0.1 * rng.random(m), present))
    return np.array(found)


def test_the_bound_is_wrong_about_as_often_as_it_may_be():
    def all_guessed(scores: np.ndarray, present: np.ndarray) -> float:
        correct = int(((scores > 0.5) == present).sum())
        return epsilon_lower_bound(len(present), len(present), correct, 0.0, 0.9)

    wrong = (response_bounds(all_guessed, 1.0, 400, 1000) > 1.0).mean()
    # 10 % of 1000 runs, less what a whole number of guesses takes; standard error below 1 %
    assert 0.05 < wrong < 0.13


def test_trying_several_numbers_of_guesses_does_not_make_the_bound_wrong_more_often():
    wrong = (response_bounds(lambda s, p: one_run_bound([s], p, 0.0, 0.9).epsilon, 1.0, 1024, 300) > 1.0).mean()
    assert wrong <= 0.1 + 3 * 0.0173  # sqrt(0.1 · 0.9 / 300)


def test_a_bound_without_the_union_bound_would_be_wrong_too_often(monkeypatch: pytest.MonkeyPatch):
    """The best of many scores that say nothing: each alone is fooled in 1 of 10 runs, some one of them in most."""

    def fooled(runs: int) -> float:
        found = []
        for run in range(runs):
            rng = np.random.default_rng([11, run])
            scores = [rng.random(256) for _ in range(20)]
            found.append(one_run_bound(scores, coins(rng, 256), 0.0, 0.9).epsilon > 0)
        return float(np.mean(found))

    assert fooled(150) <= 0.1 + 3 * 0.0245  # sqrt(0.1 · 0.9 / 150)
    search = audit._search
    tests = 20 * len(list(audit._numbers_of_guesses(256)))
    monkeypatch.setattr(
        audit, "_search", lambda m, r, v, delta, level, at_least: search(m, r, v, delta, level * tests, at_least)
    )
    assert fooled(40) > 0.5


@pytest.mark.parametrize("claim", [1.0, 4.0])
def test_a_gaussian_mechanism_is_bounded_below_its_epsilon_and_without_noise_above(claim: float):
    delta, m = 1e-6, 4096
    mu = next(mu for mu in np.arange(0.01, 3, 0.01) if gaussian_epsilon(mu, delta) > claim)
    found = []
    for run in range(20):
        rng = np.random.default_rng([3, run])
        present = coins(rng, m)
        found.append(one_run_bound([mu * present + rng.standard_normal(m)], present, delta).epsilon)
    assert max(found) < claim
    assert np.median(found) > 0.2 * claim  # one run sees a part of it, and not nothing
    present = coins(np.random.default_rng(0), m)
    assert one_run_bound([mu * present], present, delta).epsilon > claim


# --- how it moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.02], ids=["pure", "small", "2mδ above 1"])
def test_the_p_value_grows_with_epsilon(delta: float):
    values = [guessing_p_value(500, 300, 260, epsilon, delta) for epsilon in np.linspace(0, 12, 200)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_the_bound_grows_with_right_guesses_and_shrinks_with_delta_confidence_and_canaries():
    def bound(m: int = 2000, v: int = 950, delta: float = 1e-5, confidence: float = 0.95) -> float:
        return epsilon_lower_bound(m, 1000, v, delta, confidence)

    assert bound(v=900) < bound() < bound(v=990)
    assert bound(delta=1e-4) < bound() < bound(delta=0.0)
    assert bound(confidence=0.99) < bound() < bound(confidence=0.9)
    assert bound(m=20_000) < bound()  # more canaries that were not guessed: more chances for δ


def test_scores_that_are_the_coins_prove_as_much_as_can_be_proved():
    present = coins(np.random.default_rng(0), 24_576)
    found = one_run_bound([np.zeros(24_576), present.astype(float)], present, 1e-8)
    assert found.statistic == 1
    assert found.correct == found.guesses
    assert found.epsilon == pytest.approx(most_provable(24_576, 1e-8, statistics=2), abs=1e-3)
    # e^(-r / e^ε) = 0.05 / tests, with 2 scores x 18 numbers of guesses: 11,974 on a side, halved down to 46
    assert found.epsilon == pytest.approx(math.log(found.guesses / math.log(36 / 0.05)), abs=0.02)
    assert found.epsilon > 8


def test_what_was_rarely_sampled_is_found_by_guesses_of_presence_alone():
    rng = np.random.default_rng(1)
    present = coins(rng, 8192)
    seen = present & (rng.random(8192) < 0.3)  # the others leave no trace
    scores = seen + 0.01 * rng.random(8192)
    found = one_run_bound([scores], present, 1e-8)
    assert found.correct == found.guesses
    assert found.epsilon > 4
    # With as many guesses of absence 7 of 17 of these would be wrong: 0.79 right in all, worth ln(0.79 / 0.21) = 1.3.


def test_scores_that_are_no_numbers_are_no_guesses_worth_anything():
    present = coins(np.random.default_rng(2), 1024)
    assert one_run_bound([np.full(1024, np.nan)], present, 1e-8).epsilon == 0.0


# --- the estimate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-5), (1.0, 1e-6), (1.0, 1e-2), (4.0, 1e-5)])
def test_the_gaussian_epsilon_is_the_accountants(mu: float, delta: float):
    # the accountant's is an upper bound on a grid of 1e-4
    assert gaussian_epsilon(mu, delta) == pytest.approx(accounted_epsilon(1.0, 1 / mu, 1, delta), abs=2e-3)


def test_the_estimate_of_gaussian_scores_is_their_epsilon():
    rng = np.random.default_rng(4)
    present = coins(rng, 50_000)
    found = separation(5 + 3 * (0.8 * present + rng.standard_normal(50_000)), present)
    assert found == pytest.approx(0.8, abs=4 * 2 / math.sqrt(50_000))  # standard error of a difference of two means
    assert gaussian_epsilon(found, 1e-5) == pytest.approx(gaussian_epsilon(0.8, 1e-5), abs=0.25)


def test_scores_without_a_difference_estimate_nothing():
    present = np.array([True, False, True, False])
    assert separation(np.zeros(4), present) == 0.0
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(-1.0, 1e-5) == 0.0
    assert math.isfinite(gaussian_epsilon(100.0, 1e-8))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="81 correct of 80 guesses"):
        guessing_p_value(200, 80, 81, 1.0, 0.0)
    with pytest.raises(ValueError, match="need epsilon >= 0"):
        guessing_p_value(200, 80, 70, -1.0, 0.0)
    with pytest.raises(ValueError, match="confidence = 1"):
        epsilon_lower_bound(200, 80, 70, 0.0, 1.0)
    with pytest.raises(ValueError, match="too few to prove anything; plant at least 128"):
        one_run_bound([np.zeros(20)], np.zeros(20, dtype=bool), 1e-5)
    with pytest.raises(ValueError, match="expected one or more of"):
        one_run_bound([np.zeros(300)], np.zeros(200, dtype=bool), 1e-5)
    with pytest.raises(ValueError, match="delta = 0"):
        gaussian_epsilon(1.0, 0.0)

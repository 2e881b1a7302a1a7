"""Lower bounds on ε that follow from an auditor's guesses about planted canaries. Imports only numpy and scipy.

Each of m canaries is in the data or out of it by its own fair coin. The auditor sees the releases and guesses the
coins. Under (ε, δ)-DP no guesser, by any procedure, guesses much better than e^ε / (1 + e^ε), so too many right guesses
refute ε.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit, log_ndtr, ndtr

_MOST_EPSILON = 60.0
_RESOLUTION = 1e-4
_FEWEST_GUESSES = 64  # fewer guesses prove next to nothing
_STEP = 2  # ratio between successive numbers of guesses


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """Lower bound on ε that one run proves.

    Attributes:
        epsilon: The bound: ε is at least this at the audited δ.
        confidence: Probability, over coins and run, that the statement is true.
        canaries: m, the number of all canaries, abstentions included.
        guesses: r, the number of guesses for this bound.
        correct: v, the number of right guesses.
        statistic: Index of the score that gave the bound.
    """

    epsilon: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    statistic: int


def guessing_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability that an (ε, δ)-DP mechanism lets a guesser guess this well.

    Guarantee:
        If each of ``canaries`` records (or clients) is present by its own fair coin and the mechanism is (ε, δ)-DP for
        adding or removing one of them, then any guesser who sees the releases and commits to ``guesses`` guesses has
        ``correct`` or more right with at most this probability. Nothing is assumed of the guesser or of the interaction
        of canaries. The value grows with ε, so bisection finds where it crosses a level.

    Args:
        canaries: m, the number of canaries.
        guesses: r <= m, a number fixed before the releases are seen; the guesser abstains on the others.
        correct: v <= r, the number of right guesses.
        epsilon: ε >= 0.
        delta: δ in [0, 1].

    Raises:
        ValueError: If the counts are not 0 <= v <= r <= m, or ε or δ is out of range.

    Reference:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2: P[W >= v] + 2mδ · max_i P[v > W >= v − i] / i,
        W ~ Binomial(r, e^ε / (1 + e^ε)). The maximum is over convex combinations of P[W >= v] and P[W >= v − i] while
        i >= 2mδ; for smaller i, P[W >= v] is left out of the sum with a negative sign, which can only enlarge the value
        and keeps it growing with ε.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses about {canaries} canaries; need 0 <= v <= r <= m")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"epsilon = {epsilon}, delta = {delta}; need epsilon >= 0 and delta in [0, 1]")
    # Count wrong guesses, each of probability 1 / (1 + e^ε): for large ε that number is exact and 1 minus it is not.
    wrong = guesses - correct
    beta = float(stats.binom.cdf(wrong, guesses, expit(-epsilon)))
    if delta == 0 or correct == 0:
        return beta
    more = np.arange(1, correct + 1)
    share = 2 * canaries * delta / more
    reached = stats.binom.cdf(wrong + more, guesses, expit(-epsilon))
    return min(1.0, float(np.max(np.maximum(0.0, 1 - share) * beta + share * reached)))


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the ε up to which `guessing_p_value` refutes, rounded down by at most 1e-4; 0 if it refutes nothing.

    Guarantee:
        If the mechanism is (ε, δ)-DP, the returned number exceeds ε with probability at most 1 − ``confidence``.
        (ε, δ)-DP implies (ε', δ)-DP for ε' > ε, so the refuted values are an interval from 0.

    Args:
        canaries: m, as in `guessing_p_value`.
        guesses: r, as in `guessing_p_value`.
        correct: v, as in `guessing_p_value`.
        delta: δ of the audited claim.
        confidence: Confidence of the bound, in (0, 1).
    """
    _check_confidence(confidence)
    return _search(canaries, guesses, correct, delta, 1 - confidence, at_least=0.0)


def _search(canaries: int, guesses: int, correct: int, delta: float, level: float, at_least: float) -> float:
    """Return the largest refuted ε above ``at_least``, or ``at_least`` itself if that is not refuted."""
    low, high = at_least, _MOST_EPSILON
    if guessing_p_value(canaries, guesses, correct, low, delta) > level:
        return at_least
    while high - low > _RESOLUTION:
        middle = (low + high) / 2
        refuted = guessing_p_value(canaries, guesses, correct, middle, delta) <= level
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class _Guess:
    """Rule for guesses: the ``present`` highest scores are in, the ``absent`` lowest are out, the others are open."""

    present: int
    absent: int

    @property
    def total(self) -> int:
        return self.present + self.absent

    def correct(self, order: np.ndarray, present: np.ndarray) -> int:
        """Count the right guesses, given the canaries in order of their scores."""
        high, low = order[len(order) - self.present :], order[: self.absent]
        return int(present[high].sum() + (~present[low]).sum())


def one_run_bound(
    scores: Sequence[np.ndarray], present: np.ndarray, delta: float, confidence: float = 0.95
) -> LowerBound:
    """Guess coins by scores and return the best lower bound on ε that the right guesses prove.

    Guarantee:
        As in `epsilon_lower_bound`. Several scores and numbers of guesses are tried. The numbers of canaries and of
        scores fix them, and each gets an equal share of 1 − ``confidence`` (union bound). Scores must be functions of
        the releases and of public values, the canaries' contents included, and never of the coins.

    Args:
        scores: One or more scores, each (canary,), higher where a canary seems present. A NaN counts as 0.
        present: Coins (canary,) bool, True where the canary is in the data.
        delta: δ of the audited claim.
        confidence: Confidence of the bound, in (0, 1).

    Raises:
        ValueError: If there is no score, too few canaries, or scores of another number of canaries.
    """
    _check_confidence(confidence)
    m = len(present)
    if not scores or any(np.shape(s) != (m,) for s in scores):
        raise ValueError(f"scores of shapes {[np.shape(s) for s in scores]}; expected one or more of ({m},)")
    tests = list(itertools.product(range(len(scores)), _numbers_of_guesses(m)))
    level = (1 - confidence) / len(tests)
    orders = [np.argsort(np.nan_to_num(s), kind="stable") for s in scores]
    best = LowerBound(epsilon=0.0, confidence=confidence, canaries=m, guesses=0, correct=0, statistic=0)
    for statistic, guess in tests:
        correct = guess.correct(orders[statistic], present)
        bound = _search(m, guess.total, correct, delta, level, at_least=best.epsilon)
        if bound > best.epsilon:
            best = LowerBound(
                epsilon=bound,
                confidence=confidence,
                canaries=m,
                guesses=guess.total,
                correct=correct,
                statistic=statistic,
            )
    return best


def most_provable(canaries: int, delta: float, confidence: float = 0.95, statistics: int = 1) -> float:
    """Return the bound of `one_run_bound` if no guess is wrong, the largest that it can prove for any mechanism."""
    guesses = list(_numbers_of_guesses(canaries))
    level = (1 - confidence) / (statistics * len(guesses))
    most = max(guess.total for guess in guesses)
    return _search(canaries, most, most, delta, level, at_least=0.0)


def _numbers_of_guesses(canaries: int) -> Iterator[_Guess]:
    """Yield numbers of guesses from nearly all canaries downwards, with guesses of absence and without.

    Guesses without absence suit rare sampling: a canary that was never drawn looks absent, so that only presence can be
    guessed.
    """
    # The number of coins on one side differs from m / 2 by about sqrt(m) / 2: four times that is left in the middle.
    side = math.floor(canaries / 2 - 2 * math.sqrt(canaries))
    if 2 * side < _FEWEST_GUESSES:
        raise ValueError(f"{canaries} canaries are too few to prove anything; plant at least 128")
    while 2 * side >= _FEWEST_GUESSES:
        yield _Guess(present=side, absent=side)
        yield _Guess(present=side, absent=0)
        side //= _STEP


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}; it must be between 0 and 1, both excluded")


# --- an estimate, not a bound ---------------------------------------------------------------------------------------


def separation(scores: np.ndarray, present: np.ndarray) -> float:
    """Return the distance between mean scores of present and absent canaries, in standard deviations.

    The result is 0 if the scores do not vary.

    Reference:
        Andrew et al. 2024, arXiv:2302.03098: canary clients with random directions; the score is the cosine of each
        direction with the release. Its scale drops out here.
    """
    inside, outside = scores[present], scores[~present]
    spread = math.sqrt((float(inside.var()) + float(outside.var())) / 2)
    return float(inside.mean() - outside.mean()) / spread if spread > 0 else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at δ of telling N(0, 1) from N(μ, 1), exact for one Gaussian release of sensitivity μ and noise 1.

    With a `separation` in place of μ the result is an *estimate* of ε without any confidence: it takes the scores for
    Gaussian with one variance and the canaries for the worst case, and says nothing about other attackers. Compare it
    with a claim; never print it as a bound.

    Args:
        mu: μ; the result is 0 for a negative value.
        delta: δ in (0, 1).

    Reference:
        Balle and Wang 2018, arXiv:1805.06530, Theorem 5: δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}; it must be between 0 and 1, both excluded")

    def spent(epsilon: float) -> float:
        return float(ndtr(mu / 2 - epsilon / mu) - math.exp(min(700.0, epsilon + log_ndtr(-mu / 2 - epsilon / mu))))

    if mu <= 0 or spent(0.0) <= delta:
        return 0.0
    # ε = μ²/2 + μ·t leaves at most Φ(−t), which is below any δ that a float holds at t = 40.
    low, high = 0.0, mu * mu / 2 + 40 * mu
    while high - low > _RESOLUTION * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high

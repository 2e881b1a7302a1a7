"""Result of an audit: the claim, the bound that was proved against it, and the basis of the proof."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fl_dualpriv.privacy.audit import gaussian_epsilon, most_provable, one_run_bound, separation
from fl_dualpriv.privacy.noise import RandomSource, StreamKey

CONFIDENCE = 0.95
CANARIES = 24_576
"""With this many, the largest bound at 95 % is 8.2, which can refute ε = 8 if there is no protection at all."""

Level = Literal["record", "client"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditResult:
    """Result of an audit of one level.

    Attributes:
        level: Unit whose presence is claimed to be hidden: record or client.
        epsilon_claimed: ε that the plan states.
        delta: δ of the claim, and of the bound.
        epsilon_lower: Lower bound of ε at ``confidence``: a theorem about any mechanism, see `one_run_bound`.
        confidence: Confidence of ``epsilon_lower``.
        epsilon_estimate: ε that the scores suggest if they are Gaussian. This is an estimate, not a bound.
        provable: The largest ``epsilon_lower`` that this number of canaries can give.
        guesses: r, the number of guesses that gave the bound.
        correct: v, the number of right guesses.
        scores: The first score of each canary.
        present: The coin of each canary.
        noisy: False for a control, which runs with the noise switched off.
    """

    level: Level
    epsilon_claimed: float
    delta: float
    epsilon_lower: float
    confidence: float
    epsilon_estimate: float
    provable: float
    guesses: int
    correct: int
    scores: np.ndarray
    present: np.ndarray
    noisy: bool

    @property
    def canaries(self) -> int:
        """m, the number of present and absent canaries."""
        return len(self.present)

    @property
    def refuted(self) -> bool:
        """True if the proved lower bound is larger than the claimed ε."""
        return self.epsilon_lower > self.epsilon_claimed


def judge(
    level: Level, claimed: float, delta: float, scores: Sequence[np.ndarray], present: np.ndarray, *, noisy: bool
) -> AuditResult:
    """Turn scores into a verdict.

    Args:
        level: The audited level.
        claimed: ε of the plan.
        delta: δ of the plan.
        scores: Score arrays, (canary,) each; a higher score means that a canary seems present. The first is a sum over
            rounds, which grows against noise that is fresh in each round. A second one may be the spread over rounds.
            It shows a canary that is sampled in some rounds, even if the noise repeats.
        present: True for present canaries, (canary,) bool.
        noisy: True if the mechanism ran as configured; False for a control without noise.
    """
    bound = one_run_bound(scores, present, delta, CONFIDENCE)
    return AuditResult(
        level=level,
        epsilon_claimed=claimed,
        delta=delta,
        epsilon_lower=bound.epsilon,
        confidence=bound.confidence,
        epsilon_estimate=gaussian_epsilon(separation(scores[0], present), delta),
        provable=most_provable(len(present), delta, CONFIDENCE, len(scores)),
        guesses=bound.guesses,
        correct=bound.correct,
        scores=scores[0],
        present=present,
        noisy=noisy,
    )


def coins(source: RandomSource, shape: Sequence[int]) -> np.ndarray:
    """Draw the auditor's fair coins, one per canary, from a stream that no part of the mechanism uses."""
    return source.uniforms(int(np.prod(shape))).reshape(shape) < 0.5


class NoNoise:
    """The control's noise source: it always returns 0.5, the uniform number whose normal quantile is zero."""

    reproducible = True

    def words(self, count: int) -> np.ndarray:
        """Return the words of 0.5, see `RandomSource.words`."""
        return np.full(count, 1 << 63, dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        """Return 0.5 for each number, see `RandomSource.uniforms`."""
        return np.full(count, 0.5)


def silenced(
    sources: Callable[[StreamKey], RandomSource], purposes: frozenset[str]
) -> Callable[[StreamKey], RandomSource]:
    """Return the same streams, except that noise for these purposes is zero."""
    return lambda key: NoNoise() if key.purpose in purposes else sources(key)

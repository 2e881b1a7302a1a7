"""What an audit says: the claim, what was proved against it, and what the proof rests on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fl_dualpriv.privacy.audit import gaussian_epsilon, most_provable, one_run_bound, separation
from fl_dualpriv.privacy.noise import RandomSource, StreamKey

CONFIDENCE = 0.95
CANARIES = 24_576
"""At 95 % the largest bound is then 8.2: enough to refute ε = 8 where nothing protects."""

Level = Literal["record", "client"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditResult:
    """An audit of one level.

    Attributes:
        level: Whose presence is claimed to be hidden.
        epsilon_claimed: ε that the plan states.
        delta: δ of the claim, and of the bound.
        epsilon_lower: ε is at least this, with ``confidence``: a theorem about any mechanism, see `one_run_bound`.
        confidence: Of ``epsilon_lower``.
        epsilon_estimate: What the scores suggest if they are Gaussian: an estimate, no bound.
        provable: The largest ``epsilon_lower`` that so many canaries can give.
        guesses: r, guesses that gave the bound.
        correct: v, right ones.
        scores: The first score of each canary.
        present: The coin of each canary.
        noisy: False: a control, run with the noise switched off.
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
        """m, present and absent ones."""
        return len(self.present)

    @property
    def refuted(self) -> bool:
        """Whether more is proved than is claimed."""
        return self.epsilon_lower > self.epsilon_claimed


def judge(
    level: Level, claimed: float, delta: float, scores: Sequence[np.ndarray], present: np.ndarray, *, noisy: bool
) -> AuditResult:
    """Turn scores into a verdict.

    Args:
        level: What was audited.
        claimed: ε of the plan.
        delta: δ of the plan.
        scores: Each (canary,), higher where a canary seems present. The first is a sum over rounds, which is what adds
            up where noise is fresh each time. A second one may be the spread over rounds, which shows a canary that is
            sampled now and then even through noise that repeats.
        present: (canary,) bool.
        noisy: Whether the mechanism ran as configured.
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
    """The auditor's own fair coins, one per canary: of a stream that no part of the mechanism draws from."""
    return source.uniforms(int(np.prod(shape))).reshape(shape) < 0.5


class NoNoise:
    """A source that always says one half, the uniform whose normal quantile is zero: the control's noise."""

    reproducible = True

    def words(self, count: int) -> np.ndarray:
        """See `RandomSource.words`."""
        return np.full(count, 1 << 63, dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        """See `RandomSource.uniforms`."""
        return np.full(count, 0.5)


def silenced(
    sources: Callable[[StreamKey], RandomSource], purposes: frozenset[str]
) -> Callable[[StreamKey], RandomSource]:
    """The same streams, but for these purposes nothing but zeros as noise."""
    return lambda key: NoNoise() if key.purpose in purposes else sources(key)

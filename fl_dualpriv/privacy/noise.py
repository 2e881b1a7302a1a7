"""Randomness for sampling and noise: the kernel's generator by default, a keyed one for reproducible runs.

Both kinds return random words, and uniforms made from them. Noise and Poisson batches use these by one code path, so
tests with the keyed source exercise the code that the secret source runs.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

_BITS = 52  # with 53, the half step below would round the largest word up to 1


class RandomSource(Protocol):
    """A stream of random 64-bit words; each word is returned once, either as a word or as a uniform."""

    @property
    def reproducible(self) -> bool:
        """True if every holder of the key can repeat the stream; the noise then protects no unit."""
        ...

    def words(self, count: int) -> np.ndarray:
        """Return ``count`` words of 64 independent fair bits, uint64."""
        ...

    def uniforms(self, count: int) -> np.ndarray:
        """Return ``count`` independent uniforms of 52 bits, float64, never 0 or 1."""
        ...


def _to_open_unit_interval(words: np.ndarray) -> np.ndarray:
    # The half step keeps 0 and 1 out, where the normal quantile is infinite.
    return ((words >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS


class OsRandom:
    """Words from the operating system's cryptographic generator, which cannot be repeated or predicted."""

    reproducible = False

    def words(self, count: int) -> np.ndarray:
        """See `RandomSource.words`."""
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        """See `RandomSource.uniforms`."""
        return _to_open_unit_interval(self.words(count))


@dataclass(frozen=True, kw_only=True)
class StreamKey:
    """Purpose of a stream. Two draws share a stream only if all five fields agree, in any process and any order."""

    seed: int
    purpose: str
    partition: int = -1
    server_round: int = 0
    step: int = 0


class KeyedRandom:
    """Words that depend only on a `StreamKey`: for tests and repeatable simulations, never for publication."""

    reproducible = True

    def __init__(self, key: StreamKey) -> None:
        text = f"{key.seed}/{key.purpose}/{key.partition}/{key.server_round}/{key.step}"
        digest = hashlib.sha256(text.encode()).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64))

    def words(self, count: int) -> np.ndarray:
        """See `RandomSource.words`."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64).reshape(count)

    def uniforms(self, count: int) -> np.ndarray:
        """See `RandomSource.uniforms`."""
        return _to_open_unit_interval(self.words(count))


RandomSources = Callable[[StreamKey], RandomSource]


def random_sources(randomness: str) -> RandomSources:
    """Return a factory of sources: ``os`` ignores the key, ``seeded`` follows it.

    Raises:
        ValueError: If ``randomness`` is neither ``os`` nor ``seeded``.
    """
    if randomness == "os":
        return lambda key: OsRandom()
    if randomness == "seeded":
        return KeyedRandom
    raise ValueError(f"randomness = {randomness!r}; allowed: 'os', 'seeded'")


def gaussian_noise(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
    """Draw independent N(0, std²) noise, float64.

    Guarantee:
        Every coordinate is the normal quantile of its own 52-bit uniform, scaled by ``std``; no draw is used twice.
        The tails end at ±8.2 std (total mass 2e-16 outside, which a strict reader adds to δ). This is the
        floating-point position of ``arithmetic = "float"``: 52-bit uniforms reach few of the float64 numbers, and the
        set of reachable sums of data and noise depends on the data. So it is not safe against attacks on the low-order
        bits (Mironov 2012; Jin et al. 2021, arXiv:2112.05307). `rounded_gaussian` is safe; see docs/privacy.md.

    Args:
        source: Source of the uniforms.
        shape: Shape of the result.
        std: Standard deviation, in the units of the value to which the noise is added; finite, >= 0.

    Raises:
        ValueError: If ``std`` is negative or not finite.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std = {std}; it must be finite and >= 0")
    draws = ndtri(source.uniforms(math.prod(shape))) * std
    return torch.from_numpy(draws).reshape(shape)


def poisson_sample(source: RandomSource, population: int, rate: float) -> np.ndarray:
    """Let each of ``population`` members join independently with probability ``rate``.

    Guarantee:
        This is the sampling that Poisson-subsampled accounting assumes. The coin of member j is its own uniform, so the
        membership of one record does not change that of any other. With 52-bit uniforms the probability is ``rate`` to
        within 2**-52. The result may be empty.

    Returns:
        Sorted indices, int64.

    Raises:
        ValueError: If ``rate`` is outside [0, 1].

    Example:
        >>> poisson_sample(KeyedRandom(StreamKey(seed=0, purpose="batch")), 10, 1.0)
        array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"sampling rate = {rate}; it must be in [0, 1]")
    return np.flatnonzero(source.uniforms(population) < rate)

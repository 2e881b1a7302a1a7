"""Randomness for sampling and noise: the kernel's generator by default, a keyed one for reproducible runs.

Both kinds hand out random words, and uniforms made of them; noise and Poisson batches come from these by one code
path, so what is tested on the keyed source is what the secret source runs.
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
    """A stream of random 64-bit words; a word is handed out once, as it is or as a uniform."""

    @property
    def reproducible(self) -> bool:
        """True if anyone who knows the key can repeat the stream: then the noise protects nobody."""
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
    """Words from the operating system's cryptographic generator; cannot be repeated or predicted."""

    reproducible = False

    def words(self, count: int) -> np.ndarray:
        """See `RandomSource.words`."""
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        """See `RandomSource.uniforms`."""
        return _to_open_unit_interval(self.words(count))


@dataclass(frozen=True, kw_only=True)
class StreamKey:
    """What a stream is for. Two draws share a stream only if all five agree, whatever process or order they run in."""

    seed: int
    purpose: str
    partition: int = -1
    server_round: int = 0
    step: int = 0


class KeyedRandom:
    """Words that depend on a `StreamKey` alone: for tests and repeatable simulations, never for publication."""

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
        ValueError: If ``randomness`` is neither.
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
        The tails end at ±8.2 std (total mass 2e-16 outside, to be added to δ by a strict reader). This is the position
        of ``arithmetic = "float"``: 52-bit uniforms reach few of the float64 numbers, and which sums of data and noise
        can be reached depends on the data, so it is not safe against attacks on the low-order bits (Mironov 2012; Jin
        et al. 2021, arXiv:2112.05307). `rounded_gaussian` is; see docs/privacy.md.

    Args:
        source: Where the uniforms come from.
        shape: Shape of the result.
        std: Standard deviation, in the units of what it is added to; finite, >= 0.

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
        This is the sampling that Poisson-subsampled accounting assumes: member j's coin is its own uniform, so
        membership of one record does not change anyone else's; with 52-bit uniforms the probability is ``rate`` to
        within 2**-52. The result may be empty.

    Returns:
        Sorted indices, int64.

    Raises:
        ValueError: If ``rate`` is outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"sampling rate = {rate}; it must be in [0, 1]")
    return np.flatnonzero(source.uniforms(population) < rate)

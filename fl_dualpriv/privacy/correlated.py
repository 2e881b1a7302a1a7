"""Noise that is correlated over the rounds of a run (DP-FTRL, the matrix mechanism): trees and banded square roots.

The server releases x_t + n_t in round t, where x_t is the sum of the round's clipped updates and C n = σ Z. Each round
draws fresh Z_t, and n_t takes back a part of the noise of earlier rounds. So the sum of all rounds, which determines
the trained prompt, carries less noise. One formula covers the whole run; no round is a random sample of clients.
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.privacy.accounting import SampledGaussians

# A round that adds (next to) nothing to the sensitivity is charged at z · _FREE: a separate line, at almost no cost.
_FREE = 2.0**20


@dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """Schedule: client i takes part in the rounds t = 1 … ``rounds`` with t ≡ i (mod ``separation``), in no other.

    Guarantee:
        The schedule depends only on public numbers. A client takes part at most ``most_rounds`` times, in rounds that
        lie exactly ``separation`` apart. There are ``separation`` such patterns, or ``rounds`` if that is less.

    Attributes:
        rounds: T, the number of rounds of the whole run, >= 1.
        separation: b >= 1; with 1 every client takes part in each round.
    """

    rounds: int
    separation: int

    @property
    def most_rounds(self) -> int:
        """k, the largest number of rounds in which one client takes part."""
        return -(-self.rounds // self.separation)

    @property
    def patterns(self) -> range:
        """First round, counted from 0, of each pattern; the other rounds follow at the separation."""
        return range(min(self.separation, self.rounds))

    def cohort(self, server_round: int, population: int) -> np.ndarray:
        """Return the clients of a round, sorted, int64.

        Raises:
            ValueError: If the run does not have this round, because it would be one participation too many.
        """
        if not 1 <= server_round <= self.rounds:
            raise ValueError(f"round {server_round} of a schedule of {self.rounds} rounds")
        return np.arange(server_round % self.separation, population, self.separation)


def separation_for(population: int, expected_cohort: float) -> int:
    """Return the separation for cohorts of about ``expected_cohort`` clients: population / cohort, rounded."""
    return max(1, round(population / expected_cohort))


@dataclass(frozen=True, kw_only=True)
class CorrelatedNoise(ABC):
    """Noise n = σ C⁻¹ Z with a lower-triangular C of entries >= 0 and diagonal 1, over a fixed public schedule.

    Guarantee:
        C x + σ Z with Z standard normal is one Gaussian release of everything, from which x + σ C⁻¹ Z is computed. If
        the terms of a client have norm at most 1 in the rounds π of its pattern, and are zero elsewhere, the client
        moves C x by at most ``sensitivity`` = max over π of ‖Σ_{t in π} C_t‖ (C_t a column): the squared distance is
        Σ_{s,t in π} (CᵀC)_st ⟨u_s, u_t⟩ <= Σ_{s,t in π} (CᵀC)_st, because CᵀC >= 0 and |⟨u_s, u_t⟩| <= 1. So with
        σ = z · sensitivity the whole run is one Gaussian release of multiplier z for a client that takes part or is
        zero. The clients' terms may depend on everything released before: C is lower triangular and Z normal, so the
        guarantee for fixed inputs holds for adaptive ones (Denisov et al. 2022, Theorem 2.1). C, σ and the schedule are
        public; the draws, and the memory of them, are the server's secret.

    Attributes:
        schedule: Schedule of the clients' rounds.

    Reference:
        Kairouz et al. 2021, arXiv:2103.00039; Denisov et al. 2022, arXiv:2202.08312; Choquette-Choo et al. 2023,
        arXiv:2211.06530 (several participations).
    """

    schedule: RoundRobin

    @abstractmethod
    def influence(self, first: int) -> np.ndarray:
        """Return Σ_{t in π} C_t for the pattern that begins in round ``first`` (from 0): (rounds,), >= 0."""

    @property
    @abstractmethod
    def memory_rows(self) -> int:
        """Number of arrays of the prompt's shape that are remembered from round to round."""

    @abstractmethod
    def unit_noise(self, server_round: int, fresh: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return row ``server_round`` (from 1) of C⁻¹ Z, and the memory for the next round.

        Args:
            server_round: t; the caller asks for rounds in order, each once.
            fresh: Z_t, standard normal, used for nothing else.
            memory: Memory (memory_rows, …) that the previous round returned; zeros before round 1.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe the noise by its name and size, for a table."""

    @abstractmethod
    def prefix_norm(self) -> float:
        """Return ‖A C⁻¹‖_F / √T, where A is the lower triangle of ones.

        It is the root mean square, over rounds, of the noise in sums of x.
        """

    @functools.cached_property
    def squared_sensitivities(self) -> np.ndarray:
        """Squared sensitivity of the first t rounds together, t = 1 … T, for a run that ends early."""
        best = np.zeros(self.schedule.rounds)
        for first in self.schedule.patterns:
            np.maximum(best, np.cumsum(self.influence(first) ** 2), out=best)
        return best

    @functools.cached_property
    def _squared_by_round(self) -> np.ndarray:
        """Largest squared influence on each round's row, which bounds the cost of one further copy of the row."""
        return np.max([self.influence(first) ** 2 for first in self.schedule.patterns], axis=0)

    @property
    def sensitivity(self) -> float:
        """Sensitivity of the whole run, for terms of norm at most 1."""
        return math.sqrt(self.squared_sensitivities[-1])

    def sigma(self, noise_multiplier: float) -> float:
        """Return σ for which the whole run is one Gaussian release of ``noise_multiplier``."""
        return noise_multiplier * self.sensitivity

    def charge(self, noise_multiplier: float, server_round: int, *, again: bool = False) -> SampledGaussians:
        """Return the cost that a round adds to the releases before it, as an independent Gaussian release.

        Guarantee:
            The first t rounds are one Gaussian release of multiplier σ / sensitivity_t. Unsampled Gaussian releases
            compose by adding their inverse squares, so the charges of rounds 1 … t compose to exactly that (or to a
            little more: see _FREE). A round made ``again`` is one more row of C, the same as before. It adds at most
            the largest squared influence on that row.
        """
        squared = self.squared_sensitivities
        added = squared[server_round - 1] - (squared[server_round - 2] if server_round > 1 else 0.0)
        if again:
            added = self._squared_by_round[server_round - 1]
        least = (self.sensitivity / _FREE) ** 2  # a charge of noise_multiplier * _FREE
        return SampledGaussians(1.0, self.sigma(noise_multiplier) / math.sqrt(max(added, least)), 1)

    def charges(self, noise_multiplier: float, rounds: int) -> tuple[SampledGaussians, ...]:
        """Return the `charge` of each of the first rounds.

        Rounds beyond the schedule are repeated rounds, and each is charged as the `dearest`.
        """
        planned = self.schedule.rounds
        charges = [self.charge(noise_multiplier, t) for t in range(1, min(rounds, planned) + 1)]
        charges += [self.dearest(noise_multiplier)] * max(0, rounds - planned)
        return tuple(charges)

    def dearest(self, noise_multiplier: float) -> SampledGaussians:
        """Return the largest `charge` of a round that is made again."""
        return self.charge(noise_multiplier, int(np.argmax(self._squared_by_round)) + 1, again=True)

    def error(self) -> float:
        """Return the root mean square noise in the sums of the first 1 … T rounds, for z = 1, terms of norm <= 1."""
        return self.sensitivity * self.prefix_norm()


@dataclass(frozen=True, kw_only=True)
class TreeNoise(CorrelatedNoise):
    """Binary trees: row t of C adds up the 2^v rounds that end in t, where 2^v is the largest power that divides t.

    A sum of rounds 1 … t consists of one such row for each 1 in t's binary digits. A round is in at most one row for
    each of ⌊log2 T⌋ + 1 sizes, and round 1 is in one row of each size. So one participation has sensitivity
    √(⌊log2 T⌋ + 1).

    Reference:
        Dwork et al. 2010 and Chan et al. 2011 (binary counting); Kairouz et al. 2021, arXiv:2103.00039, without
        the variance reduction. Only the rows that prefix sums need are kept, so C is square.
    """

    @property
    def memory_rows(self) -> int:
        """Number of sizes: the memory holds the draw of one row for each size."""
        return self.schedule.rounds.bit_length()

    def describe(self) -> str:
        """See `CorrelatedNoise.describe`."""
        return f"tree of height {self.memory_rows}"

    def influence(self, first: int) -> np.ndarray:
        """Count the participations of a pattern in the rounds of each row."""
        t = np.arange(1, self.schedule.rounds + 1)
        begin, b = t - (t & -t), self.schedule.separation  # the row covers rounds begin … t - 1, counted from 0

        def before(end: np.ndarray) -> np.ndarray:
            return np.maximum(0, -((first - end) // b))  # number of first, first + b, … below end

        return (before(t) - before(begin)).astype(np.float64)

    def unit_noise(self, server_round: int, fresh: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new row's draw minus the draws of the rows that it replaces in the sum."""
        size = (server_round & -server_round).bit_length() - 1
        memory = memory.clone()
        noise = fresh - memory[:size].sum(dim=0)
        memory[:size] = 0.0
        memory[size] = fresh
        return noise, memory

    def prefix_norm(self) -> float:
        """See `CorrelatedNoise.prefix_norm`: a sum to t has as many rows as t has binary ones."""
        return math.sqrt(sum(t.bit_count() for t in range(1, self.schedule.rounds + 1)) / self.schedule.rounds)


def square_root_coefficients(count: int) -> np.ndarray:
    """Return c_k = binom(2k, k) / 4^k, k = 0 … count - 1: the Toeplitz square root of the lower triangle of ones."""
    k = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


@dataclass(frozen=True, kw_only=True)
class BandedNoise(CorrelatedNoise):
    """The Toeplitz square root of the lower triangle of ones, cut to its first ``bands`` diagonals.

    With bands <= separation the columns of a pattern do not overlap: sensitivity √k · ‖c‖ for k participations.

    Attributes:
        bands: Number of bands p >= 1; with 1 the noise is independent.

    Reference:
        Fichtenberger et al. 2023, arXiv:2202.11205 (the square root); Kalinin and Lampert 2024, arXiv:2405.13763
        (banded, several participations).
    """

    bands: int

    @functools.cached_property
    def coefficients(self) -> np.ndarray:
        """First column of C without its zeros, (min(bands, rounds),)."""
        return square_root_coefficients(min(self.bands, self.schedule.rounds))

    @property
    def memory_rows(self) -> int:
        """Number of remembered rounds: the memory holds the noise of the last bands - 1 rounds."""
        return len(self.coefficients) - 1

    def describe(self) -> str:
        """See `CorrelatedNoise.describe`."""
        return f"square root with {len(self.coefficients)} bands"

    def influence(self, first: int) -> np.ndarray:
        """Add up shifted copies of the column, one for each participation."""
        total = np.zeros(self.schedule.rounds + len(self.coefficients))
        for t in range(first, self.schedule.rounds, self.schedule.separation):
            total[t : t + len(self.coefficients)] += self.coefficients
        return total[: self.schedule.rounds]

    @functools.cached_property
    def squared_sensitivities(self) -> np.ndarray:
        """Squared sensitivities, which are those of the pattern that begins first: no other pattern has larger ones.

        The influence of any other pattern is the same sequence, shifted to later rounds and cut off at the end.
        """
        return np.cumsum(self.influence(0) ** 2)

    def unit_noise(self, server_round: int, fresh: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return Z_t - c_1 n_{t-1} - c_2 n_{t-2} - …, by forward substitution; memory begins with the latest noise."""
        weights = torch.from_numpy(self.coefficients[1:]).to(fresh)
        noise = fresh - torch.tensordot(weights, memory, dims=1)
        return noise, torch.cat([noise[None], memory])[: self.memory_rows]

    def prefix_norm(self) -> float:
        """See `CorrelatedNoise.prefix_norm`.

        A C⁻¹ is Toeplitz with the running sums of C⁻¹'s first column, which forward substitution gives.
        """
        rounds, column = self.schedule.rounds, np.zeros(self.schedule.rounds)
        backwards = self.coefficients[:0:-1]
        padded = np.zeros(rounds + len(backwards))
        for t in range(rounds):
            column[t] = (t == 0) - backwards @ padded[t : t + len(backwards)]
            padded[t + len(backwards)] = column[t]
        return math.sqrt(np.cumsum(column) ** 2 @ np.arange(rounds, 0, -1) / rounds)


def best_bands(schedule: RoundRobin, most: int) -> int:
    """Return the number of bands with the least `error` among powers of two, the separation and ``most``.

    It is at most ``most``.
    """
    most = min(most, schedule.rounds)
    tried = sorted({2**i for i in range(most.bit_length())} | {min(schedule.separation, most), most})
    return min(tried, key=lambda bands: BandedNoise(schedule=schedule, bands=bands).error())

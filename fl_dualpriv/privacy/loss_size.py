"""Predicted size of a discretised privacy loss distribution (PLD), and predicted error in ε due to its grid.

These numbers only choose a grid. They need not bound anything, because on any grid the ε of a pessimistic PLD is an
upper bound.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import logsumexp, ndtri

LOG_TAIL = -50.0
"""Logarithm of the mass of noise that dp-accounting cuts off: at ten standard deviations."""

_POINTS = 2001  # of the quadrature over the noise; the trapezoidal rule is exact to rounding for smooth tails of zero
_ORDERS = 20  # dp-accounting bounds the tails of a composition by Chernoff's bound at ±1 … ±20 over the length
_TAIL_MASS = 1e-15  # the mass that dp-accounting cuts off a composition
_LARGEST_LOSS = 1e9  # no grid is tried for larger losses


class Terms(Protocol):
    """Poisson-sampled Gaussian releases: `accounting.SampledGaussians`."""

    @property
    def sampling_rate(self) -> float:
        """The sampling rate, in (0, 1]."""
        ...

    @property
    def noise_multiplier(self) -> float:
        """Noise over sensitivity, > 0."""
        ...

    @property
    def releases(self) -> int:
        """Number of releases."""
        ...


class PldSize(NamedTuple):
    """Lengths of PLDs in units of privacy loss, the longer of both directions; infinite where no PLD exists.

    Attributes:
        one: Length of the longest PLD of one release.
        ones: Sum of the lengths of the PLDs of one release of each kind.
        composed: Length of the composition of all releases.
    """

    one: float
    ones: float
    composed: float

    def least_grid(self, cells: int) -> float:
        """Return the finest grid with at most ``cells`` cells in a PLD of one release.

        A composition may have 10 times as many cells.
        """
        return max(self.one / cells, self.ones / (4 * cells), self.composed / (10 * cells))


def pld_size(terms: Sequence[Terms], log_tail: float) -> PldSize:
    """Return the size of the PLDs that dp-accounting computes for some releases.

    Args:
        terms: The releases.
        log_tail: Logarithm of the mass of noise that is cut off (``log_mass_truncation_bound``), from -50 to 0.
    """
    spans = [_spans(t.sampling_rate, t.noise_multiplier, t.releases, log_tail) for t in terms]
    return PldSize(max(one for one, _ in spans), sum(one for one, _ in spans), sum(all_ for _, all_ in spans))


def _spans(rate: float, noise: float, releases: int, log_tail: float) -> tuple[float, float]:
    """Return the length of one release's losses and of all releases together, the longer of both directions."""
    width = -float(ndtri(0.5 * math.exp(log_tail)))
    furthest = -float(ndtri(0.5 * math.exp(LOG_TAIL)))
    if not noise > 1e-6 or (1 / noise + furthest) / noise > _LARGEST_LOSS:
        return math.inf, math.inf
    x = np.linspace(-furthest, width + 1 / noise, _POINTS)  # noise in units of its standard deviation
    log_density = -0.5 * x**2
    ratio = (x - 0.5 / noise) / noise  # log of the density ratio without sampling
    loss = ratio if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
    one = float(loss[-1] - loss[0])
    longest = one
    for values, log_weights in ((loss, log_density + loss), (-loss, log_density)):
        log_weights = log_weights - logsumexp(log_weights)
        orders = np.arange(1, _ORDERS + 1) / one
        above, below = (
            np.min((releases * logsumexp(sign * np.outer(orders, values) + log_weights, axis=1) + tail) / orders)
            for sign, tail in ((1, math.log(2 / _TAIL_MASS)), (-1, math.log(2 / _TAIL_MASS)))
        )
        longest = max(longest, min(float(above + below), one * releases))
    return one, longest


def least_loss(term: Terms) -> float:
    """Return the privacy loss of a removal at the point where the noise is cut off at its lower end (`LOG_TAIL`)."""
    rate, noise = term.sampling_rate, term.noise_multiplier
    ratio = (float(ndtri(0.5 * math.exp(LOG_TAIL))) - 0.5 / noise) / noise
    return ratio if rate == 1 else float(np.logaddexp(math.log1p(-rate), math.log(rate) + ratio))


def error_share(terms: Sequence[Terms], delta: float, grid: float, epsilon: float) -> float:
    """Estimate the share of ε by which the grid raises ε.

    A pessimistic PLD ("connect the dots", arXiv:2207.04380) splits a loss between the ends of its cell, which keeps its
    mass under both distributions. At a distance x from one end of a cell of length h this adds variance x(h − x), and
    half of that to the mean. Losses that are spread over many cells add h²/6 each. Where most losses lie within q of
    zero, and so within one cell, each adds about h·q. Where ε is about k standard deviations, with k² = 2 log(1/δ), ε
    grows by the share s²·(log(1/δ)/ε² + 1/(2ε)) for an added variance of s².

    Args:
        terms: The releases.
        delta: δ.
        grid: Grid step h.
        epsilon: ε, or a guess of it.
    """
    if not (0 < epsilon < math.inf and delta > 0):
        return 0.0 if epsilon == 0 else math.inf
    return _added(terms, grid) * (math.log(1 / delta) / epsilon**2 + 1 / (2 * epsilon))


def grid_for(terms: Sequence[Terms], delta: float, epsilon: float, share: float) -> float:
    """Return the coarsest grid, up to a factor of 1.3, whose `error_share` is at most ``share``; at most ε/50."""
    grid = min(epsilon / 50, 1e3)
    while grid > 1e-12 and error_share(terms, delta, grid, epsilon) > share:
        grid /= 1.3
    return grid


def _added(terms: Sequence[Terms], grid: float) -> float:
    h = grid
    return sum(t.releases * min(h * h / 6, 2 * h, 2 * h * t.sampling_rate + t.sampling_rate * h * h / 6) for t in terms)

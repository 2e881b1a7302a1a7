"""How large a discretised privacy loss distribution (PLD) gets, and how far its grid moves ε, known before it is made.

These numbers choose a grid and bound nothing: on any grid the ε of a pessimistic PLD is an upper bound.
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
_TAIL_MASS = 1e-15  # dp-accounting's: what it cuts off a composition
_LARGEST_LOSS = 1e9  # beyond it no grid is tried


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
        """How many."""
        ...


class PldSize(NamedTuple):
    """Lengths in units of privacy loss, the longer of both directions; infinite where no PLD can be made.

    Attributes:
        one: Of the longest PLD of one release.
        ones: Of the PLDs of one release of each kind, together.
        composed: Of the composition of all.
    """

    one: float
    ones: float
    composed: float

    def least_grid(self, cells: int) -> float:
        """The finest grid with at most ``cells`` cells in a PLD of one release, and 10 times that in a composition."""
        return max(self.one / cells, self.ones / (4 * cells), self.composed / (10 * cells))


def pld_size(terms: Sequence[Terms], log_tail: float) -> PldSize:
    """The size of the PLDs that dp-accounting makes of some releases.

    Args:
        terms: The releases.
        log_tail: Logarithm of the mass of noise that is cut off (``log_mass_truncation_bound``), from -50 to 0.
    """
    spans = [_spans(t.sampling_rate, t.noise_multiplier, t.releases, log_tail) for t in terms]
    return PldSize(max(one for one, _ in spans), sum(one for one, _ in spans), sum(all_ for _, all_ in spans))


def _spans(rate: float, noise: float, releases: int, log_tail: float) -> tuple[float, float]:
    """Length of one release's losses and of all together, the longer of both directions."""
    width = -float(ndtri(0.5 * math.exp(log_tail)))
    furthest = -float(ndtri(0.5 * math.exp(LOG_TAIL)))
    if not noise > 1e-6 or (1 / noise + furthest) / noise > _LARGEST_LOSS:
        return math.inf, math.inf
    x = np.linspace(-furthest, width + 1 / noise, _POINTS)  # noise in units of its own standard deviation
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
    """The privacy loss of a removal where the noise is cut off at its lower end (`LOG_TAIL`)."""
    rate, noise = term.sampling_rate, term.noise_multiplier
    ratio = (float(ndtri(0.5 * math.exp(LOG_TAIL))) - 0.5 / noise) / noise
    return ratio if rate == 1 else float(np.logaddexp(math.log1p(-rate), math.log(rate) + ratio))


def error_share(terms: Sequence[Terms], delta: float, grid: float, epsilon: float) -> float:
    """About how far the grid raises ε, as a share of ε.

    A pessimistic PLD ("connect the dots", arXiv:2207.04380) splits a loss between the ends of its cell, which keeps its
    mass under both distributions. At a distance x from one end of a cell of length h this adds variance x(h − x), and
    half of that to the mean. Losses that are spread over many cells add h²/6 each; where most losses lie within q of
    zero, and so within one cell, about h·q. Where ε is about k standard deviations, with k² = 2 log(1/δ), ε grows by
    the share s²·(log(1/δ)/ε² + 1/(2ε)) for an added variance of s².

    Args:
        terms: The releases.
        delta: δ.
        grid: h.
        epsilon: ε, or a guess.
    """
    if not (0 < epsilon < math.inf and delta > 0):
        return 0.0 if epsilon == 0 else math.inf
    return _added(terms, grid) * (math.log(1 / delta) / epsilon**2 + 1 / (2 * epsilon))


def grid_for(terms: Sequence[Terms], delta: float, epsilon: float, share: float) -> float:
    """The coarsest grid, to a factor of 1.3, whose `error_share` is at most ``share``; a fiftieth of ε at most."""
    grid = min(epsilon / 50, 1e3)
    while grid > 1e-12 and error_share(terms, delta, grid, epsilon) > share:
        grid /= 1.3
    return grid


def _added(terms: Sequence[Terms], grid: float) -> float:
    h = grid
    return sum(t.releases * min(h * h / 6, 2 * h, 2 * h * t.sampling_rate + t.sampling_rate * h * h / 6) for t in terms)

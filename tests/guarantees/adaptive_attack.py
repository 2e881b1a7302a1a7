"""An adversary who chooses the terms of the next releases after seeing the loss of the last, solved exactly.

The game: one record is in or out. In each turn the adversary takes an action (some Gaussian releases on given terms)
that the privacy filter under attack still admits, or stops. It wins P[guess "in" | in] − e^ε P[guess "in" | out], and
an (ε, δ) guarantee says that no strategy wins more than δ. With L the privacy loss so far, the best guess wins
E_in[max(0, 1 − e^(ε − L))], so dynamic programming over L finds the best strategy. Losses are rounded *down* to a
grid: the adversary sees only the rounded loss, so its value is one that a real adversary reaches, and never more.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.signal import fftconvolve
from scipy.special import ndtr

State = tuple[int, ...]
"""How often each action was taken."""

Admits = Callable[[State, int], bool]
"""Whether the filter admits an action (by its index) after those of a state."""


@dataclass(frozen=True)
class Grid:
    """Losses at which values are kept.

    Attributes:
        step: Between two of them.
        low: The smallest; a game that falls below is given up, which is a choice that an adversary has.
        high: The largest; a larger loss counts as this one.
    """

    step: float
    low: float
    high: float

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """All of them."""
        return np.arange(round(self.low / self.step), round(self.high / self.step) + 1) * self.step


@dataclass(frozen=True)
class Losses:
    """Distribution of a rounded privacy loss if the record is in: ``mass[i]`` at ``(first + i) * step``."""

    first: int
    mass: np.ndarray

    def repeated(self, times: int) -> "Losses":
        """Of independent releases together."""
        mass, power, first = np.ones(1), self.mass, self.first * times
        while times:
            if times & 1:
                mass = fftconvolve(mass, power)
            times >>= 1
            power = fftconvolve(power, power) if times else power
        return Losses(first, np.maximum(mass, 0.0))

    def coarser(self, factor: int) -> "Losses":
        """The same losses rounded down to a step that is ``factor`` times as large."""
        places = (self.first + np.arange(len(self.mass))) // factor
        return Losses(int(places[0]), np.bincount(places - places[0], weights=self.mass))


_FINER = 50  # steps of a single release in one of the grid: rounding many releases down, each loses half a step


def action_losses(q: float, z: float, releases: int, grid: Grid, *, removed: bool) -> Losses:
    """Losses of an action of several releases on the same terms; arguments as `sampled_gaussian_losses`."""
    return sampled_gaussian_losses(q, z, grid.step / _FINER, removed=removed).repeated(releases).coarser(_FINER)


def sampled_gaussian_losses(q: float, z: float, step: float, *, removed: bool) -> Losses:
    """Losses of one release, rounded down to multiples of ``step``.

    The release is x ~ N(b, z²) with b = 1 at rate q if the record is in, else b = 0. Its log-likelihood ratio
    log(1 − q + q exp((2x − 1)/(2z²))) grows with x, so a loss below t is an x below the inverse of t.

    Args:
        q: Sampling rate.
        z: Noise multiplier.
        step: Of the losses.
        removed: "In" is the data set with the record; else the one without it, and "out" is the one with it.
    """

    def x_of(loss: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            inner = np.log(np.maximum(np.expm1(loss) + q, 0.0)) - np.log(q)
        return z * z * inner + 0.5

    def below(x: np.ndarray) -> np.ndarray:
        """P[release < x] if the record is "in"."""
        return (1 - q) * ndtr(x / z) + q * ndtr((x - 1) / z) if removed else ndtr(x / z)

    top = np.log1p(q * np.expm1((2 * (1 + 9 * z) - 1) / (2 * z * z)))  # at nine standard deviations
    bottom = np.log1p(-q)
    if removed:
        edges = np.arange(np.floor(bottom / step), np.ceil(top / step) + 1)
        cumulated = below(x_of(edges * step))
        mass = np.diff(np.append(cumulated, 1.0))
    else:  # the loss is minus the ratio, and falls with x
        edges = np.arange(np.floor(-top / step), np.ceil(-bottom / step) + 1)
        above = 1 - below(x_of(-edges * step))
        mass = np.diff(np.append(above, 1.0))
    return Losses(int(edges[0]), mass)


def best_value(actions: list[Losses], admits: Admits, epsilon: float, grid: Grid) -> "Strategy":
    """The best adaptive strategy against a filter that looks only at how often each action was taken."""
    return Strategy(actions, admits, epsilon, grid)


class Strategy:
    """Values and choices of the best adversary; states are solved when they are first needed."""

    def __init__(self, actions: list[Losses], admits: Admits, epsilon: float, grid: Grid) -> None:
        self._actions, self._grid = actions, grid
        self.admits = functools.cache(admits)
        self._stop = np.maximum(0.0, -np.expm1(epsilon - grid.losses))
        self._solved: dict[State, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def start(self) -> State:
        """Nothing was taken."""
        return (0,) * len(self._actions)

    def value(self) -> float:
        """What the best strategy wins: a lower bound on δ(ε) of the filter."""
        values, _ = self.solve(self.start)
        return float(values[int(np.searchsorted(self._grid.losses, -self._grid.step / 2))])

    def solve(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Value at each loss, and the best action there; −1: stop."""
        if state not in self._solved:
            values, choices = self._stop.copy(), np.full(len(self._stop), -1)
            for index, losses in enumerate(self._actions):
                if self.admits(state, index):
                    after = self._expected(self.solve(after_action(state, index))[0], losses)
                    better = after > values
                    values[better], choices[better] = after[better], index
            self._solved[state] = values, choices
        return self._solved[state]

    def _expected(self, values: np.ndarray, losses: Losses) -> np.ndarray:
        """Σ mass · value at the sum of both losses; 0 below the grid, and the last value above it."""
        size, last = len(values), losses.first + len(losses.mass)
        below, above = np.zeros(max(0, -losses.first)), np.full(max(0, last), values[-1])
        padded = np.concatenate([below, values, above])
        if losses.first > 0:
            padded = padded[losses.first :]
        found = fftconvolve(padded, losses.mass[::-1], mode="valid")[:size]
        return np.maximum(found, 0.0)


def after_action(state: State, index: int) -> State:
    """The state one action later."""
    return tuple(count + (place == index) for place, count in enumerate(state))

"""ε from dp-accounting's privacy loss distributions, and its Rényi divergences. The only import site of dp_accounting.

A PLD composes terms that are fixed beforehand. Where somebody chooses the terms of later releases after seeing earlier
ones, its ε bounds nothing (arXiv:2602.15815); `privacy.filters` holds the rules that do.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import dp_accounting
from dp_accounting import pld, rdp

# Both are upper bounds on the true ε; the coarse grid is for progress lines and searches.
FINE_GRID = 1e-4
COARSE_GRID = 1e-3

NEIGHBORING_RELATION = "add-or-remove-one"


def sampled_gaussian(sampling_rate: float, noise_multiplier: float, releases: int) -> dp_accounting.DpEvent:
    """The event of ``releases`` Gaussian releases, each on its own Poisson sample.

    Args:
        sampling_rate: q in (0, 1].
        noise_multiplier: Noise std divided by the sensitivity of what it is added to.
        releases: How often; 0 gives the empty event.
    """
    if releases == 0:
        return dp_accounting.NoOpDpEvent()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian), releases)


class SampledGaussians(NamedTuple):
    """Some Gaussian releases, each on its own Poisson sample.

    Attributes:
        sampling_rate: q in (0, 1].
        noise_multiplier: Noise std divided by the sensitivity of what it is added to.
        releases: How many.
    """

    sampling_rate: float
    noise_multiplier: float
    releases: int


@functools.lru_cache(maxsize=4096)
def composed_epsilon(charges: tuple[SampledGaussians, ...], delta: float, grid: float = FINE_GRID) -> float:
    """Return ε at ``delta`` of Poisson-sampled Gaussian releases whose terms are fixed beforehand, in any order.

    Guarantee:
        An upper bound (pessimistic discretisation) for add-or-remove-one neighbours, unit = the sampled one. The data
        may be queried adaptively; q, z and the number of releases must not follow from earlier releases.

    Reference:
        dp-accounting's PLDAccountant; Koskela et al. 2020, arXiv:1906.03049.
    """
    if not any(charge.releases for charge in charges):
        return 0.0
    return float(_accountant(charges, grid).get_epsilon(delta))


def composed_delta(charges: tuple[SampledGaussians, ...], epsilon: float, grid: float = FINE_GRID) -> float:
    """Return δ at ``epsilon``; otherwise as `composed_epsilon`."""
    if not any(charge.releases for charge in charges):
        return 0.0
    return float(_accountant(charges, grid).get_delta(epsilon))


def _accountant(charges: tuple[SampledGaussians, ...], grid: float) -> pld.PLDAccountant:
    accountant = pld.PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
    )
    for charge in _merged(charges):
        accountant.compose(sampled_gaussian(*charge))
    return accountant


def _merged(charges: tuple[SampledGaussians, ...]) -> tuple[SampledGaussians, ...]:
    """Put unsampled releases of different multipliers together: exact, and correlated noise has one a round.

    Gaussian releases of z₁, z₂, … of sampling rate 1 compose to one of (Σ z⁻²)^(−1/2): see `joint_noise_multiplier`.
    """
    whole = [charge for charge in charges if charge.sampling_rate == 1 and charge.releases]
    if len(whole) < 2:
        return charges
    precision = sum(charge.releases * charge.noise_multiplier**-2 for charge in whole)
    rest = tuple(charge for charge in charges if charge.sampling_rate != 1)
    return (*rest, SampledGaussians(1.0, precision**-0.5, 1))


def gathered(charges: Iterable[SampledGaussians]) -> tuple[SampledGaussians, ...]:
    """Equal releases together, in one order: the same releases give the same ε to the last digit."""
    counts = Counter[tuple[float, float]]()
    for charge in charges:
        counts[charge.sampling_rate, charge.noise_multiplier] += charge.releases
    return tuple(SampledGaussians(q, z, releases) for (q, z), releases in sorted(counts.items()))


def epsilon(
    sampling_rate: float, noise_multiplier: float, releases: int, delta: float, grid: float = FINE_GRID
) -> float:
    """`composed_epsilon` of releases that are all alike."""
    return composed_epsilon((SampledGaussians(sampling_rate, noise_multiplier, releases),), delta, grid)


@functools.lru_cache(maxsize=256)
def calibrate_noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, releases: int) -> float:
    """Return a noise multiplier, rounded up to 1e-3, whose `epsilon` is at most ``target_epsilon``.

    Guarantee:
        ``epsilon(sampling_rate, result, releases, delta) <= target_epsilon``, checked on the fine grid.

    Raises:
        ValueError: If no multiplier below 10,000 is enough.
    """

    def spent(multiplier: float, grid: float = COARSE_GRID) -> float:
        return epsilon(sampling_rate, multiplier, releases, delta, grid)

    low, high = 0.05, 1.0
    while spent(high) > target_epsilon:
        low, high = high, 2 * high
        if high > 10_000:
            raise ValueError(f"ε = {target_epsilon} at δ = {delta} needs a noise multiplier above 10,000: raise ε or δ")
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > target_epsilon else (low, middle)
    result = math.ceil(high * 1e3) / 1e3
    while spent(result, FINE_GRID) > target_epsilon:
        result = round(result + 1e-3, 3)
    return result


def joint_noise_multiplier(*noise_multipliers: float) -> float:
    """Effective multiplier of one release made of several independent Gaussian views of the same clipped sum.

    Two views s + N(0, z₁²C²) and s + N(0, z₂²C²) have the sufficient statistic of one view with precision
    z₁⁻² + z₂⁻², so the pair leaks exactly as much as a single release with (z₁⁻² + z₂⁻²)^(−1/2).
    """
    return sum(z**-2 for z in noise_multipliers) ** -0.5


# The series of a fractional order ends where a term is below e^-30 of the sum, and its logarithms have rounding errors
# of about 1e-12. Both are far below these, which are added.
_RELATIVE_SLACK, _ABSOLUTE_SLACK = 1e-9, 1e-11


@functools.lru_cache(maxsize=4096)
def renyi_divergence(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    """Return the Rényi divergence, at one order, of one Gaussian release on a Poisson sample.

    Guarantee:
        An upper bound in both directions of add-or-remove-one neighbours: the larger one is that of the mixture
        against the plain Gaussian (Mironov, Talwar and Zhang 2019, arXiv:1908.10530, Theorem 5).

    Args:
        sampling_rate: q in (0, 1].
        noise_multiplier: z > 0.
        order: α >= 2.

    Raises:
        ValueError: If the order is below 2.
    """
    if not order >= 2:
        raise ValueError(f"Rényi order {order:g}; it must be at least 2")
    accountant = rdp.RdpAccountant(
        orders=[order], neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    accountant.compose(sampled_gaussian(sampling_rate, noise_multiplier, 1))
    return float(accountant.rdp[0]) * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK


def renyi_bound(epsilon: float, delta: float, order: float) -> float:
    """Return the largest Rényi divergence at one order that still implies (ε, δ); negative if none does.

    Reference:
        Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12: a divergence ρ at order α implies
        ε = ρ + log((α − 1)/α) − (log δ + log α)/(α − 1).
    """
    return epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)

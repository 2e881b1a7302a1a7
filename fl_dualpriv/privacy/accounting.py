"""ε from dp-accounting's privacy loss distributions (PLD), and its Rényi divergences.

Only this file imports dp_accounting.

A PLD composes terms that are fixed beforehand. If the terms of later releases are chosen after earlier releases were
seen, the ε of the PLD bounds nothing (arXiv:2602.15815). The rules in `privacy.filters` give a bound in that case.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting import gaussian_mechanism, pld, rdp
from dp_accounting.pld import common as privacy_loss_common
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism
from scipy.special import ndtri_exp
from scipy.stats import binom

from fl_dualpriv.privacy.loss_size import LOG_TAIL, error_share, grid_for, least_loss, pld_size

# Both grids give upper bounds on the true ε. The coarse grid is for progress lines and searches.
FINE_GRID = 1e-4
COARSE_GRID = 1e-3

PLAIN_CELLS, MOST_CELLS = 150_000, 200_000
"""Largest numbers of cells in the PLD of one release; a composition may have ten times as many.

They keep a computation to seconds and to less than 1 GiB. ``PLAIN_CELLS`` applies to dp-accounting's own PLDs, which
use dictionaries.
"""

LARGEST_GRID = 100.0  # e to the power of one grid step must stay a usable float

NEIGHBORING_RELATION = "add-or-remove-one"


def sampled_gaussian(sampling_rate: float, noise_multiplier: float, releases: int) -> dp_accounting.DpEvent:
    """Return the event of ``releases`` Gaussian releases, each on its own Poisson sample.

    Args:
        sampling_rate: q in (0, 1].
        noise_multiplier: Noise std divided by the sensitivity of the value to which the noise is added.
        releases: Number of releases; 0 gives the empty event.
    """
    if releases == 0:
        return dp_accounting.NoOpDpEvent()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian), releases)


class SampledGaussians(NamedTuple):
    """Gaussian releases on equal terms, each on its own Poisson sample.

    Attributes:
        sampling_rate: q in (0, 1].
        noise_multiplier: Noise std divided by the sensitivity of the value to which the noise is added.
        releases: Number of releases.
    """

    sampling_rate: float
    noise_multiplier: float
    releases: int


@functools.lru_cache(maxsize=4096)
def composed_epsilon(charges: tuple[SampledGaussians, ...], delta: float, grid: float = FINE_GRID) -> float:
    """Return ε at ``delta`` of Poisson-sampled Gaussian releases whose terms are fixed beforehand, in any order.

    Guarantee:
        The result is an upper bound for add-or-remove-one neighbours. The unit is the sampled one; see
        `bounded_epsilon`. The queries of the data may be adaptive. q, z and the number of releases must not depend on
        earlier releases.

    Reference:
        dp-accounting's PLDAccountant; Koskela et al. 2020, arXiv:1906.03049.
    """
    return bounded_epsilon(charges, delta, grid).epsilon


_LARGEST_PURE = 50.0  # beyond this ε a PLD has nothing to add to the plain sum


@functools.lru_cache(maxsize=4096)
@np.errstate(over="ignore", divide="ignore")  # as `bounded_epsilon`
def mixed_epsilon(
    charges: tuple[SampledGaussians, ...], pure: tuple[float, ...], delta: float, grid: float = FINE_GRID
) -> float:
    """Return ε at ``delta`` of Gaussian releases and of releases of pure DP together, all terms fixed beforehand.

    Guarantee:
        The result is an upper bound, as in `composed_epsilon`. It is the smaller one of two bounds. The first is the
        sum of the Gaussian releases' ε and of all pure ε (basic composition). The second is a PLD in which a release of
        pure ε-DP has the losses ±ε of randomised response, of which every ε-DP mechanism is a post-processing (Kairouz,
        Oh and Viswanath 2015, arXiv:1311.0776). Without pure releases it is `composed_epsilon`.

    Args:
        charges: The Gaussian releases.
        pure: ε of each pure release; its unit is the one that the Gaussian releases sample.
        delta: δ.
        grid: Grid step of the PLD.
    """
    plain = composed_epsilon(charges, delta, grid)
    if not pure:
        return plain
    best, total = plain + math.fsum(pure), math.fsum(pure)
    merged = tuple(charge for charge in _merged(charges) if charge.releases)
    left, cells = delta - rounding(merged), MOST_CELLS if grid <= FINE_GRID else MOST_CELLS // 4
    if not merged or total > _LARGEST_PURE or left <= delta / 2 or not _is_plain(merged, grid, min(cells, PLAIN_CELLS)):
        return best
    composed = None
    for charge in merged:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            charge.noise_multiplier,
            value_discretization_interval=grid,
            sampling_prob=charge.sampling_rate,
            neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        ).self_compose(charge.releases)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    for epsilon_of_one, count in sorted(Counter(pure).items()):
        parameters = privacy_loss_common.DifferentialPrivacyParameters(epsilon_of_one, 0.0)
        one = privacy_loss_distribution.from_privacy_parameters(parameters, grid)
        composed = composed.compose(one.self_compose(count))
    return min(best, float(composed.get_epsilon_for_delta(left)))


def multiplier_of_pure(epsilon: float) -> float:
    """Return the noise multiplier of an unsampled Gaussian release that reveals at least as much as pure ε-DP.

    Guarantee:
        Every ε-DP mechanism is a post-processing of randomised response with P(right) = e^ε / (1 + e^ε) (as in
        `mixed_epsilon`). That is a post-processing of N(0, 1) against N(μ, 1), cut at μ/2, where Φ(μ/2) = P(right). So
        the Gaussian release of multiplier 1/μ dominates. It costs more than ε itself: it serves code that knows only
        Gaussian releases, which then charges too much and never too little.

    Args:
        epsilon: ε > 0.
    """
    half = -float(ndtri_exp(-np.logaddexp(0.0, epsilon)))
    return (1 - 1e-9) / (2 * half)


class EpsilonBound(NamedTuple):
    """An upper bound on ε.

    Attributes:
        epsilon: ε; infinite where no bound is finite.
        bound: Kind of the bound. ``nothing``: there is no release. ``pld``: a privacy loss distribution on the
            requested grid. ``pld-refined``: a privacy loss distribution on another grid. ``gaussian``: the exact ε of
            unsampled releases. ``coins-shown``: the bound for an attacker who knows which samples contain the unit.
            ``renyi``: Rényi divergences.
    """

    epsilon: float
    bound: Literal["nothing", "pld", "pld-refined", "gaussian", "coins-shown", "renyi"]


@functools.lru_cache(maxsize=4096)
@np.errstate(over="ignore", divide="ignore")  # dp-accounting takes logarithms of subnormal masses: ±inf is intended
def bounded_epsilon(charges: tuple[SampledGaussians, ...], delta: float, grid: float = FINE_GRID) -> EpsilonBound:
    """Return the ε of `composed_epsilon` and the kind of the bound, within seconds and in less than 2 GiB.

    The result is the PLD of dp-accounting's `PLDAccountant` on ``grid`` wherever that PLD fits into memory and the grid
    moves ε by little: by about 0.5 % for the fine grid, 5 % for the coarse one. Elsewhere the result is the smallest of
    PLDs on other grids, of the exact formula for unsampled releases, and of two bounds without a grid.

    Guarantee:
        Each of these is an upper bound, so the smallest is. A PLD is pessimistic on every grid. The function asks a PLD
        for its ε at a δ that is smaller by `rounding`, which is more than the rounding errors of its convolutions.
    """
    charges = tuple(charge for charge in _merged(charges) if charge.releases)
    if not charges:
        return EpsilonBound(0.0, "nothing")
    bounds: list[EpsilonBound] = []
    left, fine = delta - rounding(charges), grid <= FINE_GRID
    tolerance, cells = (0.005, MOST_CELLS) if fine else (0.05, MOST_CELLS // 4)
    if left > delta / 2:
        if _is_plain(charges, grid, min(cells, PLAIN_CELLS)):
            plain = float(_accountant(charges, grid).get_epsilon(left))
            if error_share(charges, delta, grid, plain) <= tolerance:
                return EpsilonBound(plain, "pld")
            bounds.append(EpsilonBound(plain, "pld"))
        if all(charge.sampling_rate < 1 for charge in charges):
            start = bounds[0].epsilon if bounds else math.inf
            refined = _refined(charges, delta, start, grid, tolerance / 5, cells)
            bounds.append(EpsilonBound(refined, "pld-refined"))
    if all(charge.sampling_rate == 1 for charge in charges):
        bounds.append(EpsilonBound(_gaussian_epsilon(_precision(charges), delta), "gaussian"))
    else:
        bounds.append(EpsilonBound(coins_shown_epsilon(charges, delta), "coins-shown"))
        bounds.append(EpsilonBound(renyi_epsilon(charges, delta), "renyi"))
    return min(bounds, key=lambda bound: bound.epsilon)


def _is_plain(charges: tuple[SampledGaussians, ...], grid: float, cells: int) -> bool:
    """Return True if dp-accounting's own PLDs are small on a grid.

    For a PLD of up to 1000 cells dp-accounting computes the number of cells to the power of the number of releases.
    """
    size = pld_size(charges, LOG_TAIL)
    return size.least_grid(cells) <= grid and (
        size.one > 1000 * grid or all(charge.releases <= 2**16 for charge in charges)
    )


def composed_delta(charges: tuple[SampledGaussians, ...], epsilon: float, grid: float = FINE_GRID) -> float:
    """Return δ at ``epsilon`` by PLD; otherwise as `composed_epsilon`.

    It is for ordinary terms, because its time and memory have no bound.
    """
    if not any(charge.releases for charge in charges):
        return 0.0
    return float(_accountant(charges, grid).get_delta(epsilon))


def rounding(charges: Iterable[SampledGaussians]) -> float:
    """Return a bound on the rounding error in the δ of a PLD.

    A power of a Fourier transform multiplies its relative errors by the number of releases.
    """
    return 2.0**-52 * sum(charge.releases for charge in charges)


def _accountant(charges: tuple[SampledGaussians, ...], grid: float) -> pld.PLDAccountant:
    accountant = pld.PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
    )
    for charge in _merged(charges):
        accountant.compose(sampled_gaussian(*charge))
    return accountant


def _refined(
    charges: tuple[SampledGaussians, ...], delta: float, best_epsilon: float, grid: float, share: float, cells: int
) -> float:
    """Return the smallest ε of PLDs on ever finer grids, until a grid moves ε by ``share`` or has ``cells`` cells."""
    size = pld_size(charges, log_tail(charges, delta))
    floor = size.least_grid(cells)
    if not math.isfinite(floor) or floor > LARGEST_GRID:
        return best_epsilon
    step = max(grid, size.least_grid(cells // 10))
    for turn in range(4):
        if turn or math.isfinite(best_epsilon):
            step = max(min(step, grid_for(charges, delta, best_epsilon, share)), step / 16, floor)
        better = grid_epsilon(charges, delta, step)
        gained, best_epsilon = best_epsilon - better, min(best_epsilon, better)
        if (
            step == floor
            or (turn and gained < share * best_epsilon)
            or error_share(charges, delta, step, best_epsilon) <= share
        ):
            break
    return best_epsilon


def rough_epsilon(charges: tuple[SampledGaussians, ...], delta: float, about: float, cells: int = 4_000) -> float:
    """Return a quick upper bound on ε for searches, by a PLD of at most ``cells`` cells.

    Its grid suits an ε of ``about``. The result is infinite where no such PLD exists: some release is unsampled, or
    losses are too large.
    """
    if any(charge.sampling_rate == 1 for charge in charges) or delta < 2 * rounding(charges):
        return math.inf
    floor = pld_size(charges, log_tail(charges, delta)).least_grid(cells)
    grid = max(floor, grid_for(charges, delta, about, 0.0005))
    return grid_epsilon(charges, delta, grid) if grid <= LARGEST_GRID else math.inf


def log_tail(charges: Iterable[SampledGaussians], delta: float) -> float:
    """Return the logarithm of the mass of noise that a PLD may cut off: it moves δ by 1e-4 of δ."""
    sampled = sum(charge.releases * charge.sampling_rate for charge in charges)
    return min(max(math.log(1e-4 * delta / sampled), LOG_TAIL), -16.0)


@np.errstate(over="ignore", divide="ignore")  # as `bounded_epsilon`
def grid_epsilon(charges: tuple[SampledGaussians, ...], delta: float, grid: float) -> float:
    """Return ε by the PLD on one grid, however much the grid moves ε.

    Guarantee:
        The result is an upper bound, as in `bounded_epsilon`. The losses of the removal are those of dp-accounting's
        "connect the dots" (arXiv:2207.04380): a pair of distributions whose hockey-stick divergence is at least the
        true one at every ε above the least loss, negative ones included. H(Q‖P; e^ε) = 1 − e^ε + e^ε H(P‖Q; e^−ε), so
        the same pair in reverse order bounds the addition, where the noise beyond the least loss counts as an infinite
        loss. Dp-accounting's own PLD of the addition is the difference of nearly equal numbers where q is small.
    """
    tail = log_tail(charges, delta)
    composed = None
    for charge in charges:
        one = one_release_pld(charge, grid, tail).self_compose(charge.releases)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta - rounding(charges)))


def one_release_pld(
    charge: SampledGaussians, grid: float, tail: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """Return the PLD of one release at a rate below 1, which `grid_epsilon` uses to bound ε.

    Args:
        charge: Terms of the release.
        grid: Grid step of the losses.
        tail: Logarithm of the mass of noise that is cut off and counts as an infinite loss.
    """
    removal = privacy_loss_mechanism.GaussianPrivacyLoss(
        charge.noise_multiplier, log_mass_truncation_bound=tail, sampling_prob=charge.sampling_rate
    )
    most = removal.connect_dots_bounds().epsilon_upper
    assert most is not None
    first = math.floor(least_loss(charge) / grid)
    losses = grid * np.arange(first, max(math.ceil(most / grid), first + 1) + 1)
    deltas = np.minimum.accumulate(np.clip(removal.get_delta_for_epsilon(losses.tolist()), 0.0, 1.0))
    # Algorithm 1 of the paper, with equal steps.
    falls = -np.diff(deltas)
    up, down = falls / -math.expm1(-grid), falls / math.expm1(grid)  # shares of a fall for its upper and lower end
    masses = np.maximum(np.concatenate([[1 - deltas[0]], up]) - np.concatenate([down, [0.0]]), 0.0)
    turned = (masses * np.exp(-losses))[::-1]
    beyond = max(0.0, 1 - math.fsum(turned)) + math.exp(LOG_TAIL)
    make = pld_pmf.DensePLDPmf
    return privacy_loss_distribution.PrivacyLossDistribution(
        make(grid, first, masses, float(deltas[-1]), True),
        make(grid, 1 - first - len(masses), turned, beyond, True),
    )


def _precision(charges: Iterable[SampledGaussians]) -> float:
    """Return Σ z⁻² of unsampled releases."""
    return math.fsum(charge.releases / max(charge.noise_multiplier, 1e-100) ** 2 for charge in charges)


def _gaussian_epsilon(precision: float, delta: float) -> float:
    """Return the exact ε of unsampled Gaussian releases (Balle and Wang 2018, arXiv:1805.06530), rounded up.

    Where ε is above 5e8 the result is the bound by the Gaussian tail exp(−t²/2).
    """
    if not 0 < precision < 1e200:
        return math.inf if precision else 0.0
    if precision > 1e9:  # the exact formula is a difference of large numbers; the loss is N(μ²/2, μ²)
        return precision / 2 + math.sqrt(2 * precision * math.log(1 / delta))
    with np.errstate(divide="ignore"):
        return float(gaussian_mechanism.get_epsilon_gaussian(precision**-0.5, delta)) * (1 + 1e-9)


def coins_shown_epsilon(charges: tuple[SampledGaussians, ...], delta: float) -> float:
    """Return ε for an attacker who knows which samples contain the unit; half of δ covers too many of them.

    Guarantee:
        The result is an upper bound. The output with and without the unit is a mixture over its coins of unsampled
        Gaussian releases, and the divergence of mixtures is at most the mean divergence (joint convexity). With
        P(K_i > k_i) at most δ/(2m) for each of m kinds of terms, the mean is at most δ/2 plus the divergence at all
        k_i.
    """
    most = delta / 2 / len(charges)

    def times(charge: SampledGaussians) -> int:
        if charge.sampling_rate == 1 or charge.releases > 2**31:
            return charge.releases
        return min(charge.releases, int(binom.isf(most, charge.releases, charge.sampling_rate)) + 1)

    return _gaussian_epsilon(_precision(c._replace(releases=times(c)) for c in charges), delta / 2)


_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


def renyi_epsilon(charges: tuple[SampledGaussians, ...], delta: float) -> float:
    """Return ε by Rényi divergences at whole orders (Mironov et al. 2019, arXiv:1908.10530)."""
    divergences = ((order, _renyi(charges, order)) for order in _ORDERS)
    # Proposition 12 of Canonne, Kamath and Steinke, as `renyi_bound`.
    bounds = [d + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a, d in divergences]
    return max(0.0, min(bounds))


def _renyi(charges: tuple[SampledGaussians, ...], order: float) -> float:
    if any(charge.noise_multiplier < 1e-100 for charge in charges):
        return math.inf
    return math.fsum(c.releases * renyi_divergence(c.sampling_rate, c.noise_multiplier, order) for c in charges)


def _merged(charges: tuple[SampledGaussians, ...]) -> tuple[SampledGaussians, ...]:
    """Merge unsampled releases of different multipliers into one, exactly; correlated noise has one in each round.

    Gaussian releases of z₁, z₂, … of sampling rate 1 compose to one of (Σ z⁻²)^(−1/2): see `joint_noise_multiplier`.
    """
    whole = [charge for charge in charges if charge.sampling_rate == 1 and charge.releases]
    if len(whole) < 2:
        return charges
    precision = sum(charge.releases * charge.noise_multiplier**-2 for charge in whole)
    rest = tuple(charge for charge in charges if charge.sampling_rate != 1)
    return (*rest, SampledGaussians(1.0, precision**-0.5, 1))


def gathered(charges: Iterable[SampledGaussians]) -> tuple[SampledGaussians, ...]:
    """Group equal releases and sort them, so that the same releases give the same ε to the last digit."""
    counts = Counter[tuple[float, float]]()
    for charge in charges:
        counts[charge.sampling_rate, charge.noise_multiplier] += charge.releases
    return tuple(SampledGaussians(q, z, releases) for (q, z), releases in sorted(counts.items()))


def epsilon(
    sampling_rate: float, noise_multiplier: float, releases: int, delta: float, grid: float = FINE_GRID
) -> float:
    """Return the `composed_epsilon` of releases on equal terms."""
    return composed_epsilon((SampledGaussians(sampling_rate, noise_multiplier, releases),), delta, grid)


def joint_noise_multiplier(*noise_multipliers: float) -> float:
    """Return the effective multiplier of one release made of independent Gaussian views of the same clipped sum.

    Two views s + N(0, z₁²C²) and s + N(0, z₂²C²) have the sufficient statistic of one view with precision
    z₁⁻² + z₂⁻², so the pair leaks exactly as much as a single release with (z₁⁻² + z₂⁻²)^(−1/2).
    """
    return sum(z**-2 for z in noise_multipliers) ** -0.5


# The series of a fractional order ends where a term is below e^-30 of the sum, and its logarithms have rounding errors
# of about 1e-12. Both errors are far below these two numbers, which are added to the divergence.
_RELATIVE_SLACK, _ABSOLUTE_SLACK = 1e-9, 1e-11


@functools.lru_cache(maxsize=4096)
def renyi_divergence(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    """Return the Rényi divergence, at one order, of one Gaussian release on a Poisson sample.

    Guarantee:
        The result is an upper bound in both directions of add-or-remove-one neighbours: the larger divergence is that
        of the mixture against the plain Gaussian (Mironov, Talwar and Zhang 2019, arXiv:1908.10530, Theorem 5).

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


@functools.lru_cache(maxsize=4096)
def pure_renyi_divergence(epsilon: float, order: float) -> float:
    """Return the Rényi divergence, at one order, of a release of pure ε-DP: that of randomised response.

    Guarantee:
        The result is an upper bound in both directions, because every ε-DP mechanism is a post-processing of randomised
        response (see `mixed_epsilon`), and its two directions are alike.

    Args:
        epsilon: ε > 0.
        order: α > 1.
    """
    right, wrong = -np.logaddexp(0.0, -epsilon), -np.logaddexp(0.0, epsilon)  # logarithms of the two probabilities
    both = np.logaddexp(order * right + (1 - order) * wrong, order * wrong + (1 - order) * right)
    return float(both) / (order - 1) * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK


def renyi_bound(epsilon: float, delta: float, order: float) -> float:
    """Return the largest Rényi divergence at one order that still implies (ε, δ); negative if none does.

    Reference:
        Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Proposition 12: a divergence ρ at order α implies
        ε = ρ + log((α − 1)/α) − (log δ + log α)/(α − 1).
    """
    return epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)

"""Calibration: find the noise multiplier that spends a target ε, within 1 % and never above it."""

import contextlib
import functools
import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    SampledGaussians,
    bounded_epsilon,
    epsilon,
    gathered,
    mixed_epsilon,
    rough_epsilon,
)
from fl_dualpriv.privacy.limits import LARGEST_NOISE_MULTIPLIER, SHARED_CALIBRATIONS, SMALLEST_NOISE_MULTIPLIER
from fl_dualpriv.privacy.loss_size import error_share

LEAST_SHARE = 0.99
"""Smallest share of the target ε that a calibrated multiplier spends, wherever some multiplier spends so much."""

NOTE_AFTER = 2.0
"""Seconds after which a calibration logs that it is at work."""

_CELLS = (4_000, 40_000)  # cells of the PLDs of a search: a rough one, then one that is nearly exact
_IDLE_MULTIPLIER = 0.051  # used where less noise spends no more: a unit is sampled with probability δ at most

_log = logging.getLogger("fl_dualpriv")


@functools.lru_cache(maxsize=256)
def calibrate_noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, releases: int) -> float:
    """Return a noise multiplier whose `epsilon` is at most ``target_epsilon`` and, where possible, 0.99 of it or more.

    The result is a multiple of 0.001 if the smallest such multiple that the coarse grid admits spends 0.99 of the
    target. Otherwise it has six digits. Dp-accounting's own `calibrate_dp_mechanism` bisects on one grid, which would
    have to suit all multipliers from 0.001 to a million.

    Guarantee:
        ``epsilon(sampling_rate, result, releases, delta) <= target_epsilon``, checked on the fine grid. Searches on
        other grids only propose candidates.

    Raises:
        PrivacyError: If no multiplier up to `LARGEST_NOISE_MULTIPLIER` is enough.
    """

    def compute() -> float:
        with _said_if_slow(f"computing the noise multiplier for ε = {target_epsilon:g}: this can take a minute"):
            return _calibrated(target_epsilon, delta, sampling_rate, releases)

    return _shared(
        ("noise", target_epsilon, delta, sampling_rate, releases),
        compute,
        lambda noise: _is_near(epsilon(sampling_rate, noise, releases, delta), target_epsilon),
    )


@functools.lru_cache(maxsize=256)
def calibrate_beside(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    releases: int,
    others: tuple[SampledGaussians, ...],
    pure: tuple[float, ...] = (),
) -> float:
    """Return a noise multiplier with which some releases and the given others together spend at most a target ε.

    Guarantee:
        ``mixed_epsilon`` of the releases at the result, of ``others`` and of ``pure`` is at most ``target_epsilon``,
        checked on the fine grid. Searches on the coarse grid only propose candidates.

    Args:
        target_epsilon: Largest ε of everything together.
        delta: δ.
        sampling_rate: q of the calibrated releases.
        releases: Number of the calibrated releases, >= 1.
        others: Gaussian releases with given terms.
        pure: ε of each release of pure DP.

    Returns:
        A multiplier of six digits that spends 0.99 of the target or more where the grid allows it.

    Raises:
        PrivacyError: If the others spend the target by themselves, or no multiplier is enough.
    """

    def spent(noise: float, grid: float = FINE_GRID) -> float:
        steps = SampledGaussians(sampling_rate, noise, releases)
        return mixed_epsilon(gathered((steps, *others)), pure, delta, grid)

    def compute() -> float:
        with _said_if_slow(f"computing the noise multiplier for ε = {target_epsilon:g}: this can take a minute"):
            start = calibrate_noise_multiplier(target_epsilon, delta, sampling_rate, releases)
            if not spent(LARGEST_NOISE_MULTIPLIER, COARSE_GRID) < target_epsilon:
                raise PrivacyError(
                    f"ε = {target_epsilon:g} at δ = {delta:g}: the selection of the start leaves nothing for "
                    f"{releases} releases; lower privacy.record.selection-share, or raise ε or δ"
                )
            near = _found(functools.partial(spent, grid=COARSE_GRID), target_epsilon, 0.992, start)
            return _found(spent, target_epsilon, LEAST_SHARE, near)

    return _shared(
        ("beside", target_epsilon, delta, sampling_rate, releases, others, pure),
        compute,
        lambda noise: _is_near(spent(noise), target_epsilon),
    )


def _shared(question: tuple[object, ...], compute: Callable[[], float], is_within: Callable[[float], bool]) -> float:
    """Return the multiplier that another process of the run found, or compute it and leave it to the others.

    Guarantee:
        A multiplier of another process is used only if its ε on the fine grid, computed here, is at most the target. A
        missing, damaged or false file costs time, never privacy.

    Args:
        question: Name and arguments of the calibration.
        compute: Function that calibrates here.
        is_within: Function that returns True if a multiplier spends at most the target, and nearly all of it.
    """
    folder = os.environ.get(SHARED_CALIBRATIONS)
    if not folder:
        return compute()
    file = Path(folder) / hashlib.sha256(repr(question).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        noise = float(file.read_text(encoding="ascii"))
        if SMALLEST_NOISE_MULTIPLIER <= noise <= LARGEST_NOISE_MULTIPLIER and is_within(noise):
            return noise
    noise = compute()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(repr(noise), encoding="ascii")
        temporary.replace(file)
    return noise


def _is_near(spent: float, target: float) -> bool:
    return LEAST_SHARE * target <= spent <= target


def _calibrated(target: float, delta: float, rate: float, releases: int) -> float:
    def spent(noise: float, grid: float = FINE_GRID) -> float:
        return epsilon(rate, noise, releases, delta, grid)

    if spent(LARGEST_NOISE_MULTIPLIER, COARSE_GRID) > target and spent(LARGEST_NOISE_MULTIPLIER) > target:
        raise PrivacyError(
            f"ε = {target:g} at δ = {delta:g} over {releases} releases needs a noise multiplier above "
            f"{LARGEST_NOISE_MULTIPLIER:,.0f}: raise ε or δ, or make fewer releases"
        )
    near = 1.0
    for cells, lowest in zip(_CELLS, (0.995, 0.998), strict=True):
        near = _found(functools.partial(_proposed, target, delta, rate, releases, cells), target, lowest, near)
        if cells == _CELLS[0]:
            rounded = _rounded(spent, target, near) if _is_coarse_enough(target, delta, rate, releases) else None
            if rounded is not None and spent(rounded) >= LEAST_SHARE * target:
                return rounded
    result = _found(spent, target, 0.993, near)
    return result if result > SMALLEST_NOISE_MULTIPLIER else _IDLE_MULTIPLIER


def _proposed(target: float, delta: float, rate: float, releases: int, cells: int, noise: float) -> float:
    """Return the ε of a multiplier quickly: on a grid for the target, with at most ``cells`` cells."""
    charges = (SampledGaussians(rate, noise, releases),)
    quick = rough_epsilon(charges, delta, target, cells)
    return quick if math.isfinite(quick) else bounded_epsilon(charges, delta, COARSE_GRID).epsilon


def _found(spent: Callable[[float], float], target: float, lowest: float, start: float) -> float:
    """Find a multiplier of six digits with ``lowest``·target <= spent <= target, by false position in logarithms.

    Args:
        spent: Function from a multiplier to its ε, falling.
        target: Largest ε allowed.
        lowest: Share of the target that is enough.
        start: Multiplier at which the search begins.

    Returns:
        The smallest multiplier tried that spends at most the target; the end of the range if that spends too little.
    """
    aim = math.log(target * (1 + lowest) / 2)
    low: tuple[float, float] | None = None  # logarithms of a multiplier that spends too much, and of its ε
    high: tuple[float, float] | None = None
    noise, step = _six_digits(start), 1.02 if start != 1.0 else 4.0
    for turn in range(60):
        here = (math.log(noise), math.log(min(max(spent(noise), target * 1e-6), target * 1e6)))
        if here[1] > math.log(target):
            low = here
            if noise >= LARGEST_NOISE_MULTIPLIER:
                break
        else:
            high = here
            if here[1] >= math.log(target * lowest) or noise <= SMALLEST_NOISE_MULTIPLIER:
                break
        if low is None or high is None:
            noise = noise * step if high is None else noise / step
            noise = min(max(_six_digits(noise), SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER)
            step **= 1.5
            continue
        if high[0] - low[0] < 1.2e-5:  # the two differ in the last of six digits
            break
        share = (low[1] - aim) / (low[1] - high[1]) if turn % 3 else 0.5  # every third step bisects
        share = min(max(share, 0.02), 0.98)
        noise = min(_six_digits(math.exp(low[0] + share * (high[0] - low[0]))), math.exp(high[0]))
    return _six_digits(math.exp(high[0])) if high is not None else LARGEST_NOISE_MULTIPLIER


def _six_digits(noise: float) -> float:
    """Round a number to six significant digits."""
    return float(f"{noise:.6g}")


def _is_coarse_enough(target: float, delta: float, rate: float, releases: int) -> bool:
    """Return True if the coarse grid moves ε by less than the share that a calibration may leave."""
    charges = (SampledGaussians(rate, 1.0, releases),)
    return error_share(charges, delta, COARSE_GRID, target) < 1 - LEAST_SHARE


def _rounded(spent: Callable[[float, float], float], target: float, near: float) -> float | None:
    """Return the multiple of 0.001 at which bisection of (0.05, 1), (1, 2), (2, 4) … on the coarse grid ends.

    Args:
        spent: Function from a multiplier and a grid to ε.
        target: Largest ε allowed, on the fine grid.
        near: Approximate result, which saves most of the bisection.

    Returns:
        None if the result is not near ``near``.
    """
    if not near * 1.01 > 0.051:
        return None
    least, most = near * 0.99, near * 1.02

    def is_over(noise: float) -> bool:
        nonlocal least, most
        if noise <= least or noise >= most:
            return noise <= least
        over = spent(noise, COARSE_GRID) > target
        least, most = (noise, most) if over else (least, noise)
        return over

    low, high = 0.05, 1.0
    while is_over(high):
        low, high = high, 2 * high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if is_over(middle) else (low, middle)
    if spent(high, COARSE_GRID) > target or (low > 0.05 and not spent(low, COARSE_GRID) > target):
        return None
    result = math.ceil(high * 1e3) / 1e3
    for _ in range(5):
        if spent(result, FINE_GRID) <= target:
            return result
        result = round(result + 1e-3, 3)
    return None


@contextlib.contextmanager
def _said_if_slow(words: str) -> Iterator[None]:
    """Log a line if the body of the ``with`` block takes longer than `NOTE_AFTER`."""
    timer = threading.Timer(NOTE_AFTER, _log.warning, args=(words,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

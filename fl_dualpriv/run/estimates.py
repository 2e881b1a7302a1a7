"""Means over seeds with their 95 % intervals, and paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds in percent or points, with the half width of its 95 % interval by Student's t.

    Attributes:
        mean: The mean.
        half: Half width; None with one seed.
        values: The value of each seed.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate a mean.

        Example:
            >>> Estimate.of([1.0, 2.0, 3.0]).text()
            '2.0 ± 2.5'
        """
        half = None
        if len(values) > 1:
            from scipy import stats  # late, because it takes a second to load

            half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean=statistics.mean(values), half=half, values=tuple(values))

    @property
    def is_clear(self) -> bool:
        """True if there is an interval and it leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, *, sign: bool = False) -> str:
        """Return mean ± half width, with a sign in front of a difference."""
        mean = f"{self.mean:+.1f}" if sign else f"{self.mean:.1f}"
        return mean if self.half is None else f"{mean} ± {self.half:.1f}"

    def content(self) -> dict[str, Any]:
        """Return the numbers for a JSON file, rounded to a hundredth."""
        half = None if self.half is None else round(self.half, 2)
        return {"mean": round(self.mean, 2), "half": half, "values": [round(value, 2) for value in self.values]}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the paired difference in points over the seeds that both have; None without a common seed.

    Example:
        >>> paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.4}).text(sign=True)
        '+15.0 ± 63.5'
    """
    common = sorted(ours.keys() & theirs.keys())
    return Estimate.of([100 * (ours[seed] - theirs[seed]) for seed in common]) if common else None

"""ROC curve of a membership score, its area with an interval, and the largest area that ε allows."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

_MOST_POINTS = 200
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Roc:
    """A ROC curve and its figures.

    Attributes:
        auc: Area under the curve; ties count half.
        auc_low: Lower end of the 95 % interval of ``auc``.
        auc_high: Upper end of that interval.
        tpr_at_1_fpr: Largest true-positive rate of a threshold whose false-positive rate is at most 1 %.
        members: Number of members' scores.
        non_members: Number of non-members' scores.
        fpr: False-positive rates of points of the curve, in rising order, for a plot.
        tpr: True-positive rates of the same points.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr_at_1_fpr: float
    members: int
    non_members: int
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


def roc(scores: np.ndarray, is_member: np.ndarray, cluster: np.ndarray) -> Roc:
    """Compute the ROC curve and its figures for one set of scores.

    The interval treats clusters as the independent draws. Scores of one training share its noise and its batches, so a
    training is a cluster. With a single cluster, records are assumed independent, and the interval is too narrow.

    Args:
        scores: Finite scores, (score,); larger means member.
        is_member: True for members, (score,) bool; both kinds must occur.
        cluster: Cluster of each score, (score,) int.

    Raises:
        ValueError: If there are no members or no non-members.

    Reference:
        DeLong, DeLong and Clarke-Pearson 1988 for independent scores; Obuchowski 1997 for clusters, whose covariance
        of members and non-members of one cluster is kept here.
    """
    if not (is_member.any() and (~is_member).any()):
        raise ValueError(f"{int(is_member.sum())} members of {len(is_member)} scores; a ROC curve needs both kinds")
    inside, outside = scores[is_member], scores[~is_member]
    above = _share_below(inside, outside)  # for each member: share of non-members below it
    below = 1 - _share_below(outside, inside)  # for each non-member: share of members above it
    area = float(above.mean())
    low, high = _interval(area, above, below, cluster[is_member], cluster[~is_member])
    fpr, tpr = _curve(inside, outside)
    picked = _spread_out(fpr)
    return Roc(
        auc=area,
        auc_low=low,
        auc_high=high,
        tpr_at_1_fpr=float(tpr[fpr <= 0.01].max()),
        members=len(inside),
        non_members=len(outside),
        fpr=tuple(fpr[picked].tolist()),
        tpr=tuple(tpr[picked].tolist()),
    )


def auc_ceiling(epsilon: float, delta: float) -> float:
    """Return the largest AUC of any attack on one record of an (ε, δ)-DP release: 1 − (1 − δ)²/(1 + e^ε).

    Such a release bounds a test by TPR ≤ e^ε·FPR + δ and 1 − FPR ≤ e^ε·(1 − TPR) + δ. The two lines meet at
    FPR = (1 − δ)/(1 + e^ε) = 1 − TPR. The area above them consists of two triangles of base 1 − δ and of that height.
    The bounds hold for each record at any threshold, so they hold for the curve of many records with one threshold.

    Reference:
        Kairouz, Oh and Viswanath 2015, arXiv:1311.0776, for the region.
    """
    return 1 - (1 - delta) ** 2 / (1 + math.exp(min(epsilon, 700.0)))  # e^710 overflows


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return, for each value, the share of ``others`` that are smaller; equal ones count half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(others))


def _interval(
    area: float, above: np.ndarray, below: np.ndarray, cluster_in: np.ndarray, cluster_out: np.ndarray
) -> tuple[float, float]:
    names = np.unique(np.concatenate([cluster_in, cluster_out]))
    if len(names) == 1:
        variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
        reach = float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * math.sqrt(variance)
    else:
        # The error of the area is, to first order, a sum over clusters of these terms.
        terms = np.bincount(np.searchsorted(names, cluster_in), above - area, len(names)) / len(above)
        terms = terms + np.bincount(np.searchsorted(names, cluster_out), below - area, len(names)) / len(below)
        variance = len(names) / (len(names) - 1) * float((terms**2).sum())
        reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(names) - 1)) * math.sqrt(variance)
    return max(0.0, area - reach), min(1.0, area + reach)


def _curve(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rates of every threshold, from "no record is a member" to "all records are"."""
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    fpr = 1 - np.searchsorted(np.sort(outside), thresholds, "left") / len(outside)
    tpr = 1 - np.searchsorted(np.sort(inside), thresholds, "left") / len(inside)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def _spread_out(fpr: np.ndarray) -> np.ndarray:
    """Pick points of the curve, denser at small false-positive rates, because that end is read on a log scale."""
    if len(fpr) <= _MOST_POINTS:
        return np.arange(len(fpr))
    wanted = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, _MOST_POINTS - 1)])
    return np.unique(np.minimum(np.searchsorted(fpr, wanted, "right") - 1, len(fpr) - 1))

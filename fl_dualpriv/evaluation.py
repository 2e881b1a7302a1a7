"""Accuracy on a client's own classes (local) and on everybody else's (neighbour), always over all class names."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """Counts on held-out images, for one client.

    Attributes:
        local_correct: Correct among images of classes the client holds.
        local_total: Images of classes the client holds.
        neighbour_correct: Correct among all other images.
        neighbour_total: All other images.
    """

    local_correct: int
    local_total: int
    neighbour_correct: int
    neighbour_total: int


def score(class_features: Tensor, image_features: Tensor, labels: Tensor, held_classes: Tensor) -> Score:
    """Classify by the largest cosine over *all* class names, and count by whether the true class is held.

    Args:
        class_features: (n_cls, embed_dim), unit norm.
        image_features: (image, embed_dim), unit norm.
        labels: (image,).
        held_classes: Class ids that the client holds; public metadata.

    Reference:
        DP-FPL, arXiv:2501.13904, Tables 2 and 3.
    """
    logits = image_features @ class_features.T
    # The argmax of NaN is class 0: an unreadable image or a diverged prompt would be right by accident.
    correct = (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)
    local = torch.isin(labels, held_classes)
    return Score(
        local_correct=int((correct & local).sum()),
        local_total=int(local.sum()),
        neighbour_correct=int((correct & ~local).sum()),
        neighbour_total=int((~local).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Mean over clients of their accuracies; None where no client has such images."""

    local: float | None
    neighbour: float | None


def mean_accuracy(scores: Sequence[Score]) -> Accuracy:
    """Average per-client accuracies with equal weights, as DP-FPL's tables do."""

    def mean(pairs: list[tuple[int, int]]) -> float | None:
        shares = [correct / total for correct, total in pairs if total > 0]
        return sum(shares) / len(shares) if shares else None

    return Accuracy(
        local=mean([(s.local_correct, s.local_total) for s in scores]),
        neighbour=mean([(s.neighbour_correct, s.neighbour_total) for s in scores]),
    )

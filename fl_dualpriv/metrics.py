"""Accuracy on a client's own classes (local) and on all other classes (neighbour).

Answers are over all class names, but for the free rival at home; see `scores_within_lists`. With a class prior, answers
at home are those of `scores_with_priors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """Counts on held-out images, for one client.

    Attributes:
        local_correct: Number of correct images among those of classes that the client holds.
        local_total: Number of images of classes that the client holds.
        neighbour_correct: Number of correct images among all other images.
        neighbour_total: Number of all other images.
        by_group: Pairs (correct records, all records), one for each group; (0, 0) for a group that the client does not
            hold. Empty if the client does not report groups.
    """

    local_correct: int
    local_total: int
    neighbour_correct: int
    neighbour_total: int
    by_group: tuple[tuple[int, int], ...] = ()


def score(class_features: Tensor, image_features: Tensor, labels: Tensor, held_classes: Tensor) -> Score:
    """Classify by the largest cosine over *all* class names; count images of held and of other classes separately.

    Args:
        class_features: (n_cls, embed_dim), unit norm.
        image_features: (image, embed_dim), unit norm.
        labels: (image,).
        held_classes: Class ids that the client holds, which are public metadata.

    Reference:
        DP-FPL, arXiv:2501.13904, Tables 2 and 3.
    """
    correct = _correct(class_features, image_features, labels)
    local = torch.isin(labels, held_classes)
    return Score(
        local_correct=int((correct & local).sum()),
        local_total=int(local.sum()),
        neighbour_correct=int((correct & ~local).sum()),
        neighbour_total=int((~local).sum()),
    )


def _correct(class_features: Tensor, image_features: Tensor, labels: Tensor) -> Tensor:
    return _right(image_features @ class_features.T, labels)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    # The argmax of NaN is class 0, so an unreadable image or a diverged prompt would count as correct by accident.
    return (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)


def count_by_class(class_features: Tensor, image_features: Tensor, labels: Tensor, n_cls: int) -> tuple[Tensor, Tensor]:
    """Count the correct images and all images of each class, both (n_cls,) int64 on the CPU; arguments as in `score`.

    The counts do not depend on the client, so clients with the same prompt share one count (see `split_counts`).
    """
    return count_logits(image_features @ class_features.T, labels, n_cls)


def count_logits(logits: Tensor, labels: Tensor, n_cls: int) -> tuple[Tensor, Tensor]:
    """Do the same as `count_by_class` from logits (image, n_cls); an image with a non-finite logit counts as wrong."""
    right = labels[_right(logits, labels)]
    return torch.bincount(right, minlength=n_cls).cpu(), torch.bincount(labels, minlength=n_cls).cpu()


def split_counts(correct: Tensor, total: Tensor, held: Tensor, *, by_group: bool = False) -> list[Score]:
    """Compute the scores of many clients from counts per class or other group; each equals the result of `score`.

    Args:
        correct: Correct images of each class from `count_by_class`, (n_cls,).
        total: All images of each class from `count_by_class`, (n_cls,).
        held: True where a client holds a class, (client, n_cls) bool.
        by_group: True to report the counts of each group that the client holds, too.
    """
    counts = torch.stack([correct, total], dim=1)
    local = held.to(counts.dtype) @ counts
    rows = torch.cat([local, counts.sum(dim=0) - local], dim=1).tolist()
    pairs: list[list[list[int]]] = (held[:, :, None] * counts).tolist() if by_group else [[] for _ in rows]
    return [
        Score(
            local_correct=a,
            local_total=b,
            neighbour_correct=c,
            neighbour_total=d,
            by_group=tuple((right, of) for right, of in groups),
        )
        for (a, b, c, d), groups in zip(rows, pairs, strict=True)
    ]


def scores_within_lists(logits: Tensor, labels: Tensor, held: Tensor) -> list[Score]:
    """Compute the scores of the free rival: at home each client's answers are restricted to its class list.

    A client's class list is public, so this costs no ε. No correct answer at home is lost by the restriction: the
    label is in the list, and the largest logit of all classes is the largest of the list. `local` is therefore never
    below that of `split_counts`. `neighbour` is the same, because the list says nothing about other clients' records.

    Args:
        logits: Logits of the un-tuned model (image, n_cls); an image with a non-finite logit counts as wrong.
        labels: Labels (image,).
        held: True where a client holds a class, (client, n_cls) bool.
    """
    unrestricted = split_counts(*count_logits(logits, labels, logits.shape[1]), held)
    lists, list_of = torch.unique(held, dim=0, return_inverse=True)  # clients with one list share one count
    correct = []
    for row in lists.to(logits.device):
        inside = row[labels]
        finite = torch.isfinite(logits[inside]).all(dim=1)
        answers = logits[inside].masked_fill(~row, -torch.inf).argmax(dim=1)
        correct.append(int(((answers == labels[inside]) & finite).sum()))
    return [replace(score, local_correct=correct[i]) for score, i in zip(unrestricted, list_of.tolist(), strict=True)]


def scores_with_priors(logits: Tensor, labels: Tensor, held: Tensor, log_prior: Tensor) -> list[Score]:
    """Compute the scores of clients that add their log class priors to the logits of one prompt at home.

    At home the answer is argmax(logits + log π). A class prior is public, so this costs no ε. With the logits of the
    un-tuned model it is a rival without learning; with those of a prompt that was trained by balanced softmax it is the
    use for which it was trained. ``neighbour`` is that of `split_counts`: the prior says nothing about other clients'
    records.

    Args:
        logits: Logits as in the loss, so with CLIP's inverse temperature, (image, n_cls). An image with a non-finite
            logit counts as wrong.
        labels: Labels (image,).
        held: True where a client holds a class, (client, n_cls) bool.
        log_prior: Log prior of each client, finite, up to a constant, (client, n_cls).
    """
    without = split_counts(*count_logits(logits, labels, logits.shape[1]), held)
    # Clients with one list and one prior share one count.
    kinds = torch.cat([held.to(log_prior), log_prior], dim=1)
    kinds, kind_of = torch.unique(kinds, dim=0, return_inverse=True)
    correct = []
    for kind in kinds.to(logits.device):
        row, prior = kind.chunk(2)
        inside = row.bool()[labels]
        correct.append(int(_right(logits[inside] + prior, labels[inside]).sum()))
    return [replace(score, local_correct=correct[i]) for score, i in zip(without, kind_of.tolist(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Mean accuracy over clients; None where no client has such images.

    ``by_group`` holds the mean accuracy of each group over the clients that hold it. It is empty if the clients do not
    report groups, or if they report different numbers of groups.
    """

    local: float | None
    neighbour: float | None
    by_group: Sequence[float | None] = ()


def mean_accuracy(scores: Sequence[Score]) -> Accuracy:
    """Average the accuracies of the clients with equal weights, as DP-FPL's tables do."""

    def mean(pairs: list[tuple[int, int]]) -> float | None:
        shares = [correct / total for correct, total in pairs if total > 0]
        return sum(shares) / len(shares) if shares else None

    alike = len({len(s.by_group) for s in scores}) == 1
    return Accuracy(
        local=mean([(s.local_correct, s.local_total) for s in scores]),
        neighbour=mean([(s.neighbour_correct, s.neighbour_total) for s in scores]),
        by_group=tuple(mean(list(pairs)) for pairs in zip(*(s.by_group for s in scores if alike), strict=True)),
    )


def harmonic_mean(local: float | None, neighbour: float | None) -> float | None:
    """Return the harmonic mean of two accuracies in [0, 1]: 0 if one is 0, None if one is None."""
    if local is None or neighbour is None:
        return None
    return 2 * local * neighbour / (local + neighbour) if local + neighbour > 0 else 0.0

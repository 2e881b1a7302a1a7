"""Accuracy of a client on its own distribution (local) and on the other clients' records (neighbour).

A *group* is the category by which held-out records are counted: the class of an image or the type of a question, or a
pair of domain and class where clients belong to domains. A client holds the groups in which it has training records.
Held-out records of these groups are its own distribution, each group with the same weight. All other held-out records
are its neighbours', each group with the same weight. All counts are integers, and accuracies are computed from them
exactly as stated, so that no result depends on how clients are batched. Answers are among all classes; at home a class
list or a class prior may change them, see `counts_at_home`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Use = Literal["plain", "class-prior", "class-list"]
"""Use of public knowledge about a client at home: none, its class prior, or its class list as the only answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """Counts on one set of held-out records, for some clients.

    Attributes:
        correct: Number of correct records of each group, (client, group) int64.
        total: Number of all records of each group, (group,) int64.
        held: True where a client holds a group, (client, group) bool; public metadata.
    """

    correct: np.ndarray
    total: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, correct: Tensor, total: Tensor, held: Tensor) -> "ScoreTable":
        """Build a table; ``correct`` is (client, group), or (group,) if all clients share one prompt."""
        rows = np.broadcast_to(correct.numpy(), tuple(held.shape))
        return cls(correct=rows, total=total.numpy(), held=held.numpy())

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.held)

    def local(self) -> list[float | None]:
        """Return each client's accuracy on its own groups, each with the same weight; None without such records."""
        return self._accuracies(self.held)

    def neighbour(self) -> list[float | None]:
        """Return each client's accuracy on all other groups, each with the same weight; None without such records."""
        return self._accuracies(~self.held)

    def _accuracies(self, chosen: np.ndarray) -> list[float | None]:
        counted = chosen & (self.total > 0)
        groups = counted.sum(axis=1)
        correct, total = (np.where(counted, counts, 0) for counts in (self.correct, self.total))
        sums = zip(groups.tolist(), correct.sum(axis=1).tolist(), total.sum(axis=1).tolist(), strict=True)
        even = groups * total.max(axis=1, initial=0) == total.sum(axis=1)
        accuracies: list[float | None] = []
        for client, (n, right, of) in enumerate(sums):
            if n == 0:
                accuracies.append(None)
            elif even[client]:  # equal weights of groups are then equal weights of records
                accuracies.append(right / of)
            else:  # fsum rounds once, so the order of the groups does not matter
                own = counted[client]
                accuracies.append(math.fsum((self.correct[client, own] / self.total[own]).tolist()) / n)
        return accuracies

    def by_group(self) -> np.ndarray:
        """Return each client's accuracy of each group that it holds, (client, group); NaN for all other groups."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.held & (self.total > 0), self.correct / self.total, np.nan)


def count_logits(logits: Tensor, labels: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Count the correct records and all records of each group, both (group,) int64 on the CPU.

    The counts do not depend on the client, so clients with the same prompt share one count. The answer of a record is
    the largest logit of all classes. A record with a logit that is not finite counts as wrong: the argmax of NaN is
    class 0, which would count as correct by accident.

    Args:
        logits: Logits (record, n_cls).
        labels: Class of each record, (record,).
        groups: Group of each record, (record,).
        n_groups: Number of groups.
    """
    right = (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)
    return torch.bincount(groups[right], minlength=n_groups).cpu(), torch.bincount(groups, minlength=n_groups).cpu()


def counts_at_home(
    logits: Tensor, labels: Tensor, groups: Tensor, held: Tensor, use: Use, log_prior: Tensor | None = None
) -> Tensor:
    """Count the correct records of each client by one prompt, or by a model that is not tuned.

    At home, on the groups that a client holds, a public list or prior is used. Abroad it says nothing, so the answers
    are among all classes and without a prior. No use of a public constant costs ε.

    With ``class-list`` the answers at home are restricted to the list. No correct answer is lost, because the label is
    in the list and the largest logit of all classes is also the largest of the list. `class-list` is therefore never
    below ``plain``. With ``class-prior`` an answer at home is argmax(logits + log π): for a prompt that was trained by
    balanced softmax, this is the use for which it was trained.

    Args:
        logits: Logits (record, n_cls); a record with a logit that is not finite counts as wrong.
        labels: Class of each record, (record,).
        groups: Group of each record, (record,); group modulo n_cls is the class.
        held: True where a client holds a group, (client, group) bool.
        use: Use of the list or of the prior.
        log_prior: Log prior of each client for ``class-prior``, (client, n_cls), in units of the logits; finite, and up
            to a constant of the client.

    Returns:
        Counts (client, group) int64 on the CPU.
    """
    n_groups, n_cls = held.shape[1], logits.shape[1]
    abroad, _ = count_logits(logits, labels, groups, n_groups)
    if use == "plain":
        return abroad.expand(len(held), -1)
    kinds = held
    if use == "class-prior":
        assert log_prior is not None
        kinds = torch.cat([log_prior.cpu(), held.to(log_prior.dtype)], dim=1)
    kinds, kind_of = torch.unique(kinds, dim=0, return_inverse=True)  # clients of one kind share one count
    rows = []
    for kind in kinds.to(logits.device):
        row = kind[-n_groups:].bool()
        inside = row[groups]
        own = logits[inside]
        if use == "class-list":
            answers = own.masked_fill(~row.unflatten(0, (-1, n_cls)).any(dim=0), -torch.inf)
        else:
            answers = own + kind[:n_cls]
        right = (answers.argmax(dim=1) == labels[inside]) & torch.isfinite(own).all(dim=1)
        rows.append(torch.bincount(groups[inside][right], minlength=n_groups).cpu())
    return torch.where(held, torch.stack(rows)[kind_of], abroad)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Mean accuracy over clients; None where no client has such records, or where there is no such accuracy.

    Attributes:
        local: On the own groups of each client.
        neighbour: On all other groups.
        by_group: Mean of each group over the clients that hold it. Empty if groups are not reported, or if clients have
            different numbers of groups.
        general: Of the shared prompt without any personal part, on the own groups of each client.
        new_client: Of the shared prompt, on the own groups of the clients that took part in no round.
    """

    local: float | None
    neighbour: float | None
    by_group: Sequence[float | None] = ()
    general: float | None = None
    new_client: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClientScores:
    """Accuracy of each client, in the order of clients; None for a client without such records or without an answer."""

    local: tuple[float | None, ...]
    neighbour: tuple[float | None, ...]
    new_client: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Accuracies of one prompt per client: the means, and those of each client."""

    accuracy: Accuracy
    clients: ClientScores


def summarise(
    answers: Sequence[tuple[Sequence[int], ScoreTable]],
    population: int,
    new_clients: int = 0,
    *,
    by_group: bool = False,
) -> Scored | None:
    """Average the accuracies of the clients with equal weights, as DP-FPL's tables do (arXiv:2501.13904).

    Args:
        answers: Numbers of clients with their tables, in any order. Tables may have different groups.
        population: Number of clients that train. Clients with higher numbers are new.
        new_clients: Number of new clients.
        by_group: True to report the mean of each group.

    Returns:
        None if no client answered.
    """
    local: dict[int, float | None] = {}
    neighbour: dict[int, float | None] = {}
    rows: dict[int, np.ndarray] = {}
    for partitions, table in answers:
        local |= zip(partitions, table.local(), strict=True)
        neighbour |= zip(partitions, table.neighbour(), strict=True)
        rows |= zip(partitions, table.by_group(), strict=True) if by_group else ()
    members = sorted(p for p in local if p < population)
    if not local:
        return None
    everyone, new = range(population), range(population, population + new_clients)
    clients = ClientScores(
        local=tuple(local.get(p) for p in everyone),
        neighbour=tuple(neighbour.get(p) for p in everyone),
        new_client=tuple(local.get(p) for p in new),
    )
    accuracy = Accuracy(
        local=mean(clients.local),
        neighbour=mean(clients.neighbour),
        by_group=_group_means([rows[p] for p in members]) if by_group else (),
        new_client=mean(clients.new_client),
    )
    return Scored(accuracy=accuracy, clients=clients)


def _group_means(rows: Sequence[np.ndarray]) -> tuple[float | None, ...]:
    if len({len(row) for row in rows}) != 1:
        return ()
    return tuple(mean([None if math.isnan(x) else x for x in column]) for column in np.stack(rows).T.tolist())


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that exist; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def harmonic_mean(local: float | None, neighbour: float | None) -> float | None:
    """Return the harmonic mean of two accuracies in [0, 1]: 0 if one is 0, None if one is None."""
    if local is None or neighbour is None:
        return None
    return 2 * local * neighbour / (local + neighbour) if local + neighbour > 0 else 0.0


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return minimum, quartiles and maximum of the values that exist; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    names = ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")
    return dict(zip(names, np.quantile(known, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True))

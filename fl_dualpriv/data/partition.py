"""Divide records among clients. This needs only labels and a seed, so all processes and nodes get the same division."""

import zlib
from typing import Literal

import numpy as np

from fl_dualpriv.errors import ConfigError

_MAX_DRAWS = 200
_FEW_DRAWS = 5
_HOPELESS = 50  # if even the best of a few draws leaves more clients empty than this, further draws do not help


def partition(
    labels: np.ndarray,
    scheme: Literal["iid", "by-class", "dirichlet", "by-node"],
    population: int,
    dirichlet_alpha: float,
    seed: int,
) -> list[np.ndarray]:
    """Give every record to exactly one client; ``by-node`` gives all records of this disk to this disk's client.

    Guarantee:
        The parts are disjoint, cover all records, and none is empty. They depend only on the arguments. ``by-node``
        gives each client all records, so a process may act only for one client: `client.node.Node` refuses more.

    Args:
        labels: Class id of each record, shape (records,).
        scheme: ``iid``: shuffled, sizes differ by at most 1. ``by-class``: contiguous blocks of class ids. With more
            clients than classes, several clients share one class, and its records are divided among them.
            ``dirichlet``: each class divided by shares drawn from Dir(alpha), as in Hsu et al. 2019, arXiv:1909.06335.
            ``by-node``: each client has a separate disk, and the records are those of one such disk.
        population: Number of clients; at most the number of records.
        dirichlet_alpha: Concentration > 0, read only by ``dirichlet``; small values give uneven parts.
        seed: Seed >= 0.

    Returns:
        One sorted int64 array of record indices per client, in client order.

    Raises:
        ConfigError: If an argument is out of range, or no Dirichlet draw gave every client a record.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ConfigError(f"labels have shape {labels.shape}; give one class id per record")
    if population < 1:
        raise ConfigError(f"population = {population}: must be >= 1")
    if scheme == "by-node":
        if len(labels) == 0:
            raise ConfigError("there is no training image on this node; a node needs at least one")
        return [np.arange(len(labels), dtype=np.int64)] * population
    if population > len(labels):
        raise ConfigError(
            f"population = {population}: there are only {len(labels)} training images, and every client needs one; "
            "lower population or add images"
        )
    rng = np.random.default_rng([seed, zlib.crc32(scheme.encode())])
    match scheme:
        case "iid":
            parts = np.array_split(rng.permutation(len(labels)), population)
        case "by-class":
            parts = _by_class(labels, population, rng)
        case "dirichlet":
            parts = _dirichlet(labels, population, dirichlet_alpha, rng)
        case _:
            raise ConfigError(f"data.partition = {scheme!r}: must be one of iid, by-class, dirichlet, by-node")
    return [np.sort(part).astype(np.int64) for part in parts]


def held_classes(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the sorted class ids that a client with these record ``indices`` holds."""
    return np.unique(np.asarray(labels)[indices])


def _by_class(labels: np.ndarray, population: int, rng: np.random.Generator) -> list[np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    if population <= len(classes):
        return [np.flatnonzero(np.isin(labels, block)) for block in np.array_split(classes, population)]
    parts: list[np.ndarray] = []
    for class_id, clients in zip(classes, _clients_per_class(counts, population), strict=True):
        parts += np.array_split(rng.permutation(np.flatnonzero(labels == class_id)), clients)
    return parts


def _clients_per_class(counts: np.ndarray, population: int) -> np.ndarray:
    """Spread clients over classes as evenly as the number of records in each class allows."""
    clients = np.ones_like(counts)
    for _ in range(population - len(counts)):
        # A class without a spare record gets no further client. One with room exists because population <= records.
        clients[np.argmin(np.where(clients < counts, clients, population + 1))] += 1
    return clients


def _dirichlet(labels: np.ndarray, population: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"data.dirichlet-alpha = {alpha}: must be > 0 and finite")
    classes, counts = np.unique(labels, return_counts=True)
    groups = [np.flatnonzero(labels == class_id) for class_id in classes]
    clients = np.arange(population)
    fewest, draws = population, 0
    while draws < _MAX_DRAWS and not (draws >= _FEW_DRAWS and fewest > _HOPELESS):
        draws += 1
        shares = rng.dirichlet(np.full(population, alpha), size=len(classes))
        if not np.isfinite(shares).all():  # gamma variates over- or underflow at extreme alpha
            continue
        # Permuted even if the draw is rejected, because the next draw continues the same stream.
        records = np.concatenate([rng.permutation(group) for group in groups])
        cuts = (np.cumsum(shares, axis=1)[:, :-1] * counts[:, None]).astype(np.int64)
        sizes = np.diff(cuts, axis=1, prepend=0, append=counts[:, None])
        per_client = sizes.sum(axis=0)
        fewest = min(fewest, int((per_client == 0).sum()))
        if fewest == 0:
            owners = np.concatenate([np.repeat(clients, row) for row in sizes])
            return np.split(records[np.argsort(owners, kind="stable")], np.cumsum(per_client)[:-1])
    raise ConfigError(
        f"data.dirichlet-alpha = {alpha}: in {draws} draws at least {fewest} of the {population} clients got none of "
        f"the {len(labels)} images; raise data.dirichlet-alpha, lower population or use another data.partition"
    )

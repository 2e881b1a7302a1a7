"""Divide records among clients. This needs only labels, domains and a seed, so all nodes get the same division."""

import zlib
from typing import Literal

import numpy as np

from fl_dualpriv.config.schema import DataConfig
from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.data.partitioners import parts_of
from fl_dualpriv.data.questions import QuestionSet
from fl_dualpriv.errors import ConfigError

_MAX_DRAWS = 200
_FEW_DRAWS = 5
_HOPELESS = 50  # if even the best of a few draws leaves more clients empty than this, further draws do not help


Scheme = Literal["iid", "by-class", "by-domain", "dirichlet", "by-node"]


def divide(
    train: ImageDataset | QuestionSet, data: DataConfig, population: int, seed: int, new_clients: int
) -> list[np.ndarray]:
    """Divide the training records of a run among its clients; see `partition`.

    ``by-image`` gives all questions about one image to one client. The configuration allows it only for questions.
    """
    labels = train.labels
    if data.partition == "by-image" and isinstance(train, QuestionSet):
        labels = train.image_of
    if data.partition == "flwr-datasets":
        return parts_of(data.partitioner, labels, population + new_clients, seed)
    if data.partition == "by-client":
        clients, names = (None, ()) if isinstance(train, QuestionSet) else (train.clients, train.client_names)
        return _by_client(clients, names, population, new_clients)
    scheme = "by-class" if data.partition == "by-image" else data.partition
    return partition(
        *(labels, scheme, population, data.dirichlet_alpha, seed, train.domains, train.domain_names), new_clients
    )


def partition(
    labels: np.ndarray,
    scheme: Scheme,
    population: int,
    dirichlet_alpha: float,
    seed: int,
    domains: np.ndarray | None = None,
    domain_names: tuple[str, ...] = (),
    new_clients: int = 0,
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
            ``by-domain``: client i belongs to domain i modulo the number of domains. The records of a domain are
            shuffled within each class and dealt in turn to its clients, class after class, so that the clients of a
            domain have equally many records and of each class, up to one.
            ``by-node``: each client has a separate disk, and the records are those of one such disk.
        population: Number of clients; at most the number of records.
        dirichlet_alpha: Concentration > 0, read only by ``dirichlet``; small values give uneven parts.
        seed: Seed >= 0.
        domains: Domain id of each record, shape (records,), read only by ``by-domain``; None without domains.
        domain_names: Names of the domains, read only by ``by-domain``.
        new_clients: Number of further clients, which come last and take part in no round.

    Returns:
        One sorted int64 array of record indices per client, in client order: the population, then the new clients.

    Raises:
        ConfigError: If an argument is out of range, or no Dirichlet draw gave every client a record, or the domains do
            not fit the population. The message has every problem of the domains, one a line.
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
    total = population + new_clients
    if total > len(labels):
        more = f" with evaluation.new-clients = {new_clients}" if new_clients else ""
        raise ConfigError(
            f"population = {population}{more}: there are only {len(labels)} training images, and every client needs "
            "one; lower population or add images"
        )
    rng = np.random.default_rng([seed, zlib.crc32(scheme.encode())])
    match scheme:
        case "iid":
            parts = np.array_split(rng.permutation(len(labels)), total)
        case "by-class":
            parts = _by_class(labels, total, rng)
        case "by-domain":
            parts = _by_domain(labels, domains, domain_names, population, new_clients, rng)
        case "dirichlet":
            parts = _dirichlet(labels, total, dirichlet_alpha, rng)
        case _:
            raise ConfigError(
                f"data.partition = {scheme!r}: must be one of iid, by-class, by-domain, dirichlet, by-node"
            )
    return [np.sort(part).astype(np.int64) for part in parts]


def held_classes(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the sorted class ids that a client with these record ``indices`` holds."""
    return np.unique(np.asarray(labels)[indices])


def domain_of(client: int, n_domains: int) -> int:
    """Return the domain of a client: the domains take turns.

    The last clients, which may be held out (``evaluation.new-clients``), therefore lie in different domains.
    """
    return client % n_domains


def _by_domain(
    labels: np.ndarray,
    domains: np.ndarray | None,
    names: tuple[str, ...],
    population: int,
    new_clients: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    if domains is None or not names:
        raise ConfigError(
            'data.partition = "by-domain": these data have no domains; give a folder with domain/class/ folders, '
            "question files with a column domain, or choose another data.partition"
        )
    members: list[list[int]] = [[] for _ in names]
    for client in range(population + new_clients):
        members[domain_of(client, len(names))].append(client)
    counts = np.bincount(domains, minlength=len(names)).tolist()
    problems = []
    if population < len(names):
        problems.append(
            f"population = {population}: there are {len(names)} domains, and every domain needs a client; raise "
            "population or remove domains"
        )
    for name, count, clients in zip(names, counts, members, strict=True):
        if count == 0:
            problems.append(f"domain {name!r} has no training record; add some or remove the domain")
        elif count < len(clients):
            problems.append(
                f"domain {name!r} has {count} training records for {len(clients)} clients, and every client needs one; "
                "add records or have fewer clients"
            )
    if problems:
        raise ConfigError("\n  ".join(problems))
    parts: list[np.ndarray] = []
    for domain, clients in enumerate(members):
        own = np.flatnonzero(domains == domain)
        # Class after class, so that the turn goes on where the last class ended and totals stay even.
        records = np.concatenate([rng.permutation(own[labels[own] == label]) for label in np.unique(labels[own])])
        parts += [records[place :: len(clients)] for place in range(len(clients))]
    order = [client for clients in members for client in clients]
    return [parts[place] for place in np.argsort(order).tolist()]


def _by_client(
    clients: np.ndarray | None, names: tuple[str, ...], population: int, new_clients: int
) -> list[np.ndarray]:
    """Give each client the records that name it; clients in the order of their names.

    Raises:
        ConfigError: If the records name no client, or another number of clients than the run has.
    """
    if clients is None:
        raise ConfigError(
            'data.partition = "by-client": these data name no clients; give a list or a data set of images with a '
            "column client, or choose another data.partition"
        )
    if len(names) != population + new_clients:
        raise ConfigError(
            f"population = {population} with evaluation.new-clients = {new_clients}: the records name {len(names)} "
            f"clients; set population = {max(1, len(names) - new_clients)}"
        )
    parts = [np.flatnonzero(clients == client) for client in range(len(names))]
    if empty := [name for name, part in zip(names, parts, strict=True) if not len(part)]:
        raise ConfigError(
            f"{len(empty)} clients have no training record, only held-out ones: {', '.join(empty[:5])}; add some, or "
            "remove their records"
        )
    return parts


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

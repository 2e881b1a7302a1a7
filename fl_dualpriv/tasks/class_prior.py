"""Class priors: public shares of each client's classes, so that no prompt has to learn which classes a client holds.

The loss of client i is balanced softmax, the cross-entropy of logits + log π_i (Ren et al. 2020, arXiv:2007.10740; the
logit-adjusted loss of Menon et al. 2021, arXiv:2007.07314, with τ = 1; per client in FedLC, Zhang et al. 2022,
arXiv:2209.00189). A client adds the same log π_i to its answers at home. No torch, because the survey of a run reads
this module.
"""

import difflib
import functools
import hashlib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.errors import ConfigError

_TABLE = re.compile(r"client-(0|[1-9][0-9]*)")
_SMALLEST_SHARE, _SUM_TOLERANCE = 1e-12, 1e-6
_MOST_NAMED = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassPriors:
    """The class priors of all clients of a run.

    Guarantee:
        With ``list`` and ``declared`` a prior is a function of public numbers: the class list that a client declares,
        or the shares that its owner declares. It enters the loss as a constant, so the gradient of a record stays a
        function of that record, and the clip norm bounds it as before. A record that is removed, or cannot be read,
        leaves the prior as it is, because no count enters. One case rests on the assumption that class lists are
        public: ``list`` takes a client's list from the labels of its data set, so a data set without the last record of
        a class has a shorter list. An owner who wants a list that no record changes declares shares.
        ``exact`` is a function of all records, and the configuration refuses it under differential privacy.

    Attributes:
        shares: Client → its shares (n_cls,), float64, at least one above 0; None if they are not declared. A histogram
            that a client releases with noise would be one more such function.
        outside: Share of all classes together that a client's shares leave out, see `log_prior`.
        identity: Hash of declared shares by its name in messages, so that a resumed run notices other shares.
    """

    shares: Callable[[int], np.ndarray | None]
    outside: float
    identity: Mapping[str, str]

    def of(self, partition: int) -> np.ndarray | None:
        """Return a client's log prior, see `log_prior`.

        Raises:
            ConfigError: If the client's shares are not declared.
        """
        shares = self.shares(partition)
        if shares is None:
            raise ConfigError(_missing([partition]))
        return log_prior(shares, self.outside)

    def check(self, partitions: Iterable[int]) -> None:
        """Refuse clients whose shares are not declared.

        Raises:
            ConfigError: With their numbers.
        """
        if missing := [partition for partition in partitions if self.shares(partition) is None]:
            raise ConfigError(_missing(missing))


def log_prior(shares: np.ndarray, outside: float) -> np.ndarray | None:
    """Compute log π from a client's shares.

    Classes with share 0 divide ``outside`` evenly among them, and the other classes divide the rest in proportion to
    their shares. Without a class of share 0, π is the shares. Every entry is therefore finite, and a record of a class
    that its owner left out has a finite loss.

    Args:
        shares: Shares or counts, (n_cls,), at least 0, and at least one above 0.
        outside: Between 0 and 1, both excluded.

    Returns:
        log π, (n_cls,) float32; None if π is uniform, which adds the same number to all logits.
    """
    named = shares > 0
    prior = shares / shares.sum()
    if not named.all():
        prior = np.where(named, (1 - outside) * prior, outside / (~named).sum())
    return None if prior.max() == prior.min() else np.log(prior).astype(np.float32)


def class_priors(
    config: RunConfig, labels: np.ndarray, partitions: Sequence[np.ndarray], class_names: Sequence[str]
) -> ClassPriors | None:
    """Build the class priors that a run configures; None without one.

    Args:
        config: Configuration of the run.
        labels: Class of each training record, (record,).
        partitions: Record indices of each client.
        class_names: Names of the classes, in label order.

    Raises:
        ConfigError: If the file of declared shares cannot be used. The message lists all problems.
    """
    kind, outside = config.train.class_prior, config.train.class_prior_outside
    if kind == "none":
        return None
    if kind == "declared":
        declared, problems = declared_shares(config, class_names)
        if problems:
            raise ConfigError("\n  ".join([f"{config.data.class_shares} cannot be used:", *problems]))
        return ClassPriors(shares=declared.get, outside=outside, identity=_identity(declared))
    counted = held_shares if kind == "list" else record_counts
    shares = functools.partial(counted, labels, partitions, len(class_names))
    return ClassPriors(shares=shares, outside=outside, identity={})


def held_shares(labels: np.ndarray, partitions: Sequence[np.ndarray], n_cls: int, partition: int) -> np.ndarray:
    """Return equal shares of the classes on a client's list, (n_cls,); a function of the list and of no count."""
    held = np.zeros(n_cls)
    held[labels[partitions[partition]]] = 1.0
    return held / held.sum()


def record_counts(labels: np.ndarray, partitions: Sequence[np.ndarray], n_cls: int, partition: int) -> np.ndarray:
    """Count a client's records of each class, (n_cls,). There is no privacy: see `ClassPriors`."""
    return np.bincount(labels[partitions[partition]], minlength=n_cls).astype(np.float64)


def declared_shares(config: RunConfig, class_names: Sequence[str]) -> tuple[dict[int, np.ndarray], list[str]]:
    """Read the owners' class shares from the TOML file ``data.class-shares``, one table for each client.

    For example: ::

        [client-0]
        cat = 0.7
        "fire truck" = 0.3

    A class that a table does not name has share 0. A run needs a table for every client, new ones included. With
    ``data.partition = "by-node"`` each node has its own file, which needs the table of only that node's client.

    Args:
        config: Configuration of the run.
        class_names: Names of the classes, in label order.

    Returns:
        Shares (n_cls,) by client, and all problems, one line each. With problems the shares are incomplete.
    """
    path = Path(config.data.class_shares).expanduser()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"data.class-shares: {path} cannot be read: {error.strerror or error}; give a TOML file"]
    except ValueError as error:
        return {}, [f"data.class-shares: {path} is not valid TOML: {error}; correct the file"]
    shares: dict[int, np.ndarray] = {}
    problems: list[str] = []
    everyone = range(config.population + config.evaluation.new_clients)
    for name, table in content.items():
        number = _TABLE.fullmatch(name)
        if number is None or int(number[1]) not in everyone:
            problems.append(
                f"data.class-shares: {name!r} is not a client; name the tables client-0 to client-{everyone[-1]}"
            )
        elif not isinstance(table, dict):
            problems.append(
                f"data.class-shares: {name} = {table!r} is not a table; write [{name}] and a line per class"
            )
        else:
            shares[int(number[1])] = _shares(name, table, class_names, problems)
    if config.data.partition != "by-node" and not problems:
        missing = [partition for partition in everyone if partition not in shares]
        problems += [_missing(missing)] if missing else []
    return shares, problems


def class_share_problems(config: RunConfig, class_names: Sequence[str]) -> list[str]:
    """Return the problems of the declared shares of a run, one line each; empty if there are none, or no shares."""
    return declared_shares(config, class_names)[1] if config.train.class_prior == "declared" else []


def _shares(name: str, table: Mapping[str, Any], class_names: Sequence[str], problems: list[str]) -> np.ndarray:
    """Return the shares of one table; each fault adds a line to ``problems``."""
    shares, before = np.zeros(len(class_names)), len(problems)
    places = {class_name: place for place, class_name in enumerate(class_names)}
    for class_name, value in table.items():
        if class_name not in places:
            near = difflib.get_close_matches(class_name, class_names, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"the classes are {_some(class_names)}"
            problems.append(f"data.class-shares: {name}: {class_name!r} is not a class; {advice}")
        elif type(value) not in (int, float) or not (value == 0 or _SMALLEST_SHARE <= value <= 1):
            problems.append(
                f"data.class-shares: {name}: {class_name} = {value!r}; a share must be 0 or a number from "
                f"{_SMALLEST_SHARE:g} to 1: correct it"
            )
        else:
            shares[places[class_name]] = value
    if len(problems) == before and abs((total := math.fsum(shares)) - 1) > _SUM_TOLERANCE:
        problems.append(
            f"data.class-shares: {name}: the shares add up to {total:.9g}; they must add up to 1 within "
            f"{_SUM_TOLERANCE:g}: correct them"
        )
    return shares


def _missing(partitions: Sequence[int]) -> str:
    return (
        f"data.class-shares has no table for {_some([f'client-{partition}' for partition in partitions])}; with "
        'train.class-prior = "declared" each client needs one: add them'
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _identity(declared: Mapping[int, np.ndarray]) -> dict[str, str]:
    digest = hashlib.sha256()
    for partition, shares in sorted(declared.items()):
        digest.update(partition.to_bytes(8, "big") + shares.tobytes())
    return {"the declared class shares": digest.hexdigest()}

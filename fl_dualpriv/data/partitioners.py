"""Division among clients by a class of flwr-datasets; only this file imports flwr_datasets."""

import ast
import inspect
from typing import Any

import numpy as np

from fl_dualpriv.data.hub import table_of
from fl_dualpriv.errors import ConfigError

_EXAMPLE = "PathologicalPartitioner(num_classes_per_partition=2)"


def parts_of(written: str, labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Divide records by a partitioner of flwr-datasets.

    The partitioner sees only class ids. The arguments ``num_partitions``, ``partition_by`` (the class) and ``seed`` are
    filled in, where the class has them and the text does not give them.

    Guarantee:
        The parts are disjoint and none is empty, or the function raises an error. Some partitioners leave records out.

    Args:
        written: Class of `flwr_datasets.partitioner` with keyword arguments, as in ``data.partitioner``.
        labels: Class id of each record, (records,).
        clients: Number of clients.
        seed: Seed of the division.

    Raises:
        ConfigError: If the text is no such class, or the division does not fit the records and clients.
    """
    name, arguments = _parsed(written)
    try:
        from flwr_datasets import partitioner as partitioners

        table = table_of({"label": labels.tolist(), "record": range(len(labels))})
    except ImportError as error:
        raise ConfigError(
            f"data.partitioner = {written!r} needs the package flwr-datasets; install fl-dualpriv[datasets]"
        ) from error
    kind: Any = getattr(partitioners, name, None)
    if name not in partitioners.__all__ or name == "Partitioner":
        known = ", ".join(sorted(set(partitioners.__all__) - {"Partitioner"}))
        raise ConfigError(f"data.partitioner = {written!r}: flwr-datasets has no {name}; it has {known}")
    filled = {"num_partitions": clients, "partition_by": "label", "seed": seed, "shuffle": True}
    takes = inspect.signature(kind).parameters
    try:
        made = kind(**({key: value for key, value in filled.items() if key in takes} | arguments))
        made.dataset = table
        count = made.num_partitions
        parts = [np.array(sorted(made.load_partition(i)["record"]), dtype=np.int64) for i in range(count)]
    except Exception as error:  # the classes raise ValueError, TypeError, KeyError and others
        raise ConfigError(f"data.partitioner = {written!r}: {type(error).__name__}: {error}") from error
    if count != clients:
        raise ConfigError(f"data.partitioner = {written!r} makes {count} parts for {clients} clients; set population")
    if empty := sum(not len(part) for part in parts):
        raise ConfigError(f"data.partitioner = {written!r} leaves {empty} of {clients} clients without a record")
    if len(np.unique(np.concatenate(parts))) != sum(map(len, parts)):
        raise ConfigError(f"data.partitioner = {written!r} gives some records to several clients; choose another")
    return parts


def _parsed(written: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a class and its keyword arguments, which must be literals.

    Raises:
        ConfigError: If the text has another form.
    """
    try:
        tree = ast.parse(written.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError):
        pass
    raise ConfigError(
        f"data.partitioner = {written!r}: must be a class of flwr_datasets.partitioner with literal keyword arguments, "
        f"for example {_EXAMPLE}"
    )

"""Divisions by flwr-datasets and by a column of clients."""

import numpy as np
import pytest

from fl_dualpriv.data.partition import _by_client
from fl_dualpriv.data.partitioners import parts_of
from fl_dualpriv.errors import ConfigError

LABELS = np.repeat(np.arange(6), 20)


@pytest.mark.parametrize(
    "written",
    [
        "PathologicalPartitioner(num_classes_per_partition=2)",
        "ShardPartitioner(num_shards_per_partition=3)",
        "LinearPartitioner",
        "SquarePartitioner()",
        "DirichletPartitioner(alpha=0.5, min_partition_size=1)",
    ],
)
def test_every_record_is_in_at_most_one_part(written: str):
    parts = parts_of(written, LABELS, 6, 1)
    assert len(parts) == 6
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert len(together) == (108 if written.startswith("Shard") else 120), "shards leave records out"
    again = parts_of(written, LABELS, 6, 1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_pathological_clients_have_few_classes():
    parts = parts_of("PathologicalPartitioner(num_classes_per_partition=2)", LABELS, 6, 0)
    assert {len(np.unique(LABELS[part])) for part in parts} == {2}


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("Nonsense", "flwr-datasets has no Nonsense; it has .*PathologicalPartitioner"),
        ("Partitioner", "flwr-datasets has no Partitioner"),
        ("os.system('x')", "must be a class of flwr_datasets.partitioner with literal keyword arguments"),
        ("__import__", "flwr-datasets has no __import__"),
        ("PathologicalPartitioner(2)", "with literal keyword arguments, for example PathologicalPartitioner"),
        ("PathologicalPartitioner(num_classes_per_partition=open('x'))", "literal keyword arguments"),
        ("PathologicalPartitioner(num_classes_per_partition=99)", "PathologicalPartitioner.*: ValueError"),
        ("IidPartitioner(num_partitions=3)", "makes 3 parts for 6 clients; set population"),
        ("a b", "must be a class of flwr_datasets.partitioner"),
    ],
)
def test_a_wrong_partitioner_is_refused_in_words(written: str, says: str):
    with pytest.raises(ConfigError, match=says):
        parts_of(written, LABELS, 6, 0)


def test_clients_of_a_column():
    clients = np.array([2, 0, 1, 2, 0])
    parts = _by_client(clients, ("a", "b", "c"), 2, 1)
    assert [part.tolist() for part in parts] == [[1, 4], [2], [0, 3]]
    with pytest.raises(ConfigError, match="the records name 3 clients; set population = 3"):
        _by_client(clients, ("a", "b", "c"), 5, 0)
    with pytest.raises(ConfigError, match="1 clients have no training record, only held-out ones: d"):
        _by_client(clients, ("a", "b", "c", "d"), 4, 0)
    with pytest.raises(ConfigError, match="these data name no clients"):
        _by_client(None, (), 4, 0)

import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_dualpriv.data.partition import held_classes, partition
from fl_dualpriv.errors import ConfigError

ROOT = Path(__file__).parents[3]
SCHEMES = ("iid", "by-class", "dirichlet")


def assert_cover(parts: list[np.ndarray], count: int, population: int) -> None:
    assert len(parts) == population
    assert all(len(part) >= 1 for part in parts)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    scheme=st.sampled_from(["iid", "by-class"]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_record_has_one_client(labels, scheme, share, seed):
    population = 1 + int(share * (len(labels) - 1))
    parts = partition(np.array(labels), scheme, population, 0.3, seed)
    assert_cover(parts, len(labels), population)


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 6), min_size=40, max_size=80),
    population=st.integers(1, 6),
    alpha=st.floats(0.5, 1e6),
    seed=st.integers(0, 1000),
)
def test_dirichlet_covers(labels, population, alpha, seed):
    assert_cover(partition(np.array(labels), "dirichlet", population, alpha, seed), len(labels), population)


def test_iid_sizes_and_mixture():
    parts = partition(np.repeat([0, 1], 500), "iid", 3, 0.3, 0)
    assert [len(part) for part in parts] == [334, 333, 333]
    # Class 1 of 333 drawn without replacement from 500 of 1000: mean 166, sd about 7.5; 6 sd either way.
    assert all(120 < np.sum(part >= 500) < 212 for part in parts)


@pytest.mark.parametrize(
    ("n_cls", "population", "blocks"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (3, 3, [[0], [1], [2]]),
        (2, 5, [[0], [0], [0], [1], [1]]),
        (3, 4, [[0], [0], [1], [2]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_by_class_blocks(n_cls, population, blocks):
    labels = np.tile(np.arange(n_cls), 10)
    parts = partition(labels, "by-class", population, 0.3, 1)
    assert [held_classes(labels, part).tolist() for part in parts] == blocks
    assert_cover(parts, len(labels), population)


def test_by_class_shares_a_class_evenly():
    parts = partition(np.zeros(11, dtype=np.int64), "by-class", 4, 0.3, 0)
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    assert parts[0].tolist() != [0, 1, 2]  # shuffled: the order of records on disk often means something


def test_by_class_with_a_class_smaller_than_its_clients():
    # 6 clients on classes of 1, 2 and 20 records: an even 2, 2, 2 has no room in class 0, so class 2 takes its third.
    labels = np.repeat([0, 1, 2], [1, 2, 20])
    parts = partition(labels, "by-class", 6, 0.3, 0)
    assert [held_classes(labels, part).tolist() for part in parts] == [[0], [1], [1], [2], [2], [2]]


def test_by_class_takes_class_ids_with_gaps():
    labels = np.array([7, 7, 3, 3, 9])
    assert [part.tolist() for part in partition(labels, "by-class", 3, 0.3, 0)] == [[2, 3], [0, 1], [4]]


def test_one_client_per_record():
    labels = np.repeat([0, 1], [1, 9])
    for scheme in ("iid", "by-class"):
        assert_cover(partition(labels, scheme, 10, 0.3, 0), 10, 10)


def test_dirichlet_alpha_sets_the_skew():
    labels = np.repeat(np.arange(10), 200)

    def mean_top_share(alpha: float) -> float:
        parts = partition(labels, "dirichlet", 10, alpha, 0)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    # At alpha = 1000 every class is split nearly evenly, so the largest share of a client is near 1/10.
    assert mean_top_share(1000.0) < 0.13
    assert mean_top_share(0.1) > 0.35


def slow_dirichlet(labels: np.ndarray, population: int, alpha: float, seed: int) -> list[list[int]] | None:
    """Client by client, class by class, as Hsu et al. describe it."""
    rng = np.random.default_rng([seed, zlib.crc32(b"dirichlet")])
    classes = np.unique(labels)
    for _ in range(200):
        shares = rng.dirichlet(np.full(population, alpha), size=len(classes))
        parts: list[list[int]] = [[] for _ in range(population)]
        for class_id, share in zip(classes, shares, strict=True):
            records = rng.permutation(np.flatnonzero(labels == class_id))
            cuts = (np.cumsum(share)[:-1] * len(records)).astype(np.int64)
            for part, piece in zip(parts, np.split(records, cuts), strict=True):
                part += piece.tolist()
        if all(parts):
            return [sorted(part) for part in parts]
    return None


@pytest.mark.parametrize("alpha", [0.2, 1.0, 50.0])
def test_dirichlet_equals_the_slow_form(alpha):
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(0, 5, 120)
        expected = slow_dirichlet(labels, 9, alpha, seed)  # several of these need more than one draw
        assert [part.tolist() for part in partition(labels, "dirichlet", 9, alpha, seed)] == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ten_thousand_clients_take_less_than_a_second(scheme):
    labels = np.repeat(np.arange(100), 5000)
    start = time.process_time()
    parts = partition(labels, scheme, 10_000, 5.0, 0)
    assert time.process_time() - start < 1.0  # 0.2 s where this was written
    assert len(parts) == 10_000


def test_a_hopeless_dirichlet_is_given_up_early():
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"in 5 draws at least .* of the 10000 clients got none"):
        partition(np.repeat(np.arange(100), 200), "dirichlet", 10_000, 0.3, 0)
    assert time.process_time() - start < 5.0  # 200 draws would take a minute


@pytest.mark.parametrize("scheme", SCHEMES)
def test_seed_alone_decides(scheme):
    labels = np.repeat(np.arange(3), 30)
    first = partition(labels, scheme, 6, 1.0, 5)
    np.random.default_rng(0).random(7)
    again, other = partition(labels, scheme, 6, 1.0, 5), partition(labels, scheme, 6, 1.0, 6)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=True))


def test_same_in_another_process():
    code = (
        "import numpy as np; from fl_dualpriv.data.partition import partition;"
        "print([p.tolist() for p in partition(np.repeat(np.arange(3), 30), 'dirichlet', 6, 1.0, 5)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    expected = [part.tolist() for part in partition(np.repeat(np.arange(3), 30), "dirichlet", 6, 1.0, 5)]
    assert result.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    ("labels", "scheme", "population", "alpha", "reason"),
    [
        ([0, 1], "iid", 3, 0.3, "population = 3: there are only 2 training images"),
        ([], "by-class", 1, 0.3, "only 0 training images"),
        ([0, 1], "iid", 0, 0.3, "population = 0: must be >= 1"),
        ([[0, 1]], "iid", 1, 0.3, r"labels have shape \(1, 2\)"),
        ([0, 1], "random", 1, 0.3, "must be one of iid, by-class, by-domain, dirichlet"),
        ([0, 1], "dirichlet", 1, 0.0, "data.dirichlet-alpha = 0.0: must be > 0"),
        ([0, 1], "dirichlet", 1, float("nan"), "data.dirichlet-alpha = nan"),
        # 20 records of one class at alpha 0.001: one client takes nearly all of them in every draw.
        ([0] * 20, "dirichlet", 10, 0.001, "raise data.dirichlet-alpha, lower population"),
        ([0] * 20, "dirichlet", 10, 1e308, "raise data.dirichlet-alpha, lower population"),
    ],
    ids=["too many clients", "no images", "no clients", "shape", "scheme", "alpha", "nan", "starved", "overflow"],
)
def test_refusals(labels, scheme, population, alpha, reason):
    with pytest.raises(ConfigError, match=reason):
        partition(np.array(labels), scheme, population, alpha, 0)


# --- domains ----------------------------------------------------------------------------------------------------------

NAMES = ("hall", "lab", "roof")


@settings(deadline=None, max_examples=100)
@given(
    records=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=30, max_size=90),
    population=st.integers(3, 6),
    new=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_clients_of_a_domain_share_its_classes_evenly(records, population, new, seed):
    domains, labels = np.array([d for d, _ in records]), np.array([c for _, c in records])
    if min(np.bincount(domains, minlength=3)) < -(-(population + new) // 3):
        return
    parts = partition(labels, "by-domain", population, 0.3, seed, domains, NAMES, new)
    assert_cover(parts, len(labels), population + new)
    for domain in range(3):
        members = [part for client, part in enumerate(parts) if client % 3 == domain]
        assert {d for part in members for d in domains[part].tolist()} == {domain}
        for label in range(5):
            counts = [int((labels[part] == label).sum()) for part in members]
            assert max(counts) - min(counts) <= 1
        sizes = [len(part) for part in members]
        assert max(sizes) - min(sizes) <= 1


def test_every_client_holds_every_class_of_its_domain_and_the_seed_shuffles():
    labels, domains = np.tile(np.repeat(np.arange(5), 4), 2), np.repeat([0, 1], 20)
    one, two = (partition(labels, "by-domain", 6, 0.3, seed, domains, NAMES[:2]) for seed in (0, 1))
    assert all(held_classes(labels, part).tolist() == [0, 1, 2, 3, 4] for part in one)
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    again = partition(labels, "by-domain", 6, 0.3, 0, domains, NAMES[:2])
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))


def test_the_last_clients_lie_in_each_domain_in_turn():
    labels, domains = np.zeros(30, int), np.repeat([0, 1, 2], 10)
    parts = partition(labels, "by-domain", 3, 0.3, 0, domains, NAMES, 4)
    assert [int(domains[part[0]]) for part in parts] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("domains", "names", "population", "new", "reasons"),
    [
        (None, (), 2, 0, ["these data have no domains"]),
        ([0, 0, 1, 2], NAMES, 2, 0, ["population = 2: there are 3 domains"]),
        ([0, 0, 1, 2], NAMES, 2, 1, ["population = 2: there are 3 domains"]),  # a new client trains no domain
        ([0, 0, 0, 0], NAMES, 2, 0, ["there are 3 domains", "'lab' has no training", "'roof' has no training"]),
        ([0, 1, 1, 1], NAMES[:2], 2, 1, ["'hall' has 1 training records for 2 clients"]),
        ([0, 1, 1, 1], NAMES[:2], 4, 1, ["population = 4 with evaluation.new-clients = 1: there are only 4"]),
    ],
)
def test_domains_that_do_not_fit_are_refused_in_one_message(domains, names, population, new, reasons):
    column = None if domains is None else np.array(domains)
    with pytest.raises(ConfigError) as caught:
        partition(np.zeros(4, int), "by-domain", population, 0.3, 0, column, names, new)
    assert all(reason in str(caught.value) for reason in reasons)

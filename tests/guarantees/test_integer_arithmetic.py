"""Integer arithmetic: every bound exactly, every sum in any order, and outputs that tell nothing by their low bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from torch import Tensor

from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.learners.rows import Batches
from fl_dualpriv.privacy.clipping import (
    GRID_STEPS,
    MOST_ROWS,
    ClippedSum,
    as_clipped_sum,
    check_exact,
    client_sum,
    clip_rows,
    clipped_sum,
    cut_rows,
    integer_rows,
    trusting_sum,
)
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.release import release
from fl_dualpriv.privacy.step import clipped_sums
from fl_dualpriv.towers.plain import FunctionTower
from tests.guarantees.objective_checks import batch_rows, clipped_feature_sum

SPECIAL = [0.0, -0.0, 1e-45, 1e-38, 1.0, -3.5, 1e19, 3e38, float("inf"), float("-inf"), float("nan")]
NORMS = [1e-30, 1e-3, 0.1, 1.0, 3.7, 1e6, 1e30]

cells = st.one_of(
    st.sampled_from(SPECIAL), st.floats(-1e3, 1e3, width=32), st.floats(allow_nan=False, allow_infinity=False)
)
tables = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=5)
)


def keyed(purpose: str, seed: int = 0) -> KeyedRandom:
    return KeyedRandom(StreamKey(seed=seed, purpose=purpose))


def squared_norm(row: Tensor) -> int:
    """In 64-bit integers; fails where an entry is none, or so large that these could overflow."""
    assert torch.equal(row, row.round())
    assert row.numel() == 0 or row.abs().max() < 2**23
    return int(row.to(torch.int64).square().sum())


# --- rows -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(table=tables, clip_norm=st.sampled_from(NORMS))
def test_a_row_never_exceeds_the_bound_not_even_by_rounding(table: list[list[float]], clip_norm: float) -> None:
    rows = torch.tensor(table, dtype=torch.float64)
    cut = integer_rows(rows, clip_norm)
    assert all(squared_norm(row) <= GRID_STEPS**2 for row in cut)


@settings(max_examples=150, deadline=None)
@given(table=tables, clip_norm=st.sampled_from([1e-3, 0.1, 1.0, 3.7, 1e6]))
def test_a_row_loses_less_than_one_unit_an_entry_and_only_towards_zero(
    table: list[list[float]], clip_norm: float
) -> None:
    rows = torch.tensor(table, dtype=torch.float64)
    exact = clip_rows(rows, clip_norm)[0] / clip_norm * GRID_STEPS
    cut = integer_rows(rows, clip_norm)
    assert (exact - cut).abs().max() < 1
    assert (cut.abs() <= exact.abs()).all()
    assert (cut * exact >= 0).all()


@pytest.mark.parametrize("clip_norm", [0.1, 0.3, 1.0, 1e-7, 123.456])
@pytest.mark.parametrize("width", [1, 4, 64, 2048, 50_000])
def test_rows_that_end_on_the_sphere_stay_inside(width: int, clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(width)
    flat = torch.ones(3, width)
    one_hot = torch.zeros(3, width)
    one_hot[:, 0] = torch.tensor([1.0, 7.3e8, 1e-3])
    random = torch.randn(20, width, generator=generator)
    for rows in (flat, one_hot, random):
        # Longer than the bound, and as long as the bound up to rounding.
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        for scaled in (rows * 1e3, unit * clip_norm, unit * clip_norm * (1 + 1e-15)):
            assert all(squared_norm(row) <= GRID_STEPS**2 for row in integer_rows(scaled, clip_norm))
    # What fits exactly is kept exactly: four entries of C/2 are 4 · 2**38 = 2**40.
    if width == 4:
        assert integer_rows(torch.full((1, 4), 0.5), 1.0).tolist() == [[2.0**19] * 4]


def test_a_row_over_the_bound_by_rounding_is_shrunk_and_a_hopeless_one_is_zero() -> None:
    over = torch.tensor([[2.0**20, 1.0], [2.0**20, 0.0], [2.0**22, 0.0], [1e200, 3.0]], dtype=torch.float64)
    cut = cut_rows(over)
    assert cut[1].tolist() == [2.0**20, 0.0]  # on the bound
    assert cut[0].tolist() == [2.0**20 - 1, 0.0]  # 2**40 + 1 is over
    assert not cut[2:].any()
    # Broken on purpose: without the check the first row is over.
    assert squared_norm(torch.trunc(over[0])) > GRID_STEPS**2


# --- sums -------------------------------------------------------------------------------------------------------------


def test_sums_are_the_same_in_any_order_bit_by_bit() -> None:
    rows = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    orders = [torch.randperm(300, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    whole = clipped_sum(rows, 1.0, "integer")
    assert whole.sensitivity == 2**20
    assert whole.grid == 2.0**-20
    for order in orders:
        assert torch.equal(clipped_sum(rows[order], 1.0, "integer").value, whole.value)
        halves = [clipped_sum(part, 1.0, "integer").value for part in (rows[order[:117]], rows[order[117:]])]
        assert torch.equal(halves[0] + halves[1], whole.value)
    # In floats the order shows.
    floats = clipped_sum(rows, 1.0).value
    assert any(not torch.equal(clipped_sum(rows[order], 1.0).value, floats) for order in orders)


def towers_and_batches(keep: list[int]) -> tuple[FunctionTower, Tensor, Batches]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5 * 8, 4 * 6, generator=generator)
    x = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=1)
    x[4] = math.nan
    y = torch.randint(0, 5, (20,), generator=generator)
    prompts = torch.randn(1, 4, 6, generator=generator)

    def class_features(prompt: Tensor) -> Tensor:
        return torch.nn.functional.normalize((weight @ prompt.flatten()).reshape(5, 8), dim=1)

    return FunctionTower(class_features), prompts, Batches.of((x[keep], y[keep]))


@pytest.mark.parametrize("top_m", [0, 2])
def test_removing_a_record_removes_its_integer_row_exactly(top_m: int) -> None:
    def summed(keep: list[int]) -> Tensor:
        tower, prompts, batches = towers_and_batches(keep)
        (found,) = clipped_sums(
            batch_rows(tower(prompts), batches, 30.0, workspace_bytes=2**20, top_m=top_m), 0.3, "integer"
        )
        assert found.grid == 0.3 / 2**20
        return found.value

    everybody = list(range(20))
    whole = summed(everybody)
    for gone in (0, 4, 7, 13, 19):
        moved = whole - summed([i for i in everybody if i != gone])
        assert squared_norm(moved.flatten()) <= GRID_STEPS**2
        assert torch.equal(moved, summed([gone]))  # the others are not touched, bit by bit
        assert bool(moved.any()) == (gone != 4)  # a bad record is a zero
    assert torch.equal(whole, torch.stack([summed([i]) for i in everybody]).sum(0))


CLASSES = torch.nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)


def feature_sum(x: Tensor, y: Tensor, clip_norm: float) -> Tensor:
    return clipped_feature_sum(CLASSES, x, y, 30.0, clip_norm, "integer").value


@pytest.mark.parametrize("clip_norm", [0.1, 3.0, 100.0])
def test_feature_sums_are_sums_of_each_examples_integers(monkeypatch: pytest.MonkeyPatch, clip_norm: float) -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    x[2, 3] = math.inf
    y = torch.arange(9) % 4
    one_by_one = torch.stack([feature_sum(x[i : i + 1], y[i : i + 1], clip_norm) for i in range(9)])
    whole = feature_sum(x, y, clip_norm)
    assert torch.equal(whole, one_by_one.sum(0))
    assert all(squared_norm(row.flatten()) <= GRID_STEPS**2 for row in one_by_one)
    assert not one_by_one[2].any()
    # How many are formed at a time changes nothing.
    monkeypatch.setattr(per_example, "_OUTER_ENTRIES", 50)
    assert torch.equal(feature_sum(x, y, clip_norm), whole)
    # The float form of the same sum, to within one unit a record and entry.
    floats = clipped_feature_sum(CLASSES, x, y, 30.0, clip_norm).value / clip_norm * GRID_STEPS
    assert (floats - whole).abs().max() <= 9
    assert feature_sum(x[:0], y[:0], clip_norm).tolist() == [[0.0] * 6] * 4


updates = st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(table=updates, weights=st.lists(st.floats(0, 1), min_size=5, max_size=5), clip_norm=st.sampled_from(NORMS))
def test_a_client_moves_the_cohorts_sum_by_an_integer_row_in_bound(
    table: list[list[float]], weights: list[float], clip_norm: float
) -> None:
    rows, shares = torch.tensor(table, dtype=torch.float64), torch.tensor(weights[: len(table)])
    whole = client_sum(rows, shares, clip_norm)
    assert whole.sensitivity == GRID_STEPS
    for i in range(len(table)):
        keep = [j for j in range(len(table)) if j != i]
        moved = whole.value - client_sum(rows[keep], shares[keep], clip_norm).value
        assert squared_norm(moved) <= GRID_STEPS**2


def test_weights_come_before_the_cut() -> None:
    rows, thirds = torch.tensor([[3.0, 4.0], [0.3, 0.0]]), torch.tensor([1 / 3, 1 / 3], dtype=torch.float64)
    # (0.6, 0.8) / 3 and (0.3, 0) / 3 in units of 2**-20, cut down: 209715.2 and 104857.6; 279620.3
    assert client_sum(rows, thirds, 1.0).value.tolist() == [209715.0 + 104857.0, 279620.0]


def test_honest_integer_uploads_go_in_untouched_and_others_are_cut_down() -> None:
    generator = torch.Generator().manual_seed(5)
    honest = clipped_sum(torch.randn(7, 6, generator=generator), 0.5, "integer").value
    # As long as seven records can be, all alike.
    longest = torch.tensor([7.0 * 2**20, 0, 0, 0, 0, 0], dtype=torch.float64)
    counts = torch.tensor([7, 7])
    found = trusting_sum(torch.stack([honest, longest]), counts, 0.5)
    assert torch.equal(found.value, honest + longest)
    assert (found.sensitivity, found.grid) == (2**20, 0.5 / 2**20)
    broken = torch.stack([torch.full((6,), value, dtype=torch.float64) for value in (1e300, 0.7, 3e6 + 0.5)])
    for row in broken:
        alone = trusting_sum(row[None], counts[:1], 0.5).value
        assert squared_norm(alone) <= (7 * 2**20) ** 2 * (1 + 2**-18)
        # ... and it moves no one else's integers.
        assert torch.equal(trusting_sum(torch.stack([honest, row]), counts, 0.5).value - alone, honest)
    assert not trusting_sum(longest[None], torch.tensor([0]), 0.5).value.any()


def test_sums_too_long_to_be_exact_are_refused() -> None:
    check_exact(MOST_ROWS - 1)
    with pytest.raises(ValueError, match="2\\*\\*32"):
        check_exact(MOST_ROWS)
    # The most that can be added up, and the most noise, in one number: still exact.
    most = (MOST_ROWS - 1) * GRID_STEPS + 2**52
    assert int(float(most)) == most < 2**53


# --- what leaves ------------------------------------------------------------------------------------------------------


def on_grid(value: Tensor, grid: float) -> Tensor:
    """Whether an entry is the product of a whole number and the grid."""
    return (value / grid).round() * grid == value


@pytest.mark.parametrize("clip_norm", [0.5, 0.3])
def test_ours_never_leaves_the_grid_and_naive_float_noise_does(clip_norm: float) -> None:
    rows = torch.randn(30, 5000, generator=torch.Generator().manual_seed(2))
    whole = clipped_sum(rows, clip_norm, "integer")
    assert whole.grid is not None
    ours = release(whole, 1.1, keyed("grid"))
    assert bool(on_grid(ours, whole.grid).all())
    # The same scale, with float noise on the same integers, or on float sums.
    naive = release(ClippedSum(value=whole.value * whole.grid, sensitivity=clip_norm), 1.1, keyed("grid"))
    assert float(on_grid(naive, whole.grid).double().mean()) < 0.01
    floats = release(clipped_sum(rows, clip_norm), 1.1, keyed("grid"))
    assert float(on_grid(floats, whole.grid).double().mean()) < 0.01


def reachable(output: np.ndarray, guess: float, std: float) -> float:
    """Share of entries that float noise on ``guess`` can give at all: the attack of Mironov 2012 on our float sampler.

    The noise is one of 2**52 numbers; those whose uniforms are nearest are tried.
    """
    cell = np.floor(ndtr((output - guess) / std) * 2.0**52)
    hits = np.zeros(len(output), dtype=bool)
    for near in range(-8, 9):
        hits |= guess + ndtri((cell + near + 0.5) * 2.0**-52) * std == output
    return float(hits.mean())


def test_low_order_bits_give_float_noise_away_and_not_ours() -> None:
    """One record that is there or not: 4000 entries of a release, with noise that hides it by size."""
    std, size = 4.0, 1 / 3
    record = torch.full((4000,), size, dtype=torch.float64)
    nobody = torch.zeros(4000, dtype=torch.float64)
    for truth, other in ((size, 0.0), (0.0, size)):
        value = record if truth else nobody
        output = release(ClippedSum(value=value, sensitivity=1.0), std, keyed("attack", 1)).numpy()
        assert reachable(output, truth, std) == 1.0  # every entry fits the truth ...
        assert reachable(output, other, std) < 0.9  # ... and each that does not fit the other is proof
    # Ours: integers, which can all come from either.
    units = GRID_STEPS * size
    for value in (torch.full((4000,), float(int(units)), dtype=torch.float64), nobody):
        output = release(as_clipped_sum(value, 1.0, "integer"), std, keyed("attack", 2))
        assert torch.equal(output * GRID_STEPS, (output * GRID_STEPS).round())
    # Low bits are uniform whatever the sum is: a chi-square over the last four bits, 15 degrees, p > 1e-6.
    for value in (0.0, 1.0, 349525.0):
        clean = as_clipped_sum(torch.full((160_000,), value, dtype=torch.float64), 1.0, "integer")
        low = (release(clean, std, keyed("bits", 3)) * GRID_STEPS).remainder(16).numpy().astype(int)
        counts = np.bincount(low, minlength=16)
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 56


def test_a_release_is_the_sum_plus_the_rounded_noise_of_z_times_the_sensitivity() -> None:
    clean = as_clipped_sum(torch.arange(100_000, dtype=torch.float64), 0.25, "integer")
    noise = release(clean, 2.0, keyed("scale")) / 0.25 * GRID_STEPS - clean.value
    # 2 · 2**20 units; the standard error of the deviation is 1/sqrt(2n) = 0.22 %, 5 of them
    assert float(noise.std()) / (2 * GRID_STEPS) == pytest.approx(1, abs=0.011)
    assert torch.equal(release(clean, 0.0, keyed("scale")), clean.value * 0.25 / GRID_STEPS)

"""Adding or removing one unit moves a clipped sum by at most what the sum itself reports."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows, clipped_sum
from tests.guarantees.objective_checks import clipped_feature_sum

SPECIAL = [0.0, -0.0, 1e-45, 1e-38, 1.0, -3.5, 1e19, 3e38, float("inf"), float("-inf"), float("nan")]


def rows_of(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(len(values), -1)


cells = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e3, 1e3, width=32))
tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=6)
)


@settings(max_examples=300, deadline=None)
@given(table=tables, clip_norm=st.sampled_from([1e-3, 0.5, 1.0, 100.0]))
def test_removing_a_row_moves_the_sum_by_at_most_the_sensitivity(table: list[list[float]], clip_norm: float) -> None:
    rows = rows_of(table)
    whole = clipped_sum(rows, clip_norm)
    for i in range(len(table)):
        rest = clipped_sum(torch.cat([rows[:i], rows[i + 1 :]]), clip_norm)
        moved = float(torch.linalg.vector_norm(whole.value - rest.value))
        # rounding of a sum of at most six float64 rows of norm clip_norm
        assert moved <= whole.sensitivity * (1 + 1e-12)


@settings(max_examples=300, deadline=None)
@given(table=tables)
def test_rows_never_exceed_the_bound_and_small_rows_are_untouched(table: list[list[float]]) -> None:
    rows = rows_of(table)
    clipped, norms = clip_rows(rows, 1.0)
    assert torch.isfinite(clipped).all()
    assert (torch.linalg.vector_norm(clipped, dim=1) <= 1 + 1e-12).all()
    for i, row in enumerate(rows):
        if not torch.isfinite(row).all():
            assert not clipped[i].any()
        elif norms[i] <= 1:
            assert torch.equal(clipped[i], row.double())


def test_clipping_is_per_row_not_per_batch() -> None:
    # Two opposite rows of norm 10 and one of norm 1: a batch clip of the mean would keep 10s alive.
    rows = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(clipped_sum(rows, 1.0).value, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_a_row_is_scaled_to_the_bound_exactly() -> None:
    clipped, norms = clip_rows(torch.tensor([[3.0, 4.0]]), 1.0)  # norm 5 -> (0.6, 0.8)
    assert norms.tolist() == [5.0]
    assert torch.allclose(clipped, torch.tensor([[0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan], ids=str)
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clip_rows(torch.ones(1, 2), bound)


# --- noise space "feature" --------------------------------------------------------------------------------------------

CLASSES = torch.nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)


def feature_rows(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """The slow, obvious form: autograd of each example's loss with respect to the class features."""
    rows = []
    for one, label in zip(x, y, strict=True):
        leaf = CLASSES.clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(scale * one[None] @ leaf.T, label[None])
        rows.append(torch.autograd.grad(loss, leaf)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("clip_norm", [0.1, 3.0, 1e3])
def test_the_closed_form_equals_clipping_each_gradient(clip_norm: float) -> None:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(7) % 4
    expected = clipped_sum(feature_rows(x, y, 10.0), clip_norm).value
    found = clipped_feature_sum(CLASSES, x, y, 10.0, clip_norm)
    assert found.sensitivity == clip_norm
    # the rows by autograd are float32
    assert (found.value - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(max_examples=200, deadline=None)
@given(cells=st.lists(cells, min_size=18, max_size=18), clip_norm=st.sampled_from([1e-3, 0.5, 100.0]))
def test_one_record_moves_the_feature_sum_by_at_most_the_sensitivity(cells: list[float], clip_norm: float) -> None:
    x, y = rows_of([cells[i : i + 6] for i in (0, 6, 12)]), torch.tensor([0, 1, 3])
    whole = clipped_feature_sum(CLASSES, x, y, 30.0, clip_norm)
    for i in range(3):
        keep = [j for j in range(3) if j != i]
        rest = clipped_feature_sum(CLASSES, x[keep], y[keep], 30.0, clip_norm)
        moved = float(torch.linalg.vector_norm(whole.value - rest.value))
        # rounding of a sum of at most three float64 terms of norm clip_norm
        assert moved <= whole.sensitivity * (1 + 1e-12)


def test_no_records_give_a_zero_feature_sum() -> None:
    empty = clipped_feature_sum(CLASSES, torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), 30.0, 1.0)
    assert torch.equal(empty.value, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_feature_sums_hold_no_more_for_larger_batches(arithmetic: Arithmetic) -> None:
    """The size of a batch is private, and memory that runs out would show it."""

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, made.numel())
            return made

    g = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(5, 8, generator=g), dim=1)
    x = torch.nn.functional.normalize(torch.randn(5000, 8, generator=g), dim=1)
    y = torch.randint(0, 5, (5000,), generator=g)
    most, given = [], {t.untyped_storage().data_ptr() for t in (x, y)}
    for size in (600, 5000):
        with Largest() as largest:
            clipped_feature_sum(classes, x[:size], y[:size], 20.0, 0.5, arithmetic)
        most.append(largest.entries)
    assert most[0] == most[1] > 0
    whole = clipped_feature_sum(classes, x, y, 20.0, 0.5, arithmetic).value
    parts = [clipped_feature_sum(classes, x[i : i + 1], y[i : i + 1], 20.0, 0.5, arithmetic).value for i in range(5000)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-9)

"""The private step of the library: its count, its sensitivity under both clipping rules, and its noise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy import clipping
from fl_dualpriv.privacy.clipping import GRID_STEPS, NORMALISED_GAMMA, Clip, clip_rows, integer_rows
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.selection import choice
from fl_dualpriv.privacy.step import (
    Block,
    OuterBlock,
    Payment,
    PlacedBlock,
    RowBlock,
    client_rows,
    clipped_sums,
    private_step,
)

PLAN = RecordLevelPlan(
    clip_norm=0.5, noise_multiplier=2.0, sampling_rate=0.3, releases=6, delta=1e-5, trusts_server=False, personal=True
)
SHAPE = (4, 6)


@dataclass(frozen=True)
class Made:
    """Rows in one of the three forms, for one client."""

    form: str
    left: Tensor
    right: Tensor
    lines: Tensor

    def blocks(self) -> Iterator[Block]:
        for start in range(0, len(self.left), 3):
            part = slice(start, start + 3)
            left, right, lines = self.left[part], self.right[part], self.lines[part]
            if self.form == "outer":
                yield OuterBlock(client=0, left=left, right=right)
            elif self.form == "placed":
                yield PlacedBlock(client=0, lines=lines, values=right)
            else:
                yield RowBlock(clients=torch.tensor([0]), rows=(left[:, :, None] * right[:, None])[None])

    def zeros(self) -> Tensor:
        return torch.zeros(1, *SHAPE, dtype=torch.float64)

    def without(self, gone: int) -> "Made":
        kept = [i for i in range(len(self.left)) if i != gone]
        return replace(self, left=self.left[kept], right=self.right[kept], lines=self.lines[kept])


def made(form: str, count: int = 10) -> Made:
    """Rows with norms from far below C to far above it; one is not finite, and one is zero."""
    g = torch.Generator().manual_seed(3)
    left, right = torch.randn(count, SHAPE[0], generator=g).double(), torch.randn(count, SHAPE[1], generator=g).double()
    right *= torch.logspace(-4, 3, count, dtype=torch.float64)[:, None]
    right[4, 2], right[5] = torch.inf, 0
    return Made(form, left, right, torch.arange(count) % SHAPE[0])


FORMS = ("rows", "outer", "placed")
RULES = ("flat", "normalised")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_a_record_moves_a_sum_by_c_at_most(form: str, rule: Any) -> None:
    clip, rows = Clip(PLAN.clip_norm, rule), made(form)
    for arithmetic, bound in (("float", clip.norm * (1 + 1e-12)), ("integer", float(GRID_STEPS))):
        (whole,) = clipped_sums(rows, clip, arithmetic)  # type: ignore[arg-type]
        moves = [
            float((whole.value - clipped_sums(rows.without(gone), clip, arithmetic)[0].value).norm())  # type: ignore[arg-type]
            for gone in range(10)
        ]
        assert max(moves) <= bound, f"{arithmetic}: a record moves the sum by {max(moves)}"
        assert max(moves) >= 0.99 * bound, "nothing is clipped, so nothing is tested"
        assert max(moves[4], moves[5]) <= 1e-12  # a bad record and a zero: only the blocks are other ones
    assert clipped_sums(replace(rows, left=rows.left[:0], right=rows.right[:0]), clip)[0].value.abs().sum() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_all_forms_equal_the_rows_in_full(form: str, rule: Any) -> None:
    """The slow, obvious form: clip each row, then add."""
    clip, rows = Clip(PLAN.clip_norm, rule), made(form)
    full = torch.cat(list(client_rows(rows, 0)))
    expected = clip_rows(full, clip)[0].sum(dim=0)
    torch.testing.assert_close(clipped_sums(rows, clip)[0].value, expected, rtol=1e-12, atol=1e-12)
    (found,) = clipped_sums(rows, clip, "integer")
    # The closed form rounds before it cuts: an entry may be off by one unit for each row.
    assert (found.value - integer_rows(full, clip).sum(dim=0)).abs().max() <= len(full)


def test_normalised_rows_are_the_papers() -> None:
    """C·g/(‖g‖ + γ) by hand: g = (3, 4) has norm 5."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    scaled, norms = clip_rows(rows, Clip(2.0, "normalised"))
    factor = 2.0 / (5 + NORMALISED_GAMMA)
    torch.testing.assert_close(scaled, torch.tensor([[3 * factor, 4 * factor], [0.0, 0.0]], dtype=torch.float64))
    assert norms.tolist() == [5.0, 0.0]
    assert float(scaled.norm()) < 2.0


def test_a_normalisation_that_is_too_strong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """C/(N − γ), a slip of the sign, gives rows longer than C."""
    monkeypatch.setattr(clipping, "NORMALISED_GAMMA", -NORMALISED_GAMMA)
    with pytest.raises(AssertionError, match="a record moves the sum"):
        test_a_record_moves_a_sum_by_c_at_most("rows", "normalised")


# --- the count --------------------------------------------------------------------------------------------------------


def source(step: int) -> KeyedRandom:
    return KeyedRandom(StreamKey(seed=0, purpose="noise", step=step))


def test_a_payment_is_used_up() -> None:
    payment = Payment(PLAN, PLAN.event("run", 1, 2))
    for step in range(2):
        assert payment.left == 2 - step
        private_step(PLAN, [payment], made("rows"), [source(step)])
    with pytest.raises(PrivacyError, match="all releases of the ledger's event were made"):
        private_step(PLAN, [payment], made("rows"), [source(2)])


def test_each_client_needs_a_payment() -> None:
    payment = Payment(PLAN, PLAN.event("run", 1, 2))
    for payments in ([], [payment, payment]):
        with pytest.raises(PrivacyError, match="payments for the rows of 1 clients"):
            private_step(PLAN, payments, made("rows"), [source(0)])
    assert payment.left == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 2.1}, "z = 2.1, and the plan has"),
        ({"sampling_rate": 0.2}, "q = 0.2 and z = 2, and the plan has"),
        ({"unit": "client"}, "does not pay for steps"),
    ],
)
def test_an_event_that_costs_less_pays_for_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        Payment(PLAN, replace(PLAN.event("run", 1, 2), **changes))


def test_a_choice_of_a_start_pays_for_no_step() -> None:
    with pytest.raises(PrivacyError, match="does not pay for steps"):
        Payment(PLAN, choice(0.5).event("run"))


def test_the_release_is_the_sum_with_noise_of_z_times_c() -> None:
    payment = Payment(PLAN, PLAN.event("run", 1, 6))
    draws = [private_step(PLAN, [payment], made("rows"), [source(step)]).noised for step in range(6)]
    clean = clipped_sums(made("rows"), PLAN.clip)[0].value
    noise = torch.stack([d[0] for d in draws if d is not None]) - clean
    # 144 draws: the mean square has a relative standard deviation of √(2/144) = 0.12.
    assert float(noise.square().mean()) == pytest.approx((2.0 * 0.5) ** 2, rel=0.6)


def test_only_a_trusted_server_gets_sums_without_noise() -> None:
    step = private_step(PLAN, [Payment(PLAN, PLAN.event("run", 1, 1))], made("rows"), [source(0)])
    assert step.for_server is None
    trusting = replace(PLAN, trusts_server=True, personal=False)
    step = private_step(trusting, [Payment(trusting, trusting.event("run", 1, 1))], made("rows"), [source(0)])
    assert step.noised is None
    assert step.for_server is not None
    assert torch.equal(step.for_server[0], clipped_sums(made("rows"), PLAN.clip)[0].value)

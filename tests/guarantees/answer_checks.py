"""What privacy needs of gradients of answers, whatever is learnt; and bugs that any way to learn could have.

The checks raise AssertionError on code that breaks them, which is shown by breaking it.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.learners.answers import BLOCK, AnswerObjective, AnswerRecords, answer_records
from fl_dualpriv.learners.row_check import checked_objective
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.privacy.clipping import GRID_STEPS, Arithmetic, Clip, bounded_rows, clip_rows
from fl_dualpriv.privacy.step import RowBlock, client_rows, clipped_sums
from tests.tiny_llava import ANSWERS, QUESTIONS


@dataclass(frozen=True)
class Case:
    """A way to learn: its objective, a prompt (rows, cols), a C below every record's norm, and a mask (rows, cols)."""

    model: AnsweringModel
    objective: AnswerObjective
    prompt: Tensor
    clip: float
    mask: Tensor

    def records(self, count: int = 11) -> AnswerRecords:
        """A record per image, so that changing an image changes one record."""
        visual = torch.randn(count, self.model.embed_dim, generator=torch.Generator().manual_seed(0))
        asked = [QUESTIONS[i % 5] for i in range(count)], [ANSWERS[i * 3 % 5] for i in range(count)]
        return answer_records(self.model, *asked, np.arange(count), np.zeros(count), visual, 14, "raise")

    def checked(self) -> "Case":
        """With the form of the objective that a run has on this machine, see `row_check`."""
        form, _ = checked_objective(self.objective, lambda: self.records(25), self.prompt[None], private=True)
        assert isinstance(form, AnswerObjective)
        return replace(self, objective=form)

    def rows(self, data: AnswerRecords, picked: list[int]) -> Tensor:
        step = self.objective.bind([data]).gradients(self.prompt[None], [np.array(picked, dtype=np.int64)])
        return torch.cat([torch.zeros(0, *self.prompt.shape), *client_rows(step, 0)])[: len(picked)]

    def clean_sum(
        self, data: AnswerRecords, picked: list[int], arithmetic: Arithmetic = "float", mask: Tensor | None = None
    ) -> Tensor:
        step = self.objective.bind([data]).gradients(self.prompt[None], [np.array(picked, dtype=np.int64)])
        (found,) = clipped_sums(step, self.clip, arithmetic, None if mask is None else mask[None])
        assert found.value.dtype == torch.float64
        assert found.sensitivity == (self.clip if arithmetic == "float" else GRID_STEPS)
        return found.value


def rows_do_not_mix(case: Case) -> None:
    """Change one record's image, question and answer: every other row is the same bit by bit, its own is not."""
    data = case.records()
    changed = replace(data, visual=data.visual.clone(), tokens=data.tokens.clone(), length=data.length.clone())
    changed.visual[3] *= -5
    changed.tokens[3], changed.length[3] = data.tokens[4], data.length[4]
    changed.answer_start[3] = data.answer_start[4]
    before, after = case.rows(data, list(range(11))), case.rows(changed, list(range(11)))
    others = [i for i in range(11) if i != 3]
    assert torch.equal(before[others], after[others]), "one record changes the gradient of another"
    assert not torch.allclose(before[3], after[3]), "a record's gradient is not its own"


def the_batch_does_not_matter(case: Case) -> None:
    """A record's row is the same bit by bit in a batch of one, in a full one, and behind a full block."""
    data = case.records()
    whole = case.rows(data, list(range(11)))
    assert torch.equal(case.rows(data, [0]), whole[:1]), "the number of records changes a gradient"
    assert torch.equal(case.rows(data, list(range(BLOCK))), whole[:BLOCK]), "the number of records changes a gradient"


def rows_add_up_to_the_batch(case: Case) -> None:
    """The rows are parts of the gradient that plain training takes, from one pass with nothing kept."""
    data = case.records()
    step = case.objective.bind([data]).gradients(case.prompt[None], [np.arange(11)])
    rows, plain = case.rows(data, list(range(11))), step.sums()[0]
    assert (rows.sum(dim=0) - plain).abs().max() <= 1e-5 * plain.abs().max(), "rows are no parts of the gradient"


def one_record_moves_a_sum_by_at_most_c(case: Case) -> None:
    data = case.records()
    everyone = list(range(11))
    assert (case.rows(data, everyone).flatten(1).norm(dim=1) > case.clip).all()  # all are clipped
    for gone in (0, 7, 10):
        without = [i for i in everyone if i != gone]
        moved = (case.clean_sum(data, everyone) - case.clean_sum(data, without)).norm()
        # The rows of the others may differ by float rounding where they stand elsewhere.
        assert moved <= case.clip * (1 + 1e-5), f"one record moves the sum by {moved / case.clip:.2f} C"
        assert moved > 0.99 * case.clip


def masks_come_before_the_clip(case: Case) -> None:
    """The sum is that of masked rows, clipped by the norm of what is left."""
    data = case.records()
    masked = case.rows(data, list(range(11))) * case.mask
    norms = masked.flatten(1).norm(dim=1)
    assert norms.min() < case.clip < norms.max()
    found = case.clean_sum(data, list(range(11)), mask=case.mask)
    expected = clip_rows(masked, case.clip)[0].sum(0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12), "a mask does not act before the clip"


def bad_records_are_zeros(case: Case) -> None:
    data = case.records()
    bad = replace(data, visual=data.visual.clone(), length=data.length.clone())
    bad.visual[1, 5], bad.visual[2, 0], bad.length[4] = float("nan"), float("inf"), 0
    kept = [i for i in range(11) if i not in (1, 2, 4)]
    before, after = case.rows(data, list(range(11))), case.rows(bad, list(range(11)))
    assert not after[[1, 2, 4]].any(), "a record that cannot be used has a gradient"
    assert torch.equal(after[kept], before[kept]), "a bad record changes another"
    assert bad.num_examples == 11
    found = case.clean_sum(bad, list(range(11)))
    assert torch.isfinite(found).all(), "a bad record is not a zero"
    assert torch.allclose(found, clip_rows(before[kept], case.clip)[0].sum(0), rtol=0, atol=1e-12)


CHECKS = (
    rows_do_not_mix,
    the_batch_does_not_matter,
    rows_add_up_to_the_batch,
    one_record_moves_a_sum_by_at_most_c,
    masks_come_before_the_clip,
    bad_records_are_zeros,
)

# --- planted bugs -----------------------------------------------------------------------------------------------------


def normalise_images_together(patch: pytest.MonkeyPatch) -> None:
    clean = AnswerRecords.clean_visual

    def together(self: AnswerRecords, images: Tensor, device: torch.device) -> Tensor:
        seen = clean(self, images, device)
        return seen - seen.mean(dim=0)

    patch.setattr(AnswerRecords, "clean_visual", together)


def clip_before_the_mask(patch: pytest.MonkeyPatch) -> None:
    def early(self: RowBlock, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None) -> None:
        terms = bounded_rows(self.rows.flatten(0, 1), clip, arithmetic).unflatten(0, self.rows.shape[:2]).sum(dim=1)
        totals[self.clients] += terms if masks is None else terms * masks[self.clients]

    patch.setattr(RowBlock, "add_to", early)


def clip_the_block(patch: pytest.MonkeyPatch) -> None:
    def together(some: Tensor, clip: Clip, arithmetic: Arithmetic) -> Tensor:
        return bounded_rows(some.mean(dim=0, keepdim=True), clip, arithmetic).expand_as(some)

    patch.setattr(fl_dualpriv.privacy.step, "bounded_rows", together)


def let_bad_records_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnswerRecords, "usable", property(lambda self: torch.ones(len(self.length), dtype=torch.bool)))
    patch.setattr(fl_dualpriv.privacy.step, "bounded_rows", lambda some, clip, arithmetic: some.double())


PLANTED = (
    (normalise_images_together, rows_do_not_mix),
    (clip_the_block, one_record_moves_a_sum_by_at_most_c),
    (clip_before_the_mask, masks_come_before_the_clip),
    (let_bad_records_in, bad_records_are_zeros),
)

MIX_A_BLOCK = frozenset(
    {
        "add_up_over_the_batch",
        "shift_the_examples",
        "share_one_prompt",
        normalise_images_together.__name__,
        clip_the_block.__name__,
    }
)
"""Planted bugs that change nothing in blocks of one record."""

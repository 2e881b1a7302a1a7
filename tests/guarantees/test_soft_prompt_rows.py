"""What privacy needs of soft-prompt gradients: rows are records' own, clipped one by one; and planted bugs are noticed.

The checks raise AssertionError on code that breaks them, which is shown by breaking it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.backbones.answering import AnsweringModel, load_answering_model
from fl_dualpriv.privacy.clipping import GRID_STEPS, Arithmetic, clip_rows, integer_rows
from fl_dualpriv.prompts import answers, soft_prompt
from fl_dualpriv.prompts.answers import BLOCK, AnswerRecords, answer_records
from fl_dualpriv.prompts.soft_prompt import SoftPromptObjective
from tests.tiny_llava import ANSWERS, QUESTIONS

N_CTX, CLIP = 3, 0.05
PROMPT = 0.5 * torch.randn(1, N_CTX, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(llava_dir: Path) -> AnsweringModel:
    return load_answering_model(f"hf:{llava_dir}", "cpu", None)


def records(model: AnsweringModel, count: int = 11) -> AnswerRecords:
    """A record per image, so that changing an image changes one record."""
    visual = torch.randn(count, model.embed_dim, generator=torch.Generator().manual_seed(0))
    asked = [QUESTIONS[i % 5] for i in range(count)], [ANSWERS[i * 3 % 5] for i in range(count)]
    return answer_records(model, *asked, np.arange(count), np.zeros(count), visual, 14, "raise")


def rows(model: AnsweringModel, data: AnswerRecords, picked: list[int]) -> Tensor:
    step = SoftPromptObjective(model).over([data]).at(PROMPT, [np.array(picked, dtype=np.int64)])
    return torch.cat([torch.zeros(0, N_CTX, 32), *step.rows(0)])[: len(picked)]


def clean_sum(
    model: AnsweringModel,
    data: AnswerRecords,
    picked: list[int],
    arithmetic: Arithmetic = "float",
    masks: Tensor | None = None,
) -> Tensor:
    step = SoftPromptObjective(model).over([data]).at(PROMPT, [np.array(picked, dtype=np.int64)])
    (found,) = step.clipped_sums(CLIP, arithmetic, masks)
    assert found.value.dtype == torch.float64
    assert found.sensitivity == (CLIP if arithmetic == "float" else GRID_STEPS)
    return found.value


# --- checks -----------------------------------------------------------------------------------------------------------


def rows_do_not_mix(model: AnsweringModel) -> None:
    """Change one record's image, question and answer: every other row is the same bit by bit, its own is not."""
    data = records(model)
    changed = replace(data, visual=data.visual.clone(), tokens=data.tokens.clone(), length=data.length.clone())
    changed.visual[3] *= -5
    changed.tokens[3], changed.length[3] = data.tokens[4], data.length[4]
    changed.answer_start[3] = data.answer_start[4]
    before, after = rows(model, data, list(range(11))), rows(model, changed, list(range(11)))
    others = [i for i in range(11) if i != 3]
    assert torch.equal(before[others], after[others]), "one record changes the gradient of another"
    assert not torch.allclose(before[3], after[3]), "a record's gradient is not its own"


def the_batch_does_not_matter(model: AnsweringModel) -> None:
    """A record's row is the same bit by bit in a batch of one, in a full one, and behind a full block."""
    data = records(model)
    whole = rows(model, data, list(range(11)))
    assert torch.equal(rows(model, data, [0]), whole[:1]), "the number of records changes a gradient"
    assert torch.equal(rows(model, data, list(range(BLOCK))), whole[:BLOCK]), "the number of records changes a gradient"


def one_record_moves_a_sum_by_at_most_c(model: AnsweringModel) -> None:
    data = records(model)
    everyone = list(range(11))
    assert (rows(model, data, everyone).flatten(1).norm(dim=1) > CLIP).all()  # all are clipped
    for gone in (0, 7, 10):
        without = [i for i in everyone if i != gone]
        moved = (clean_sum(model, data, everyone) - clean_sum(model, data, without)).norm()
        # The rows of the others may differ by float rounding where they stand elsewhere.
        assert moved <= CLIP * (1 + 1e-5), f"one record moves the sum by {moved / CLIP:.2f} C"
        assert moved > 0.99 * CLIP


def masks_come_before_the_clip(model: AnsweringModel) -> None:
    """The sum is that of masked rows, clipped by the norm of what is left."""
    data = records(model)
    mask = torch.zeros(1, N_CTX, 32)
    mask[0, 1, :3] = 1.0
    masked = rows(model, data, list(range(11))) * mask
    norms = masked.flatten(1).norm(dim=1)
    assert norms.min() < CLIP < norms.max()
    found = clean_sum(model, data, list(range(11)), masks=mask)
    expected = clip_rows(masked, CLIP)[0].sum(0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12), "a mask does not act before the clip"


def bad_records_are_zeros(model: AnsweringModel) -> None:
    data = records(model)
    bad = replace(data, visual=data.visual.clone(), length=data.length.clone())
    bad.visual[1, 5], bad.visual[2, 0], bad.length[4] = float("nan"), float("inf"), 0
    kept = [i for i in range(11) if i not in (1, 2, 4)]
    before, after = rows(model, data, list(range(11))), rows(model, bad, list(range(11)))
    assert not after[[1, 2, 4]].any(), "a record that cannot be used has a gradient"
    assert torch.equal(after[kept], before[kept]), "a bad record changes another"
    assert bad.num_examples == 11
    found = clean_sum(model, bad, list(range(11)))
    assert torch.isfinite(found).all(), "a bad record is not a zero"
    assert torch.allclose(found, clip_rows(before[kept], CLIP)[0].sum(0), rtol=0, atol=1e-12)


CHECKS = (
    rows_do_not_mix,
    the_batch_does_not_matter,
    one_record_moves_a_sum_by_at_most_c,
    masks_come_before_the_clip,
    bad_records_are_zeros,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds(model: AnsweringModel, check: Callable[[AnsweringModel], None]):
    check(model)


def test_integer_sums_are_those_of_integer_rows(model: AnsweringModel):
    data = records(model)
    found = clean_sum(model, data, list(range(11)), "integer")
    assert torch.equal(found, integer_rows(rows(model, data, list(range(11))), CLIP).sum(0))
    assert torch.equal(found, found.round())
    # The last record stands alone in its place: the others' rows are the same bits without it.
    without = clean_sum(model, data, list(range(10)), "integer")
    assert torch.equal(found - without, integer_rows(rows(model, data, list(range(11)))[10:], CLIP)[0])


def test_no_records_no_sum(model: AnsweringModel):
    for arithmetic in ("float", "integer"):
        assert not clean_sum(model, records(model), [], arithmetic).any()
    assert not clean_sum(model, records(model), [0, 1], masks=torch.zeros(1, N_CTX, 32)).any()


# --- planted bugs -----------------------------------------------------------------------------------------------------


def share_one_prompt(patch: pytest.MonkeyPatch) -> None:
    """One prompt for the block: the gradient of the sum, shared out evenly."""
    losses = SoftPromptObjective.losses

    def shared(self: SoftPromptObjective, prompts: Tensor, block: answers.Block) -> Tensor:
        return losses(self, prompts.mean(dim=0, keepdim=True).expand_as(prompts), block)

    patch.setattr(SoftPromptObjective, "losses", shared)


def normalise_images_together(patch: pytest.MonkeyPatch) -> None:
    compute = soft_prompt._Prefixes._compute

    def together(self: soft_prompt._Prefixes, data: AnswerRecords, images: Tensor):
        seen = data.visual[images]
        return compute(self, replace(data, visual=seen - seen.mean(dim=0)), torch.arange(len(images)))

    patch.setattr(soft_prompt._Prefixes, "_compute", together)


def clip_before_the_mask(patch: pytest.MonkeyPatch) -> None:
    bounded = answers.bounded_rows
    true_rows = answers.AnswerGradients.rows

    def clipped(self: answers.AnswerGradients, client: int):
        for some in true_rows(self, client):
            yield bounded(some, CLIP, "float").float()

    patch.setattr(answers.AnswerGradients, "rows", clipped)
    patch.setattr(answers, "bounded_rows", lambda some, clip_norm, arithmetic: some.double())


def clip_the_block(patch: pytest.MonkeyPatch) -> None:
    bounded = answers.bounded_rows

    def together(some: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
        mean = bounded(some.mean(dim=0, keepdim=True), clip_norm, arithmetic)
        return mean.expand_as(some)

    patch.setattr(answers, "bounded_rows", together)


def let_bad_records_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnswerRecords, "usable", property(lambda self: torch.ones(len(self.length), dtype=torch.bool)))
    patch.setattr(answers, "bounded_rows", lambda some, clip_norm, arithmetic: some.double())


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (share_one_prompt, rows_do_not_mix),
        (normalise_images_together, rows_do_not_mix),
        (clip_the_block, one_record_moves_a_sum_by_at_most_c),
        (clip_before_the_mask, masks_come_before_the_clip),
        (let_bad_records_in, bad_records_are_zeros),
    ],
    ids=lambda thing: thing.__name__,
)
def test_a_planted_bug_is_caught(
    model: AnsweringModel,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[AnsweringModel], None],
):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(model)

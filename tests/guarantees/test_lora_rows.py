"""What privacy needs of LoRA gradients: rows are records' own, clipped one by one; planted bugs are noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.blocks import CoordinateBlocks
from fl_dualpriv.learners.lora import LoraObjective
from fl_dualpriv.models import lora
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.lora import LoraModel, load_lora
from fl_dualpriv.privacy.clipping import integer_rows
from tests.guarantees import answer_checks
from tests.guarantees.answer_checks import Case

RANK = 3


@pytest.fixture(scope="module")
def case(llava_dir: Path) -> Case:
    model = load_answering_model(f"hf:{llava_dir}", "cpu", None)
    adapted = load_lora(model, RANK)
    rows, cols = adapted.shape
    blocks = CoordinateBlocks(kind="matrix", rows=rows, cols=cols, segments=adapted.segments)
    open_matrix = torch.zeros(1, blocks.count)
    open_matrix[0, 0] = 1.0  # A of the first layer's queries
    return Case(
        model=model,
        objective=LoraObjective(adapted, model.embed_tokens(torch.tensor(model.words("look at this")))),
        prompt=0.2 * torch.randn(adapted.shape, generator=torch.Generator().manual_seed(1)),
        clip=1.5,
        mask=blocks.spread(open_matrix)[0],
    ).checked()


@pytest.mark.parametrize("check", answer_checks.CHECKS, ids=lambda check: check.__name__)
def test_holds(case: Case, check: Callable[[Case], None]):
    check(case)


def test_integer_sums_are_those_of_integer_rows(case: Case):
    data = case.records()
    found = case.clean_sum(data, list(range(11)), "integer")
    assert torch.equal(found, integer_rows(case.rows(data, list(range(11))), case.clip).sum(0))
    without = case.clean_sum(data, list(range(10)), "integer")
    assert torch.equal(found - without, integer_rows(case.rows(data, list(range(11)))[10:], case.clip)[0])


def test_no_records_no_sum(case: Case):
    for arithmetic in ("float", "integer"):
        assert not case.clean_sum(case.records(), [], arithmetic).any()


def add_up_over_the_batch(patch: pytest.MonkeyPatch) -> None:
    """What a layer's own weight gradient is: the examples' sum, here shared out evenly."""
    true_rows = LoraModel.rows

    def summed(self: LoraModel, matrix: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        rows = true_rows(self, matrix, loss)
        return rows.mean(dim=0, keepdim=True).expand_as(rows)

    patch.setattr(LoraModel, "rows", summed)


def shift_the_examples(patch: pytest.MonkeyPatch) -> None:
    """Inputs of one example meet output gradients of its neighbour."""
    rule = lora._factor_rows
    patch.setattr(lora, "_factor_rows", lambda layer, inputs, back: rule(layer, inputs.roll(1, dims=0), back))


def forget_the_image(patch: pytest.MonkeyPatch) -> None:
    """Of each sequence only the end, as if keys and values of the image did not depend on the factors."""
    rule = lora._factor_rows  # 3 tokens before 16 visual ones
    patch.setattr(lora, "_factor_rows", lambda layer, inputs, back: rule(layer, inputs[:, 19:], back[:, 19:]))


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (add_up_over_the_batch, answer_checks.rows_do_not_mix),
        (shift_the_examples, answer_checks.rows_do_not_mix),
        (forget_the_image, answer_checks.rows_add_up_to_the_batch),
        *answer_checks.PLANTED,
    ],
    ids=lambda thing: thing.__name__,
)
def test_a_planted_bug_is_caught(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Case], None],
):
    if case.objective.block == 1 and plant.__name__ in answer_checks.MIX_A_BLOCK:
        pytest.skip("with these kernels a run takes records one by one (row_check): there is no block to mix")
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(case)

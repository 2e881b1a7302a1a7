"""What privacy needs of soft-prompt gradients: rows are records' own, clipped one by one; planted bugs are noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_dualpriv.learners import answers, soft_prompt
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.privacy.clipping import integer_rows
from tests.guarantees import answer_checks
from tests.guarantees.answer_checks import Case

N_CTX = 3


@pytest.fixture(scope="module", params=[0, 2**20], ids=["computed", "kept"])
def case(request: pytest.FixtureRequest, llava_dir: Path) -> Case:
    """With prefixes of images computed for each step, and kept, as runs do."""
    model = load_answering_model(f"hf:{llava_dir}", "cpu", None)
    mask = torch.zeros(N_CTX, 32)
    mask[1, :3] = 1.0
    return Case(
        model=model,
        objective=SoftPromptObjective(model, kept_bytes=request.param),
        prompt=0.5 * torch.randn(N_CTX, 32, generator=torch.Generator().manual_seed(1)),
        clip=0.05,
        mask=mask,
    ).checked()


@pytest.mark.parametrize("check", answer_checks.CHECKS, ids=lambda check: check.__name__)
def test_holds(case: Case, check: Callable[[Case], None]):
    check(case)


def test_integer_sums_are_those_of_integer_rows(case: Case):
    data = case.records()
    found = case.clean_sum(data, list(range(11)), "integer")
    assert torch.equal(found, integer_rows(case.rows(data, list(range(11))), case.clip).sum(0))
    assert torch.equal(found, found.round())
    # The last record stands alone in its place: the others' rows are the same bits without it.
    without = case.clean_sum(data, list(range(10)), "integer")
    assert torch.equal(found - without, integer_rows(case.rows(data, list(range(11)))[10:], case.clip)[0])


def test_no_records_no_sum(case: Case):
    for arithmetic in ("float", "integer"):
        assert not case.clean_sum(case.records(), [], arithmetic).any()
    assert not case.clean_sum(case.records(), [0, 1], mask=torch.zeros(N_CTX, 32)).any()


def kept_prefixes_are_a_clients_own(model: AnsweringModel) -> None:
    """Clients with the same questions about other images, one after the other: the same bits as each alone."""
    kept, computed = (
        Case(model, SoftPromptObjective(model, kept_bytes=size), torch.ones(N_CTX, 32), 1.0, torch.ones(1, 1))
        for size in (2**20, 0)
    )
    one = kept.records()
    other = replace(one, visual=one.visual.flip(0))
    for data in (one, other, one):
        assert torch.equal(kept.rows(data, [5, 2, 9]), computed.rows(data, [5, 2, 9])), "another client's image"


def test_kept_prefixes_are_a_clients_own(llava_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_answering_model(f"hf:{llava_dir}", "cpu", None)
    kept_prefixes_are_a_clients_own(model)
    table = soft_prompt._Prefixes._table  # of whoever came first
    monkeypatch.setattr(
        soft_prompt._Prefixes, "_table", lambda self, records: table(self, self.__dict__.setdefault("first", records))
    )
    with pytest.raises(AssertionError, match="another client's image"):
        kept_prefixes_are_a_clients_own(model)


def share_one_prompt(patch: pytest.MonkeyPatch) -> None:
    """One prompt for the block: the gradient of the sum, shared out evenly."""
    losses = SoftPromptObjective.losses

    def shared(self: SoftPromptObjective, prompt: Tensor, block: answers.Block) -> Tensor:
        copies = prompt.expand(self.block, -1, -1)
        return losses(self, copies.mean(dim=0, keepdim=True).expand_as(copies), block)

    patch.setattr(SoftPromptObjective, "losses", shared)


@pytest.mark.parametrize(
    ("plant", "check"),
    [(share_one_prompt, answer_checks.rows_do_not_mix), *answer_checks.PLANTED],
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

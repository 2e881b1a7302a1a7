"""DP-LoRA's factors: their gradients by hand and by autograd, and one clip over both."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.factored import FactoredTower
from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows
from fl_dualpriv.towers.base import PromptTower
from fl_dualpriv.towers.plain import FunctionTower
from tests.guarantees import objective_checks
from tests.guarantees.step_checks import CTX_DIM, N_CTX, SCALE, START, TOWER, class_features, records

RANK = 2


def factored(inner: PromptTower = TOWER, base: Tensor = START, *, fixed: bool = False) -> FactoredTower:
    return FactoredTower(inner, base, RANK, seed=0, fixed=fixed)


def objective(tower: FactoredTower) -> Classification:
    return Classification(tower=tower, logit_scale=SCALE, top_m=0, noise_space="prompt", workspace_bytes=2**20)


def factors(tower: FactoredTower, seed: int = 3) -> Tensor:
    return tower.initial() + 0.2 * torch.randn(tower.shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # P = 0 + u v with u = (1, 2)^T, v = (3, 4); the loss <P, G> has the gradients G v^T of u and u^T G of v.
    tower = FactoredTower(FunctionTower(lambda p: p), torch.zeros(2, 2), 1, seed=0, fixed=False)
    prompt = torch.tensor([[[1.0, 2, 3, 4]]])
    assert torch.equal(tower.effective(prompt)[0], torch.tensor([[3.0, 4], [6, 8]]))
    g = torch.tensor([[5.0, 6], [7, 8]])  # G v^T = (15 + 24, 21 + 32), u^T G = (5 + 14, 6 + 16)
    assert torch.equal(tower(prompt).vjp(g[None, None])[0, 0], torch.tensor([[39.0, 53, 19, 22]]))


@pytest.mark.parametrize("fixed", [False, True], ids=["dp-lora", "ffa-lora"])
def test_gradients_are_those_of_autograd(fixed: bool):
    tower = factored(fixed=fixed)

    def loss(prompt: Tensor, data: objective_checks.ClientData) -> Tensor:
        logits = SCALE * data.features @ class_features(tower.effective(prompt[None])[0]).T
        return torch.nn.functional.cross_entropy(logits, data.labels, reduction="sum")

    objective_checks.gradients_are_autograds(objective(tower), factors(tower), records(1, 4), loss)


@pytest.mark.parametrize("fixed", [False, True], ids=["dp-lora", "ffa-lora"])
def test_a_record_moves_the_sum_by_c_at_most_and_a_bad_one_by_nothing(fixed: bool):
    tower = factored(fixed=fixed)
    objective_checks.one_record_moves_the_sum_by_at_most_c(objective(tower), factors(tower), records(1, 5))
    objective_checks.a_bad_record_is_a_zero(objective(tower), factors(tower), records(1, 5), "features")
    prompts = torch.stack([factors(tower, 1), factors(tower, 2)])
    objective_checks.clients_do_not_mix(objective(tower), prompts, [records(1, 3), records(2, 9)])


def test_factors_that_are_clipped_apart_are_caught(monkeypatch: pytest.MonkeyPatch):
    def apart(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
        of_u, of_v = rows[..., :N_CTX], rows[..., N_CTX:]
        return torch.cat([clip_rows(of_u, clip_norm)[0], clip_rows(of_v, clip_norm)[0]], dim=-1)

    monkeypatch.setattr(fl_dualpriv.privacy.step, "bounded_rows", apart)
    tower = factored()
    with pytest.raises(AssertionError, match="a record moves the sum"):
        objective_checks.one_record_moves_the_sum_by_at_most_c(objective(tower), factors(tower), records(1, 5))


def test_the_start_is_the_base_and_a_fixed_factor_never_travels():
    for fixed, width in ((False, N_CTX + CTX_DIM), (True, N_CTX)):
        tower = factored(fixed=fixed)
        assert tower.initial().shape == tower.shape == (RANK, width)
        assert torch.equal(tower.effective(tower.initial()[None])[0], START)
    both, one = factored(), factored(fixed=True)
    u = torch.randn(1, RANK, N_CTX, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([u, both.initial()[None, :, N_CTX:]], dim=-1)  # the same seed: the same v
    torch.testing.assert_close(both.effective(whole), one.effective(u))


def rank_of(move: Callable[[Tensor], Tensor], tower: FactoredTower) -> int:
    return int(torch.linalg.matrix_rank(move(factors(tower)[None])[0] - START, atol=1e-4))


def test_there_is_no_residual():
    for fixed in (False, True):
        tower = factored(fixed=fixed)
        assert rank_of(tower.effective, tower) == RANK

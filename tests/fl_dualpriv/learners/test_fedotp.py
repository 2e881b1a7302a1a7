"""FedOTP's loss: by hand, against autograd with a held plan; one clip for both prompts, and images that do not mix."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.learners import fedotp
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.fedotp import TransportObjective, transport_plan
from fl_dualpriv.privacy.clipping import Arithmetic, clip_rows
from fl_dualpriv.towers.plain import FunctionTower
from tests.guarantees import objective_checks
from tests.guarantees.step_checks import CTX_DIM, EMBED, N_CLS, N_CTX, START, TOWER, class_features

PATCHES, SCALE = 6, 8.0
OBJECTIVE = TransportObjective(
    tower=TOWER,
    local_start=0.5 * START,
    logit_scale=SCALE,
    mass=0.8,
    regularisation=0.1,
    iterations=60,
    workspace_bytes=2**20,
)


def records(count: int, seed: int = 0) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    patches = torch.nn.functional.normalize(torch.randn(count, PATCHES, EMBED, generator=g), dim=-1)
    labels = torch.randint(0, N_CLS, (count,), generator=g)
    return ClientData(features=torch.zeros(count, EMBED), labels=labels, patches=patches)


def pair(seed: int = 3) -> Tensor:
    return 0.1 * torch.randn(2 * N_CTX, CTX_DIM, generator=torch.Generator().manual_seed(seed))


def both_classes(prompts: Tensor) -> Tensor:
    """(2, n_cls, embed_dim) of [p_G; p_L]."""
    return torch.stack([class_features(prompts[:N_CTX]), class_features(prompts[N_CTX:] + 0.5 * START)])


def loss(prompts: Tensor, data: ClientData) -> Tensor:
    """Cross-entropy of 1 − ⟨T, 1 − S⟩, class by class and image by image; T is held."""
    assert data.patches is not None
    classes, logits = both_classes(prompts), []
    for image in data.patches:
        own = []
        for c in range(N_CLS):
            similarity = image @ classes[:, c].T
            plan = transport_plan(similarity.detach(), 0.8, 0.1, 60)
            own.append(1 - (plan * (1 - similarity)).sum())
        logits.append(torch.stack(own))
    return torch.nn.functional.cross_entropy(SCALE * torch.stack(logits), data.labels, reduction="sum")


def test_by_hand():
    # Two patches e1, e2 and one class whose prompts are e1 and e2: at γ = 1 the plan is half the identity, the distance
    # 0 and the similarity 1. A class whose prompts are both e1 has to send half of its mass to e2: similarity 1/2.
    objective = TransportObjective(
        tower=FunctionTower(lambda p: p),
        local_start=torch.zeros(2, 2),
        logit_scale=10.0,
        mass=1.0,
        regularisation=0.02,
        iterations=300,
        workspace_bytes=2**20,
    )
    patches = torch.eye(2)[None]
    classes = torch.tensor([[[1.0, 0], [1, 0]], [[0.0, 1], [1, 0]]])  # (prompt, class, dim)
    logits, plan = objective.match(patches, classes)
    seen = torch.einsum("icmp,ime->ipce", plan, patches)
    torch.testing.assert_close(logits, torch.tensor([[10.0, 5.0]]), rtol=1e-2, atol=0)
    torch.testing.assert_close(seen[0, :, 0], 0.5 * torch.eye(2), rtol=0, atol=1e-3)  # TᵀG of the first class
    # and the gradient s (p − y) TᵀG for the label 1: p = (e^5, 1) / (e^5 + 1)
    found = objective.cotangents(patches, torch.tensor([1]), classes)
    p = float(torch.softmax(logits, dim=-1)[0, 0])
    torch.testing.assert_close(found[0, :, 0], 10 * p * seen[0, :, 0])
    torch.testing.assert_close(found[0, :, 1], 10 * ((1 - p) - 1) * seen[0, :, 1])


def test_gradients_are_those_of_autograd_with_a_plan_that_is_held():
    objective_checks.gradients_are_autograds(OBJECTIVE, pair(), records(4), loss)


def test_both_prompts_are_pulled():
    found = objective_checks.clipped_sum(OBJECTIVE, pair(), records(4), clip=1e6)
    assert min(float(found[:N_CTX].norm()), float(found[N_CTX:].norm())) > 0.1


def test_a_record_moves_the_sum_by_c_at_most_and_a_bad_one_by_nothing():
    objective_checks.one_record_moves_the_sum_by_at_most_c(OBJECTIVE, pair(), records(5))
    objective_checks.a_bad_record_is_a_zero(OBJECTIVE, pair(), records(5), "patches")


def test_prompts_that_are_clipped_apart_are_caught(monkeypatch: pytest.MonkeyPatch):
    def apart(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
        return torch.cat([clip_rows(half, clip_norm)[0] for half in rows.chunk(2, dim=1)], dim=1)

    monkeypatch.setattr(fl_dualpriv.privacy.step, "bounded_rows", apart)
    with pytest.raises(AssertionError, match="a record moves the sum"):
        objective_checks.one_record_moves_the_sum_by_at_most_c(OBJECTIVE, pair(), records(5))


def test_a_plan_that_sees_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch):
    """As published: iterate until the mean change over the batch is small, which every image has a part in."""

    def until_all_are_done(similarity: Tensor, mass: float, regularisation: float, iterations: int) -> Tensor:
        plans = transport_plan(similarity, mass, regularisation, 1)
        for count in range(2, iterations):
            last, plans = plans, transport_plan(similarity, mass, regularisation, count)
            if float((plans - last).abs().mean()) < 1e-3 * float(similarity.std()):
                break
        return plans

    data = records(9)
    objective_checks.clients_do_not_mix(OBJECTIVE, torch.stack([pair(), pair(4)]), [records(3), data])
    rows_do_not_mix(data)
    monkeypatch.setattr(fedotp, "transport_plan", until_all_are_done)
    with pytest.raises(AssertionError):
        rows_do_not_mix(data)


def rows_do_not_mix(data: ClientData) -> None:
    """Exchange all images but one: its gradient at the class features stays bit by bit."""
    classes = both_classes(pair())
    other = records(data.num_examples, seed=8)
    assert data.patches is not None
    assert other.patches is not None
    changed = 0.3 * other.patches  # so small that plans settle at once
    changed[2] = data.patches[2]
    before, after = (OBJECTIVE.cotangents(patches, data.labels, classes)[2] for patches in (data.patches, changed))
    assert torch.equal(before, after)


def test_scores_are_those_of_the_loss_and_a_global_prompt_alone_has_scores():
    data = records(4)
    (logits,) = OBJECTIVE.logits(pair()[None], data)
    found = torch.nn.functional.cross_entropy(logits, data.labels, reduction="sum")
    torch.testing.assert_close(found, loss(pair(), data), rtol=1e-4, atol=1e-4)
    (alone,) = OBJECTIVE.logits(pair()[None, :N_CTX], data)
    assert alone.shape == (4, N_CLS)


def test_a_small_workspace_scores_fewer_images_together_and_the_same():
    data, together = records(7), []

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Looking(TransportObjective):
        def match(self, patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            together.append(len(patches))
            return super().match(patches, classes)

    fields = {field.name: getattr(OBJECTIVE, field.name) for field in dataclasses.fields(OBJECTIVE)}
    plan = 8 * 8 * N_CLS * PATCHES * 2  # bytes for one image
    for room, sizes in ((1, [1] * 7), (3 * plan, [3, 3, 1]), (2**20, [7])):
        together.clear()
        (logits,) = Looking(**fields | {"workspace_bytes": room}).logits(pair()[None], data)
        assert together == sizes
        torch.testing.assert_close(logits, next(OBJECTIVE.logits(pair()[None], data)))

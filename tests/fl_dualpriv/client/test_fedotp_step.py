"""A round of FedOTP: one half of a release moves the global prompt, the other one the local prompt, which stays."""

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.plan import RecordLevelPlan
from tests.fl_dualpriv.learners.test_fedotp import OBJECTIVE, loss, records
from tests.guarantees.step_checks import CLIP, N_CTX, START, as_a_client_draws, without_noise

STEP = 0.05


def local_round(
    steps: int, plan: RecordLevelPlan | None, optimizer: str = "sgd", noise: bool = True, bad: bool = False
) -> tuple[Tensor, PersonalState]:
    draw, data = as_a_client_draws(), records(6)
    draw = draw if noise else without_noise(draw)
    if bad:
        assert data.patches is not None
        data.patches[2] = torch.nan
    training = LocalTraining(
        local_steps=steps,
        sampling_rate=1.0,
        global_learning_rate=STEP,
        local_learning_rate=3 * STEP,
        optimizer=Optimizer(name=optimizer, momentum=0.9),  # type: ignore[arg-type]
        prompts=2,
    )
    one = Participant(
        partition=0,
        state=fresh_state(*START.shape, 2),
        data=data,
        random=lambda purpose, step: draw(0, purpose, step),
        event=plan and plan.event("run", 1, steps),
    )
    (found,) = cohort_update(
        global_prompt=START,
        participants=[one],
        objective=OBJECTIVE,
        method=METHODS["fedotp"],
        training=training,
        plan=plan,
    )
    return found


def plan(*, trusts_server: bool = False, arithmetic: Arithmetic = "float") -> RecordLevelPlan:
    return RecordLevelPlan(
        clip_norm=CLIP,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        releases=1,
        delta=1e-4,
        trusts_server=trusts_server,
        personal=True,
        arithmetic=arithmetic,
    )


def test_local_steps_are_gradient_steps_of_both_prompts():
    upload, state = local_round(3, None)
    shared, local = START.clone(), torch.zeros_like(START)
    for _ in range(3):
        pair = torch.cat([shared, local]).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(pair, records(6)) / 6, pair)
        shared, local = shared - STEP * gradient[:N_CTX], local - 3 * STEP * gradient[N_CTX:]
    torch.testing.assert_close(upload, shared - START, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(state.personal, local, rtol=1e-3, atol=1e-6)


def test_both_halves_of_one_release_have_noise_and_one_bound():
    upload, state = local_round(1, plan())
    quiet_upload, quiet = local_round(1, plan(), noise=False)
    std = CLIP / 6  # z C over the public batch
    for noisy, clean, step in ((upload, quiet_upload, STEP), (state.personal, quiet.personal, 3 * STEP)):
        # 256 draws: a standard error of 4.4 %; 5 of them
        assert float(((noisy - clean) / step).std()) == pytest.approx(std, rel=0.22)
    whole = torch.cat([quiet_upload / STEP, quiet.personal / (3 * STEP)])
    bad_upload, bad = local_round(1, plan(), noise=False, bad=True)
    rest = torch.cat([bad_upload / STEP, bad.personal / (3 * STEP)])
    assert 0 < float((whole - rest).norm()) <= CLIP / 6 * (1 + 1e-4)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_trusted_server_gets_the_global_half(arithmetic: Arithmetic):
    upload, state = local_round(1, plan(trusts_server=True, arithmetic=arithmetic), noise=False)
    assert upload.shape == START.shape
    factor = STEP if arithmetic == "float" else 2**20 / CLIP
    quiet, _ = local_round(1, plan(arithmetic=arithmetic), noise=False)
    torch.testing.assert_close(upload / factor, quiet.double() * 6 / STEP, rtol=1e-3, atol=1e-5)
    assert float(state.personal.norm()) > 0


def test_an_optimizer_remembers_both_halves():
    _, state = local_round(2, plan(), optimizer="adam")
    training = LocalTraining(
        local_steps=1,
        sampling_rate=1.0,
        global_learning_rate=1.0,
        local_learning_rate=1.0,
        optimizer=Optimizer(name="adam", momentum=0.9),
        prompts=2,
    )
    shapes = training.release_memory_shapes(*START.shape)
    assert {name: tuple(value.shape) for name, value in state.release_memory.items()} == {
        n: s for n, (s, _) in shapes.items()
    }
    assert (2 * N_CTX, START.shape[1]) in [shape for shape, _ in shapes.values()]

"""The local method on a linear tower: what is released, when, and how the prompts move afterwards."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.pruning import KEEP_ALL
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.rows import Batches, per_example_gradients
from fl_dualpriv.methods.lowrank import tangent_projection
from fl_dualpriv.privacy.clipping import clipped_sum
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, poisson_sample
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.towers.plain import FunctionTower

N_CTX, CTX_DIM, RANK, N_CLS, EMBED, RECORDS = 5, 6, 2, 3, 4, 40
SCALE = 10.0
ROW_BYTES = 1000
GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(N_CLS * EMBED, N_CTX * CTX_DIM, generator=GENERATOR) / 5
START = torch.randn(N_CTX, CTX_DIM, generator=GENERATOR)
DATA = ClientData(
    features=torch.nn.functional.normalize(torch.randn(RECORDS, EMBED, generator=GENERATOR), dim=1),
    labels=torch.arange(RECORDS) % N_CLS,
)
TRAINING = LocalTraining(
    local_steps=3,
    sampling_rate=0.3,
    global_learning_rate=0.5,
    local_learning_rate=0.25,
)
PLAN = RecordLevelPlan(
    clip_norm=0.8, noise_multiplier=1.3, sampling_rate=0.3, releases=3, delta=1e-5, trusts_server=False, personal=True
)


def features_of(prompt: Tensor) -> Tensor:
    """Class features: a fixed linear map of the prompt, on the sphere."""
    return torch.nn.functional.normalize((MAP @ prompt.reshape(-1)).reshape(N_CLS, EMBED), dim=-1)


TOWER = FunctionTower(features_of, bytes_per_row=ROW_BYTES)
OBJECTIVE = Classification(tower=TOWER, logit_scale=SCALE, top_m=0, noise_space="prompt", workspace_bytes=7 * ROW_BYTES)


class Half:
    """Zero noise; and a batch of all records at rates above one half, of none below."""

    reproducible = True

    def uniforms(self, count: int) -> np.ndarray:
        return np.full(count, 0.5)


def keyed(purpose: str, step: int) -> RandomSource:
    return KeyedRandom(StreamKey(seed=5, purpose=purpose, step=step))


def silent(purpose: str, step: int) -> RandomSource:
    """Keyed batches, no noise."""
    return keyed(purpose, step) if purpose == "batch" else Half()


@dataclass
class Calls:
    """Order of draws."""

    inner: Callable[[str, int], RandomSource] = keyed
    seen: list[tuple[str, int]] = field(default_factory=list)

    def random(self, purpose: str, step: int) -> RandomSource:
        self.seen.append((purpose, step))
        return self.inner(purpose, step)


def run(method: str = "dpfpl", plan: RecordLevelPlan | None = PLAN, **changes: Any) -> tuple[Tensor, PersonalState]:
    calls = changes.pop("calls", Calls())
    participant = Participant(
        partition=0,
        state=changes.pop("state", fresh_state(N_CTX, CTX_DIM, RANK)),
        data=changes.pop("data", DATA),
        random=changes.pop("random", calls.random),
    )
    arguments: dict[str, Any] = {
        "global_prompt": START,
        "participants": [participant],
        "objective": OBJECTIVE,
        "method": METHODS[method],
        "training": TRAINING,
        "plan": plan,
    }
    arguments |= changes
    if plan is not None:
        event = plan.event("run", 1, arguments["training"].local_steps)
        arguments["participants"] = [replace(p, event=event) for p in arguments["participants"]]
    (result,) = cohort_update(**arguments)
    return result


ONE_STEP = replace(TRAINING, local_steps=1)
TRUSTING = replace(PLAN, trusts_server=True, releases=1)


def clean_sum(step: int = 0, prompt: Tensor = START, data: ClientData = DATA) -> Tensor:
    batch = torch.from_numpy(poisson_sample(keyed("batch", step), data.num_examples, 0.3))
    batches = Batches.of((data.features[batch], data.labels[batch]))
    rows = per_example_gradients(TOWER(prompt[None]), batches, SCALE, workspace_bytes=10**9)
    return clipped_sum(rows[0], PLAN.clip_norm).value


# --- releases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpfpl", "promptfl", "local-only", "lowrank", "full"])
def test_each_step_is_one_batch_and_one_noise(method: str):
    calls = Calls()
    run(method, calls=calls)
    assert calls.seen == [(what, step) for step in range(3) for what in ("batch", "noise")]


def test_without_a_plan_there_is_no_noise():
    calls = Calls()
    run(plan=None, calls=calls)
    assert calls.seen == [("batch", step) for step in range(3)]


@pytest.mark.parametrize("rate", [0.3, 1e-12], ids=["some records", "no record"])
def test_noise_has_std_z_times_c_over_the_public_batch(rate: float):
    training = replace(ONE_STEP, sampling_rate=rate, global_learning_rate=1.0)
    draws = []
    for seed in range(300):

        def random(purpose: str, step: int, seed: int = seed) -> RandomSource:
            # the same batch every time: what varies is the noise
            return KeyedRandom(StreamKey(seed=5 if purpose == "batch" else seed, purpose=purpose, step=step))

        draws.append(run("promptfl", training=training, random=random)[0] * rate * RECORDS)
    noise = torch.stack(draws) - torch.stack(draws).mean(dim=0)
    # 300 x 30 draws: the standard error of the deviation is 1/sqrt(18000) = 0.75 %; 5 of them
    assert float(noise.std()) == pytest.approx(1.3 * 0.8, rel=0.04)
    assert float(torch.stack(draws).mean(dim=0).norm()) < (0.5 if rate < 1e-6 else math.inf)


def test_the_divisor_is_the_public_expected_batch():
    training = replace(ONE_STEP, global_learning_rate=1.0)
    upload, _ = run("promptfl", training=training, random=silent)
    # float32 steps of size below 1
    torch.testing.assert_close(upload, (-clean_sum() / (0.3 * RECORDS)).float(), atol=1e-6, rtol=1e-5)


def test_without_a_plan_the_step_is_the_plain_gradient():
    batch = torch.from_numpy(poisson_sample(keyed("batch", 0), RECORDS, 0.3))
    prompt = START.clone().requires_grad_(True)
    logits = SCALE * DATA.features[batch] @ features_of(prompt).T
    torch.nn.functional.cross_entropy(logits, DATA.labels[batch], reduction="sum").backward()
    upload, _ = run("promptfl", plan=None, training=replace(ONE_STEP, global_learning_rate=1.0))
    assert prompt.grad is not None
    torch.testing.assert_close(upload, -prompt.grad / (0.3 * RECORDS), atol=1e-6, rtol=1e-5)


def test_one_record_moves_the_release_by_at_most_the_clip_norm():
    def released(data: ClientData) -> Tensor:
        training = replace(ONE_STEP, sampling_rate=1.0, global_learning_rate=1.0)
        plan = replace(TRUSTING, personal=False)
        return run("promptfl", plan=plan, training=training, data=data)[0]

    whole = released(DATA)
    for gone in (0, 17, RECORDS - 1):
        keep = torch.arange(RECORDS) != gone
        rest = released(replace(DATA, features=DATA.features[keep], labels=DATA.labels[keep]))
        # float32 gradients: rounding of the others is far below 1e-4
        assert float(torch.linalg.vector_norm(whole - rest)) <= 0.8 + 1e-4


def test_a_nan_record_is_a_zero_and_touches_nobody():
    features = DATA.features.clone()
    features[3] = math.nan
    with_bad = replace(DATA, features=features)
    keep = torch.arange(RECORDS) != 3
    rest = replace(DATA, features=DATA.features[keep], labels=DATA.labels[keep])
    plan = replace(TRUSTING, personal=False)
    training = replace(ONE_STEP, sampling_rate=1.0)
    one, two = (run("promptfl", plan=plan, training=training, data=data)[0] for data in (with_bad, rest))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_a_nan_record_does_not_poison_the_prompts_without_a_record_level_plan():
    features = DATA.features.clone()
    features[3] = math.nan
    upload, state = run(plan=None, training=replace(ONE_STEP, sampling_rate=1.0), data=replace(DATA, features=features))
    assert torch.isfinite(upload).all()
    assert torch.isfinite(state.personal).all()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_microbatches_change_nothing(rows: int):
    expected, _ = run(random=silent)
    upload, _ = run(random=silent, objective=replace(OBJECTIVE, workspace_bytes=rows * ROW_BYTES))
    torch.testing.assert_close(upload, expected, atol=1e-6, rtol=1e-5)


# --- trusted server ---------------------------------------------------------------------------------------------------


def test_with_a_trusted_server_the_upload_is_the_clean_clipped_sum():
    upload, _ = run(plan=TRUSTING, training=ONE_STEP)
    assert upload.dtype == torch.float64
    torch.testing.assert_close(upload, -0.5 * clean_sum(), atol=1e-9, rtol=1e-9)


def test_with_a_trusted_server_the_personal_prompt_moves_by_a_noised_copy():
    training = replace(ONE_STEP, local_learning_rate=1.0)
    draws = []
    for seed in range(300):

        def random(purpose: str, step: int, seed: int = seed) -> RandomSource:
            return KeyedRandom(StreamKey(seed=5 if purpose == "batch" else seed, purpose=purpose, step=step))

        draws.append(run("full", plan=TRUSTING, training=training, random=random)[1].personal)
    stack = torch.stack(draws).double() * 0.3 * RECORDS
    # sqrt(2) z, since the server makes a second view of the same sum; standard error 0.75 %, 5 of them
    assert float((stack - stack.mean(dim=0)).std()) == pytest.approx(math.sqrt(2) * 1.3 * 0.8, rel=0.04)
    # the mean of 300 draws of std 1.47: 0.085 per entry, 6 of them
    assert float((stack.mean(dim=0) + clean_sum()).abs().max()) < 0.51


def test_promptfl_with_a_trusted_server_releases_nothing_locally():
    calls = Calls()
    before = fresh_state(N_CTX, CTX_DIM, RANK)
    upload, state = run("promptfl", plan=replace(TRUSTING, personal=False), training=ONE_STEP, calls=calls)
    assert "noise" not in {what for what, _ in calls.seen}
    assert torch.equal(state.personal, before.personal)
    torch.testing.assert_close(upload, -0.5 * clean_sum(), atol=1e-9, rtol=1e-9)


# --- parts of the methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, None], ids=["private", "plain"])
def test_local_only_uploads_zero(plan: RecordLevelPlan | None):
    upload, state = run("local-only", plan=plan)
    assert torch.equal(upload, torch.zeros_like(upload))
    assert bool(state.personal.any())


@pytest.mark.parametrize("plan", [PLAN, None], ids=["private", "plain"])
def test_promptfl_has_no_personal_prompt(plan: RecordLevelPlan | None):
    upload, state = run("promptfl", plan=plan)
    assert not state.personal.any()
    assert bool(upload.any())


def steps_of(method: str, count: int = 6) -> list[PersonalState]:
    states = [fresh_state(N_CTX, CTX_DIM, RANK)]
    for i in range(count):

        def random(purpose: str, step: int, i: int = i) -> RandomSource:
            return keyed(f"{purpose}-{i}", step)

        states.append(run(method, training=ONE_STEP, state=states[-1], random=random)[1])
    return states


def rank_of(matrix: Tensor) -> int:
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-5 * values[0]).sum())  # float32 leaves about 1e-7


def test_lowrank_keeps_rank_k_after_every_step():
    assert [rank_of(state.personal) for state in steps_of("lowrank")[1:]] == [RANK] * 6


def test_dpfpl_keeps_a_residual_beyond_rank_k():
    assert rank_of(steps_of("dpfpl")[-1].personal) > RANK


def test_full_moves_freely():
    one = steps_of("full")[1]
    assert rank_of(one.personal) == N_CTX  # noise of full rank, unprojected
    assert torch.equal(one.row_basis, fresh_state(N_CTX, CTX_DIM, RANK).row_basis)


def test_the_dpfpl_move_lies_in_the_tangent_space():
    states = steps_of("dpfpl")
    for before, after in itertools.pairwise(states[1:]):
        u, _ = torch.linalg.qr(before.personal @ before.row_basis.T)  # "Factorize": one power iteration from the last v
        move, v = after.personal - before.personal, after.row_basis
        torch.testing.assert_close(tangent_projection(move, u, v), move, atol=1e-5, rtol=1e-4)
        # the space is a proper one: the full method's move does not lie in it
        free = torch.eye(N_CTX, CTX_DIM)
        assert float((tangent_projection(free, u, v) - free).norm()) > 0.1


def test_the_gradient_is_taken_at_the_effective_prompt():
    state = steps_of("dpfpl", 2)[-1]
    plan = replace(TRUSTING, personal=True)
    upload, _ = run(plan=plan, training=ONE_STEP, state=state)
    torch.testing.assert_close(upload, -0.5 * clean_sum(prompt=START + state.personal), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 5), (0.9, 5), (0.5, 3), (0.41, 3), (0.4, 2), (0.2, 1), (0.01, 1)])
def test_update_pruning_moves_exactly_the_kept_rows(ratio: float, kept: int):
    upload, state = run("full", training=replace(ONE_STEP, pruning=replace(KEEP_ALL, keep_ratio=ratio)))
    assert int(upload.any(dim=1).sum()) == kept  # ceil(ratio * 5)
    assert torch.equal(upload.any(dim=1), state.personal.any(dim=1))


def test_the_round_leaves_its_arguments_alone():
    start, state = START.clone(), fresh_state(N_CTX, CTX_DIM, RANK)
    run(state=state)
    assert torch.equal(start, START)
    assert not state.personal.any()

"""Break each guarantee on purpose: the check that stands for it must notice.

Each test plants one of the field's classic mistakes and shows that the statistic used in the guarantee tests
(sensitivity, noise scale, per-example rows) tells the broken form from ours.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from clients.dualpriv import LocalTraining, Participant, cohort_update
from fl_dualpriv.client import ClientData, fresh_state
from fl_dualpriv.methods import METHODS
from fl_dualpriv.privacy.clipping import clipped_sum
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.per_example import Batches, per_example_gradients
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.prompts.plain_tower import FunctionTower

N_CTX, CTX_DIM, N_CLS, EMBED = 4, 16, 5, 8
WEIGHT = torch.randn(N_CLS * EMBED, N_CTX * CTX_DIM, generator=torch.Generator().manual_seed(0))


def class_features(prompt: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize((WEIGHT @ prompt.flatten()).reshape(N_CLS, EMBED), dim=1)


def records(n: int) -> ClientData:
    g = torch.Generator().manual_seed(1)
    features = torch.nn.functional.normalize(torch.randn(n, EMBED, generator=g), dim=1)
    labels = torch.randint(0, N_CLS, (n,), generator=g)
    return ClientData(features=features, labels=labels)


PLAN = RecordLevelPlan(
    clip_norm=0.5,
    noise_multiplier=1.4,
    sampling_rate=0.2,
    releases=1,
    delta=1e-4,
    trusts_server=False,
    personal=False,
)
START = 0.1 * torch.randn(N_CTX, CTX_DIM, generator=torch.Generator().manual_seed(2))


def one_step(data: ClientData, seed: int, rate: float) -> torch.Tensor:
    """The gradient that one private step of promptfl applies, times the expected batch: clipped sum + noise."""

    def random(purpose: str, step: int) -> RandomSource:
        return KeyedRandom(StreamKey(seed=seed, purpose=purpose, step=step))

    training = LocalTraining(
        local_steps=1,
        sampling_rate=rate,
        global_learning_rate=1.0,
        local_learning_rate=1.0,
        update_keep_ratio=1.0,
        top_m=0,
        noise_space="prompt",
        workspace_bytes=2**20,
    )
    ((upload, _),) = cohort_update(
        global_prompt=START,
        participants=[Participant(partition=0, state=fresh_state(N_CTX, CTX_DIM, 2), data=data, random=random)],
        tower=FunctionTower(class_features),
        logit_scale=20.0,
        parts=METHODS["promptfl"],
        training=training,
        plan=PLAN,
    )
    return -upload.double() * rate * data.num_examples


def noise_of(step_sum: torch.Tensor, clean: torch.Tensor) -> np.ndarray:
    return (step_sum - clean).flatten().numpy()


def test_the_step_releases_the_clipped_sum_plus_noise_of_z_times_c() -> None:
    data = records(40)
    batches = Batches.of((data.features, data.labels))
    rows = per_example_gradients(FunctionTower(class_features)(START[None]), batches, 20.0, workspace_bytes=2**20)
    clean = clipped_sum(rows[0], PLAN.clip_norm).value  # at rate 1 the batch is everybody
    draws = np.concatenate([noise_of(one_step(data, seed, 1.0), clean) for seed in range(60)])
    # 60 x 64 draws; KS accepts z·C = 0.7 and rejects both neighbours of it.
    assert stats.kstest(draws / 0.7, "norm").pvalue > 1e-5
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws / (0.7 * wrong), "norm").pvalue < 1e-5


def test_an_empty_batch_still_releases_the_same_noise() -> None:
    data = records(40)
    nobody = ClientData(features=data.features[:0], labels=data.labels[:0])
    # With nobody there, the public divisor would be zero: take forty records that never join.
    draws = []
    for seed in range(60):
        upload = one_step(data, seed, 1e-9)
        draws.append(upload.flatten().numpy())
    assert stats.kstest(np.concatenate(draws) / 0.7, "norm").pvalue > 1e-5
    assert nobody.num_examples == 0


def test_clipping_the_batch_mean_breaks_the_sensitivity_that_ours_keeps() -> None:
    """DP-FPL's published clip: the mean is clipped, the noise is scaled as if every record had been."""

    def batch_clip(rows: torch.Tensor, bound: float) -> torch.Tensor:
        mean = rows.mean(0)
        return mean * min(1.0, bound / float(mean.norm())) * len(rows)

    rows = torch.cat([torch.full((31, 4), 0.01), torch.tensor([[1e4, 0.0, 0.0, 0.0]])])
    ours = clipped_sum(rows, 1.0).value - clipped_sum(rows[:-1], 1.0).value
    published = batch_clip(rows, 1.0) - batch_clip(rows[:-1], 1.0)
    assert float(ours.norm()) <= 1.0
    assert float(published.norm()) > 10.0  # what noise of scale C/B would have to hide


def test_dividing_by_the_realised_batch_moves_with_a_record_that_ours_does_not() -> None:
    rows = torch.zeros(10, 4)
    rows[:, 0] = 1.0
    public, realised = 10.0, float(len(rows) - 1)
    moved_public = (clipped_sum(rows, 1.0).value / public - clipped_sum(rows[1:], 1.0).value / public).norm()
    moved_realised = (clipped_sum(rows, 1.0).value / 10 - clipped_sum(rows[1:], 1.0).value / realised).norm()
    assert float(moved_public) == pytest.approx(0.1)  # C / public count
    assert float(moved_realised) == pytest.approx(0.0)  # the count itself is then released without noise
    assert realised != public


def test_reused_noise_is_noticed() -> None:
    data = records(10)
    first, again = one_step(data, 5, 1e-9), one_step(data, 5, 1e-9)
    other = one_step(data, 6, 1e-9)
    assert torch.equal(first, again)  # the same key is the same noise: a run must never use one twice
    correlation = float((first * other).sum() / (first.norm() * other.norm()))
    assert abs(correlation) < 6 / math.sqrt(N_CTX * CTX_DIM)


def test_every_stream_of_a_run_has_its_own_key() -> None:
    """Ten clients, three rounds, three steps, noise and batches: no two requests share a key."""
    keys = [
        StreamKey(seed=0, purpose=purpose, partition=p, server_round=r, step=s)
        for purpose in ("noise", "batch")
        for p in range(10)
        for r in range(1, 4)
        for s in range(3)
    ]
    firsts = {tuple(KeyedRandom(key).uniforms(2)) for key in keys}
    assert len(firsts) == len(keys) == 180

"""The paper's formulas, by hand: batch clip, noise on u and v, /10. Its ε is nominal, and a test shows why."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.published_step import PublishedTraining, _clip_batch, published_updates
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import Participant
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.rows import Batches, summed_gradient
from fl_dualpriv.methods.lowrank import subspace_bases, tangent_projection
from fl_dualpriv.methods.published import CLIP, nominal_sigma
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, gaussian_noise
from fl_dualpriv.towers.plain import FunctionTower

GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(6, 12, generator=GENERATOR) / 3
START = torch.randn(3, 4, generator=GENERATOR)
DATA = ClientData(
    features=torch.nn.functional.normalize(torch.randn(12, 2, generator=GENERATOR), dim=1),
    labels=torch.arange(12) % 3,
)
TRAINING = PublishedTraining(local_steps=1, batch_size=4, global_learning_rate=0.5, local_learning_rate=2.0, sigma=0.0)


def features_of(prompt: Tensor) -> Tensor:
    return torch.nn.functional.normalize((MAP @ prompt.reshape(-1)).reshape(3, 2), dim=-1)


TOWER = FunctionTower(features_of)


def summed(records: Tensor) -> Tensor:
    """Gradient of the summed loss of some records at the start."""
    batches = Batches.of((DATA.features[records], DATA.labels[records]))
    return summed_gradient(TOWER(START[None]), batches, 5.0)[0]


def run(
    training: PublishedTraining, seed: int = 0, data: ClientData = DATA, scale: float = 5.0
) -> tuple[Tensor, PersonalState]:
    def random(purpose: str, step: int) -> RandomSource:
        # one shuffle for all seeds: what varies is the noise
        return KeyedRandom(StreamKey(seed=0 if purpose == "shuffle" else seed, purpose=purpose, step=step))

    participant = Participant(partition=0, state=fresh_state(3, 4, 1), data=data, random=random)
    (result,) = published_updates(
        global_prompt=START,
        participants=[participant],
        tower=TOWER,
        logit_scale=scale,
        training=lambda participant: training,
    )
    return result


def batch(step: int, size: int = 4) -> Tensor:
    order = np.argsort(KeyedRandom(StreamKey(seed=0, purpose="shuffle")).uniforms(12))
    return torch.from_numpy(order[step * size : (step + 1) * size])


def test_sigma_by_hand():
    # T = 50, delta = e^-10: sqrt(50 * 10) / 2
    assert nominal_sigma(2.0, math.exp(-10), 50) == pytest.approx(math.sqrt(500) / 2)


def test_one_step_without_noise():
    upload, state = run(TRAINING)
    picked = batch(0)
    mean = summed(picked) / 4
    torch.testing.assert_close(upload, -0.5 * mean)  # norm far below C: not clipped
    u, v = subspace_bases(mean, fresh_state(3, 4, 1).row_basis)
    torch.testing.assert_close(state.personal, -2.0 / 10 * tangent_projection(mean, u, v))  # / 10 as in their code


def test_an_epoch_sees_every_record_once():
    # with a frozen prompt the three batches' mean gradients add up to the whole mean, times 3
    upload, _ = run(replace(TRAINING, local_steps=3, global_learning_rate=1e-4, local_learning_rate=0.0))
    whole = summed(torch.arange(12)) / 4
    torch.testing.assert_close(upload / -1e-4, whole, atol=2e-3, rtol=1e-2)


def test_a_batch_larger_than_the_data_is_the_data():
    one, _ = run(replace(TRAINING, batch_size=12))
    two, _ = run(replace(TRAINING, batch_size=100))
    assert torch.equal(one, two)


def test_the_noise_on_u_and_v_has_std_sigma_c_over_b():
    sigma = 3.0
    training = replace(TRAINING, sigma=sigma, local_learning_rate=10.0)  # cancels the / 10
    clean = run(replace(training, sigma=0.0))[1].personal
    picked = batch(0)
    mean = summed(picked) / 4
    u, v = subspace_bases(mean, fresh_state(3, 4, 1).row_basis)
    moves = torch.stack([clean - run(training, seed)[1].personal for seed in range(1500)])
    # move = e_u v + u e_v - u (u' e_u) v, with e_u (3, 1) and e_v (1, 4) of std s = sigma C / B. Along v outside u
    # (2 entries of e_u) and along u (4 entries of e_v, less the coupling) every direction has std s:
    std = sigma * CLIP / 4
    across = (moves @ v.T).squeeze(-1) - (moves @ v.T).squeeze(-1) @ u * u.T  # e_u outside u
    assert float(across.pow(2).sum(dim=1).mean().sqrt()) == pytest.approx(math.sqrt(2) * std, rel=0.06)
    along = torch.einsum("xi,nij->nj", u.T, moves)
    outside = along - (along @ v.T) * v  # e_v outside v: 3 entries
    assert float(outside.pow(2).sum(dim=1).mean().sqrt()) == pytest.approx(math.sqrt(3) * std, rel=0.06)
    # 1500 draws: the standard error of a root mean square of k normals is 1/sqrt(2 * 1500 * k) <= 1.3 %; over 4 of them


def test_the_upload_is_clean():
    assert torch.equal(run(TRAINING)[0], run(replace(TRAINING, sigma=5.0))[0])


def test_the_clip_is_of_the_batch():
    matrix = torch.tensor([[30.0, 40.0]])  # norm 50
    torch.testing.assert_close(_clip_batch(matrix), torch.tensor([[6.0, 8.0]]))
    small = torch.tensor([[3.0, 4.0]])
    assert torch.equal(_clip_batch(small), small)
    assert torch.equal(_clip_batch(torch.zeros(1, 2)), torch.zeros(1, 2))


def test_one_record_moves_the_published_gradient_by_more_than_its_noise_assumes():
    # Batch 4, noise scaled to C/B = 2.5. With a large logit scale one record turns a clipped mean by far more.
    scale = 2000.0
    picked = batch(0)
    before, _ = run(replace(TRAINING, global_learning_rate=1.0), scale=scale)
    moved = 0.0
    for record in picked.tolist():
        for label in range(3):
            labels = DATA.labels.clone()
            labels[record] = label
            after, _ = run(replace(TRAINING, global_learning_rate=1.0), data=replace(DATA, labels=labels), scale=scale)
            moved = max(moved, float(torch.linalg.vector_norm(after - before)))
    assert moved > 2 * CLIP / 4


def test_clients_in_step_get_what_each_gets_alone():
    def participant(partition: int) -> Participant:
        size = (12, 5, 9)[partition]
        return Participant(
            partition=partition,
            state=fresh_state(3, 4, 1),
            data=ClientData(features=DATA.features[:size], labels=DATA.labels[:size]),
            random=lambda purpose, step: KeyedRandom(
                StreamKey(seed=0, purpose=purpose, partition=partition, step=step)
            ),
        )

    def training(participant: Participant) -> PublishedTraining:
        size = participant.data.num_examples // 3
        return replace(TRAINING, local_steps=3, batch_size=size, sigma=0.1)

    def updates(*partitions: int) -> list[tuple[Tensor, PersonalState]]:
        return published_updates(
            global_prompt=START,
            participants=[participant(p) for p in partitions],
            tower=TOWER,
            logit_scale=5.0,
            training=training,
        )

    together = updates(1, 0, 2)
    for (upload, state), p in zip(together, (1, 0, 2), strict=True):
        ((alone, own),) = updates(p)
        assert torch.equal(upload, alone)  # `FunctionTower` runs each prompt by itself, the rest are sums per client
        assert torch.equal(state.personal, own.personal)


# --- the authors' code (commit 5191961), by a slow form written from its description ---------------------------------


def orthonormal_columns(matrix: Tensor) -> Tensor:
    """Gram-Schmidt, column by column."""
    columns: list[Tensor] = []
    for column in matrix.unbind(dim=1):
        for earlier in columns:
            column = column - (earlier @ column) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def as_code(start: Tensor, gradient: Tensor, fresh: Tensor, noise: tuple[Tensor, Tensor], rate: float) -> Tensor:
    """Move p_L once: factors from scratch, clip, noise, the projection added and not subtracted, a tenth."""
    u = orthonormal_columns(start @ fresh.T)
    v = orthonormal_columns(start.T @ u).T
    grad_u, grad_v = gradient @ v.T, u.T @ gradient
    if any(part.any() for part in noise):
        grad_u, grad_v = (
            g * min(1.0, CLIP / float(g.norm())) + e for g, e in zip((grad_u, grad_v), noise, strict=True)
        )
    inner = (grad_u / 10) @ v
    return start - rate * (inner + u @ (grad_v / 10) + u @ (u.T @ inner))


@pytest.mark.parametrize("sigma", [0.0, 3.0])
@pytest.mark.parametrize("scale", [5.0, 500.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_of_the_code_equals_its_slow_form(sigma: float, scale: float, seed: int):
    start = 0.02 * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    training = replace(TRAINING, sigma=sigma, start=start)
    upload, state = run(training, seed, scale=scale)
    picked = batch(0)
    batches = Batches.of((DATA.features[picked], DATA.labels[picked]))
    mean = summed_gradient(TOWER((START + start)[None]), batches, scale)[0] / 4

    def normal(purpose: str, shape: tuple[int, int], std: float) -> Tensor:
        return gaussian_noise(KeyedRandom(StreamKey(seed=seed, purpose=purpose, step=0)), shape, std).float()

    std = sigma * CLIP / 4
    noise = (normal("noise-u", (3, 1), std), normal("noise-v", (1, 4), std)) if sigma else (torch.zeros(1),) * 2
    expected = as_code(start, mean, normal("factorise", (1, 4), 1.0), noise, 2.0)
    largest = float(expected.abs().max())
    torch.testing.assert_close(state.personal, expected, rtol=0, atol=1e-6 * max(1.0, largest))
    clipped = mean * min(1.0, CLIP / float(mean.norm())) if sigma else mean
    torch.testing.assert_close(upload, -0.5 * clipped, rtol=0, atol=1e-6 * max(1.0, float(mean.abs().max())))


def test_the_code_and_the_paper_differ():
    start = 0.02 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    code = run(replace(TRAINING, start=start))[1].personal
    paper = run(TRAINING)[1].personal
    assert not torch.allclose(code - start, paper, rtol=1e-2)

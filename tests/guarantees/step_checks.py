"""What must hold of clients' local steps, checked on the code that runs; called by tests here and on broken code.

Noise is read off as the spread of many clients that hold the same records: their clean sums are one, so whatever
differs between them is noise, and no second computation of the sum has to be trusted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import fl_dualpriv.client.round
import fl_dualpriv.client.step
import fl_dualpriv.privacy.step
from fl_dualpriv.client.optimizers import SGD, Optimizer
from fl_dualpriv.client.personalisation import Personalisation
from fl_dualpriv.client.pruning import KEEP_ALL, UpdatePruning
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.rows import Batches, per_example_gradients
from fl_dualpriv.privacy import noise
from fl_dualpriv.privacy.clipping import Arithmetic, clipped_sum
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.release import release
from fl_dualpriv.towers.base import PromptTower
from fl_dualpriv.towers.plain import FunctionTower
from tests.made_strategy import Silent

N_CTX, CTX_DIM, N_CLS, EMBED = 4, 64, 5, 8
CLIP, MULTIPLIER, SCALE = 0.5, 1.4, 20.0
CLIENTS = 60
WEIGHT = torch.randn(N_CLS * EMBED, N_CTX * CTX_DIM, generator=torch.Generator().manual_seed(0))
START = 0.1 * torch.randn(N_CTX, CTX_DIM, generator=torch.Generator().manual_seed(1))

NoiseSpace = Literal["prompt", "feature"]
Source = Callable[[int, str, int], RandomSource]
"""(partition, purpose, step) → its stream."""


def class_features(prompt: Tensor) -> Tensor:
    return torch.nn.functional.normalize((WEIGHT @ prompt.flatten()).reshape(N_CLS, EMBED), dim=1)


TOWER = FunctionTower(class_features)
# Class features are the rows of the prompt: what comes out is the sum over class features, whichever noise space.
IDENTITY = FunctionTower(lambda prompt: prompt)


def records(seed: int, count: int = 40) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, EMBED, generator=g), dim=1)
    return ClientData(features=features, labels=torch.randint(0, N_CLS, (count,), generator=g))


def as_a_client_draws(server_round: int = 1, seed: int = 0, randomness: str = "seeded") -> Source:
    """The streams that a run gives its clients."""
    return lambda partition, purpose, step: fl_dualpriv.client.round._stream(
        noise.random_sources(randomness), seed, partition, server_round, purpose, step
    )


def without_noise(source: Source) -> Source:
    return lambda partition, purpose, step: Silent() if purpose == "noise" else source(partition, purpose, step)


def local_round(
    data: Sequence[ClientData],
    source: Source,
    *,
    method: str = "promptfl",
    rate: float = 1.0,
    steps: int = 1,
    tower: PromptTower = TOWER,
    start: Tensor = START,
    noise_space: NoiseSpace = "prompt",
    pruning: UpdatePruning = KEEP_ALL,
    optimizer: Optimizer = SGD,
    trusts_server: bool = False,
    arithmetic: Arithmetic = "float",
    states: Sequence[PersonalState] | None = None,
    personalisation: Personalisation | None = None,
    personal_is_given: bool = False,
    private: bool = True,
) -> list[tuple[Tensor, PersonalState]]:
    """One round of clients that step together, with step size 1; from fresh states if none are given."""
    training = fl_dualpriv.client.step.LocalTraining(
        local_steps=steps,
        sampling_rate=rate,
        global_learning_rate=1.0,
        local_learning_rate=1.0,
        pruning=pruning,
        optimizer=optimizer,
        personalisation=personalisation,
        personal_is_given=personal_is_given,
    )
    plan = RecordLevelPlan(
        clip_norm=CLIP,
        noise_multiplier=MULTIPLIER,
        sampling_rate=rate,
        releases=steps,
        delta=1e-4,
        trusts_server=trusts_server,
        personal=METHODS[method].personal,
        arithmetic=arithmetic,
    )

    def participant(partition: int, own: ClientData) -> fl_dualpriv.client.step.Participant:
        def random(purpose: str, step: int) -> RandomSource:
            return source(partition, purpose, step)

        n_ctx, ctx_dim = start.shape
        state = fresh_state(n_ctx, ctx_dim, 2) if states is None else states[partition]
        event = plan.event("run", 1, steps) if private else None
        return fl_dualpriv.client.step.Participant(
            partition=partition, state=state, data=own, random=random, event=event
        )

    return fl_dualpriv.client.step.cohort_update(
        global_prompt=start,
        participants=[participant(partition, own) for partition, own in enumerate(data)],
        objective=Classification(
            tower=tower, logit_scale=SCALE, top_m=0, noise_space=noise_space, workspace_bytes=2**20
        ),
        method=METHODS[method],
        training=training,
        plan=plan if private else None,
    )


# --- sensitivity ------------------------------------------------------------------------------------------------------


def moves_by_at_most_c(
    data: ClientData,
    gone: Sequence[int],
    noise_space: NoiseSpace,
    tower: PromptTower,
    start: Tensor,
    pruning: UpdatePruning = KEEP_ALL,
) -> None:
    """What leaves without its noise, times the public divisor, moves by C at most when a record is taken out."""

    def released(own: ClientData) -> Tensor:
        ((upload, _),) = local_round(
            [own],
            without_noise(as_a_client_draws()),
            tower=tower,
            start=start,
            noise_space=noise_space,
            pruning=pruning,
        )
        return upload.double() * own.num_examples

    whole = released(data)
    for i in gone:
        keep = torch.arange(data.num_examples) != i
        rest = released(replace(data, features=data.features[keep], labels=data.labels[keep]))
        # uploads are float32: 40 records of norm C, and the rounding of a prompt near 1, are good to 1e-4 of C
        assert float((whole - rest).norm()) <= CLIP * (1 + 1e-3), f"record {i} moves the release by more than C"


def one_record_moves_a_release_by_at_most_c() -> None:
    """Also one whose gradient is longer than those of all others together."""
    data = records(1)
    moves_by_at_most_c(data, (0, 17, 39), "prompt", TOWER, START)
    loud = data.features * 1e-3
    loud[5] *= 1e3
    moves_by_at_most_c(replace(data, features=loud), (5, 6), "prompt", TOWER, START)


def one_record_moves_a_feature_release_by_at_most_c() -> None:
    start = torch.nn.functional.normalize(torch.randn(N_CLS, EMBED, generator=torch.Generator().manual_seed(2)), dim=1)
    moves_by_at_most_c(records(1), range(0, 40, 3), "feature", IDENTITY, start)


def a_bad_record_is_a_zero() -> None:
    """A record that is not finite adds nothing and spoils nothing."""
    data = records(1)
    uploads = []
    for bad in (0.0, math.nan, math.inf, -math.inf):
        features = data.features.clone()
        features[3] = bad  # a zero feature has a zero gradient
        ((upload, _),) = local_round([replace(data, features=features)], without_noise(as_a_client_draws()))
        uploads.append(upload)
    expected, *found = uploads
    assert all(torch.isfinite(upload).all() for upload in found), "one bad record spoils the release"
    # float32 steps of a prompt near 1
    assert all(torch.allclose(upload, expected, rtol=0, atol=1e-6) for upload in found), "a bad record is not a zero"


def rows_do_not_mix(tower: PromptTower, prompt: Tensor, x: Tensor, y: Tensor, top_m: int) -> None:
    """Change one record: every other row of the gradients is the same, bit by bit, and its own is not."""

    def rows(features: Tensor, labels: Tensor) -> Tensor:
        batches = Batches.of((features, labels))
        return per_example_gradients(tower(prompt[None]), batches, SCALE, workspace_bytes=2**30, top_m=top_m)[0]

    changed_x, changed_y = x.clone(), y.clone()
    changed_x[3], changed_y[3] = -x[3], (y[3] + 1) % int(y.max() + 1)
    before, after = rows(x, y), rows(changed_x, changed_y)
    others = [i for i in range(len(y)) if i != 3]
    assert torch.equal(before[others], after[others]), "one record changes the gradient of another"
    assert not torch.allclose(before[3], after[3]), "a record's gradient is not its own"


def exact_rows_do_not_mix() -> None:
    data = records(3, 7)
    rows_do_not_mix(TOWER, START, data.features, data.labels, 0)


def top_m_rows_do_not_mix() -> None:
    data = records(3, 7)
    rows_do_not_mix(TOWER, START, data.features, data.labels, 2)


# --- noise ------------------------------------------------------------------------------------------------------------


def noise_of_clients(
    source: Source,
    *,
    rate: float = 1.0,
    trusts_server: bool = False,
    noise_space: NoiseSpace = "prompt",
    arithmetic: Arithmetic = "float",
) -> np.ndarray:
    """Noise of one step of clients with the same records, times the public divisor, (client, entry).

    With a trusted server the one that moves the personal prompt.
    """
    tower, start = (IDENTITY, START) if noise_space == "feature" else (TOWER, START)
    data = records(1)
    if noise_space == "feature":  # one class a row of the prompt, as wide as the prompt
        features = torch.nn.functional.pad(data.features, (0, CTX_DIM - EMBED))
        data = ClientData(features=features, labels=data.labels % N_CTX)
    results = local_round(
        [data] * CLIENTS,
        source,
        method="full" if trusts_server else "promptfl",
        rate=rate,
        tower=tower,
        start=start,
        noise_space=noise_space,
        trusts_server=trusts_server,
        arithmetic=arithmetic,
    )
    moved = torch.stack([state.personal if trusts_server else upload for upload, state in results]).double()
    sums = -moved.flatten(1).numpy() * rate * data.num_examples
    return sums - sums.mean(axis=0)


def has_the_scale(draws: np.ndarray, scale: float) -> None:
    """Draws less the mean over clients: normal, of that scale."""
    unit = draws / (scale * math.sqrt(1 - 1 / CLIENTS))
    # 60 x 256 draws: the standard error of the deviation is 1/sqrt(2 n) = 0.57 %; 5 of them are 2.9 %.
    assert abs(unit.std() - 1) < 5 / math.sqrt(2 * unit.size), f"noise of {unit.std():.3f} times the promised scale"
    assert stats.kstest(unit.ravel(), "norm").pvalue > 1e-6, "the noise is not normal"


def noise_has_std_z_times_c() -> None:
    """A step releases the clipped sum plus N(0, z²C²)."""
    has_the_scale(noise_of_clients(as_a_client_draws()), MULTIPLIER * CLIP)


def feature_noise_has_std_z_times_c() -> None:
    has_the_scale(noise_of_clients(as_a_client_draws(), noise_space="feature"), MULTIPLIER * CLIP)


def integer_noise_has_std_z_times_c() -> None:
    has_the_scale(noise_of_clients(as_a_client_draws(), arithmetic="integer"), MULTIPLIER * CLIP)


def an_empty_batch_has_the_same_noise() -> None:
    """At 2**-40 nobody joins, and the divisor is public and not zero."""
    has_the_scale(noise_of_clients(as_a_client_draws(), rate=2.0**-40), MULTIPLIER * CLIP)


def a_trusting_client_has_sqrt_2_times_the_noise() -> None:
    has_the_scale(noise_of_clients(as_a_client_draws(), trusts_server=True), math.sqrt(2) * MULTIPLIER * CLIP)


def noise_is_fresh_for_each_client_and_round() -> None:
    """From a seed and from the operating system."""
    for randomness in ("seeded", "os"):
        one, two = (noise_of_clients(as_a_client_draws(r, randomness=randomness)) for r in (1, 2))
        # Independent draws: standard error 1/sqrt(n). Taking the mean over 60 clients out adds -1/59 between them.
        most = 6 / math.sqrt(one.shape[1]) + 1 / (CLIENTS - 1)
        assert one.std() > 0.1 * MULTIPLIER * CLIP, f"{randomness}: clients share their noise"
        correlations = np.corrcoef(one)
        np.fill_diagonal(correlations, 0)
        assert np.abs(correlations).max() < most, f"{randomness}: two clients have the same noise"
        between = float((one * two).mean() / (one.std() * two.std()))
        assert abs(between) < 6 / math.sqrt(one.size), f"{randomness}: two rounds have the same noise"


def an_integer_release_is_whole() -> None:
    """On the grid whatever the noise: then its low bits tell nothing."""
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    clean = clipped_sum(rows, CLIP, "integer")
    assert clean.grid is not None
    units = release(clean, MULTIPLIER, KeyedRandom(StreamKey(seed=0, purpose="noise"))) / clean.grid
    assert torch.equal(units, units.round()), "an integer release is not whole"


# --- sampling and divisor ---------------------------------------------------------------------------------------------

_COINS, _RATE = 24, 0.25


def lengths_by_record() -> np.ndarray:
    """How long each record's own part of each client's release is, without noise: (client, record).

    Records have orthogonal features and the class that they speak against most, and class features are the prompt: so
    record j's gradient fills column j, and clipping brings it to the norm C.
    """
    start = torch.nn.functional.normalize(torch.randn(N_CLS, _COINS, generator=torch.Generator().manual_seed(5)), dim=1)
    data = ClientData(features=torch.eye(_COINS), labels=start.argmin(dim=0))
    results = local_round([data] * 400, without_noise(as_a_client_draws()), rate=_RATE, tower=IDENTITY, start=start)
    return torch.stack([upload for upload, _ in results]).double().norm(dim=1).numpy()


def batches_are_independent_coins() -> None:
    joined = lengths_by_record() > 1e-4
    # 400 batches; standard error of each record's share sqrt(q (1 - q) / 400) = 0.022, 6 of them
    assert np.abs(joined.mean(axis=0) - _RATE).max() < 0.13, "records join at another rate"
    # Sizes are binomial with variance n q (1 - q) = 4.5, standard error 7 %; a batch of fixed size has none.
    spread = float(joined.sum(axis=1).var() / (_COINS * _RATE * (1 - _RATE)))
    assert 0.6 < spread < 1.4, f"the variance of the batch's size is {spread:.2f} times that of coins"


def the_divisor_is_the_public_expected_batch() -> None:
    """A record that joined is worth C / (q n), whoever else joined."""
    lengths = lengths_by_record()
    worth = lengths[lengths > 1e-4] / (CLIP / (_RATE * _COINS))
    assert np.abs(worth - 1).max() < 1e-3, "what a record is worth depends on who else joined"


# --- nothing but the release ------------------------------------------------------------------------------------------


def data_enter_through_the_release_alone(
    method: str, pruning: UpdatePruning, noise_space: NoiseSpace, optimizer: Optimizer = SGD
) -> None:
    """Fix what is released: then two unrelated data sets leave the same upload, personal prompt, carrier, history."""

    def run(seed: int) -> list[Tensor]:
        shape = (4, N_CTX, CTX_DIM) if noise_space == "prompt" else (4, N_CLS, EMBED)
        released = iter(torch.randn(*shape, generator=torch.Generator().manual_seed(9)).double().unbind())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fl_dualpriv.privacy.step, "release", lambda clean, plan, source: next(released))
            ((upload, state),) = local_round(
                [records(seed)],
                as_a_client_draws(),
                method=method,
                rate=0.3,
                steps=4,
                noise_space=noise_space,
                pruning=pruning,
                optimizer=optimizer,
            )
        return [upload, state.personal, state.row_basis, *state.release_memory.values()]

    first, second = run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "data pass by the release"
    assert any(bool(tensor.any()) for tensor in first[:2]), "nothing moved"


def masks_and_factors_see_the_release_alone() -> None:
    for keep_ratio in (0.5, 1.0):
        data_enter_through_the_release_alone("dpfpl", replace(KEEP_ALL, keep_ratio=keep_ratio), "prompt")

"""A million draws of every noise site, through the code that makes the release, in both arithmetics.

The clean sums are zero (no record joins a batch, every upload is zero), so what comes out is the noise. Each site must
have its scale to 0.5 %, pass Kolmogorov-Smirnov at that scale and fail it at 0.98 and 1.02 of it, and be uncorrelated
between clients, rounds, steps, rows of the prompt, and with the other sites.
"""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from scipy.special import ndtr
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.state import PersonalState, fresh_state
from fl_dualpriv.client.step import LocalTraining, Participant, cohort_update
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.towers.plain import FunctionTower
from strategies.dpfpl import DPFPL
from tests.made_strategy import made_strategy, training_messages

N_CTX, CTX_DIM = 4, 500
CLIENTS, ROUNDS = 25, 20
RECORDS, RATE = 4, 2.0**-40  # nobody joins; the public divisor is 2**-38
CLIP, MULTIPLIER = 0.7, 1.3
ARITHMETICS: tuple[Arithmetic, ...] = ("float", "integer")

DATA = ClientData(features=torch.eye(RECORDS, CTX_DIM), labels=torch.arange(RECORDS))
# Class features are the prompt's rows as they are: pulling noise back from them changes nothing.
TOWER = FunctionTower(lambda prompt: prompt)


def client_source(seed: int, partition: int, server_round: int, purpose: str, step: int) -> RandomSource:
    """As a client keys its streams."""
    return KeyedRandom(StreamKey(seed=seed, purpose=purpose, partition=partition, server_round=server_round, step=step))


def local_round(
    seed: int, server_round: int, steps: int, arithmetic: Arithmetic, method: str, *, space: str, trusts: bool
) -> list[tuple[Tensor, PersonalState]]:
    """One round of all clients, with step size 1, from prompts of zeros."""
    training = LocalTraining(
        local_steps=steps,
        sampling_rate=RATE,
        global_learning_rate=1.0,
        local_learning_rate=1.0,
    )
    plan = RecordLevelPlan(
        clip_norm=CLIP,
        noise_multiplier=MULTIPLIER,
        sampling_rate=RATE,
        releases=steps,
        delta=1e-5,
        trusts_server=trusts,
        personal=METHODS[method].personal,
        arithmetic=arithmetic,
    )
    participants = [
        Participant(
            partition=p,
            state=fresh_state(N_CTX, CTX_DIM, 2),
            data=DATA,
            random=functools.partial(client_source, seed, p, server_round),
            event=plan.event("run", 1, steps),
        )
        for p in range(CLIENTS)
    ]
    return cohort_update(
        global_prompt=torch.zeros(N_CTX, CTX_DIM),
        participants=participants,
        objective=Classification(
            tower=TOWER,
            logit_scale=10.0,
            top_m=0,
            noise_space="feature" if space == "feature" else "prompt",
            workspace_bytes=2**20,
        ),
        method=METHODS[method],
        training=training,
        plan=plan,
    )


def client_steps(seed: int, arithmetic: Arithmetic, space: str) -> np.ndarray:
    """Noise of two steps a round, over the public divisor: (round, client, step, n_ctx, ctx_dim)."""
    rounds = []
    for r in range(ROUNDS // 2):
        both, first = (
            torch.stack(
                [upload for upload, _ in local_round(seed, r, k, arithmetic, "promptfl", space=space, trusts=False)]
            ).double()
            for k in (2, 1)
        )
        rounds.append(torch.stack([first, both - first], dim=1))
    return -torch.stack(rounds).numpy() * RATE * RECORDS


def trusting_clients(seed: int, arithmetic: Arithmetic) -> np.ndarray:
    """Noise that moves personal prompts where the server adds its own: (round, client, step, n_ctx, ctx_dim)."""
    rounds = []
    for r in range(ROUNDS):
        results = local_round(seed, r, 1, arithmetic, "full", space="prompt", trusts=True)
        assert not any(upload.any() for upload, _ in results)  # the clean sum: nothing
        rounds.append(torch.stack([state.personal for _, state in results]).double())
    return -torch.stack(rounds)[:, :, None].numpy() * RATE * RECORDS


SHAPE, SERVER_ROUNDS = (100, 500), 20


def server_noise(seed: int, arithmetic: Arithmetic, privacy: ServerPrivacy) -> np.ndarray:
    """What the server adds to a sum of zeros, over the public divisor: (round, 1, 1, n_ctx, ctx_dim)."""
    masses = dict.fromkeys(range(4), 2.0)
    strategy = made_strategy(DPFPL, privacy, masses=masses, rounds=SERVER_ROUNDS, seed=seed)
    # float64: a step of float32 would round the noise, which the grid of integers would show
    start = torch.zeros(SHAPE, dtype=torch.float64)
    found = []
    for r in range(1, SERVER_ROUNDS + 1):
        replies = [
            Message(
                messages.uploads_content(messages.Uploads(partitions=p, values=torch.zeros(len(p), *SHAPE))), reply_to=m
            )
            for m in training_messages(strategy, r, start)
            for p in [messages.read_train(m).partitions]
        ]
        arrays, _ = strategy.aggregate_train(r, replies)
        assert arrays is not None
        found.append(messages.from_arrays(arrays))
    return torch.stack(found)[:, None, None].numpy() * strategy.divisor()


def trusted_server(seed: int, arithmetic: Arithmetic, folder: Path) -> np.ndarray:
    return server_noise(
        seed,
        arithmetic,
        ServerPrivacy(
            unit="record",
            bound=0.5 * CLIP,
            noise_multiplier=MULTIPLIER,
            sampling_rate=0.3,
            ledger_multiplier=1.0,
            ledger=Ledger(folder / f"record-{arithmetic}.jsonl"),
            arithmetic=arithmetic,
        ),
    )


def client_level_server(seed: int, arithmetic: Arithmetic, folder: Path) -> np.ndarray:
    return server_noise(
        seed,
        arithmetic,
        ServerPrivacy(
            unit="client",
            bound=CLIP,
            noise_multiplier=MULTIPLIER,
            sampling_rate=0.5,
            ledger_multiplier=MULTIPLIER,
            ledger=Ledger(folder / f"client-{arithmetic}.jsonl"),
            arithmetic=arithmetic,
        ),
    )


Draw = Callable[[Arithmetic, Path], np.ndarray]
# Sites of one run share its seed: client steps with a client-level server, trusting clients with their server.
SITES: dict[str, tuple[Draw, float]] = {
    "client step, prompt": (lambda a, _: client_steps(1 + 10 * (a == "integer"), a, "prompt"), MULTIPLIER * CLIP),
    "server, client level": (
        lambda a, folder: client_level_server(1 + 10 * (a == "integer"), a, folder),
        MULTIPLIER * CLIP,
    ),
    "client, trusted server": (
        lambda a, _: trusting_clients(2 + 10 * (a == "integer"), a),
        math.sqrt(2) * MULTIPLIER * CLIP,
    ),
    "server, record level": (
        lambda a, folder: trusted_server(2 + 10 * (a == "integer"), a, folder),
        MULTIPLIER * 0.5 * CLIP,
    ),
    "client step, feature": (lambda a, _: client_steps(3 + 10 * (a == "integer"), a, "feature"), MULTIPLIER * CLIP),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Arithmetic], np.ndarray]:
    """All draws of a site over its scale, made once: (round, client, step, n_ctx, ctx_dim)."""
    folder = tmp_path_factory.mktemp("ledgers")

    @functools.cache
    def draw(site: str, arithmetic: Arithmetic) -> np.ndarray:
        make, scale = SITES[site]
        return make(arithmetic, folder) / scale

    return draw


def distance(ordered: np.ndarray, scale: float) -> float:
    """Kolmogorov-Smirnov's, from N(0, scale²), of sorted draws."""
    cdf, steps = ndtr(ordered / scale), np.arange(len(ordered) + 1) / len(ordered)
    return float(max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()))


Drawn = Callable[[str, Arithmetic], np.ndarray]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("site", SITES)
def test_a_million_draws_have_the_scale_and_the_shape(drawn: Drawn, site: str, arithmetic: Arithmetic) -> None:
    draws = drawn(site, arithmetic)
    assert draws.size == 1_000_000
    # The standard error of the deviation is 0.07 %, of the mean 0.001.
    assert abs(draws.std() - 1) < 0.005
    assert abs(draws.mean()) < 0.005
    # Right, the distance exceeds 0.0027 with probability 2 exp(-2 n 0.0027²) = 1e-6. At 0.98 and 1.02 of the scale it
    # is 0.02 φ(1) = 0.0048 in the limit, with fluctuations of 0.0004 at that point.
    ordered = np.sort(draws, axis=None)
    assert distance(ordered, 1.0) < 0.0027
    for wrong in (0.98, 1.02):
        assert distance(ordered, wrong) > 0.0027


def largest_correlation(draws: np.ndarray, axis: int) -> float:
    """Between any two slices along an axis, in standard errors; of draws with std 1 and mean 0."""
    rows = np.moveaxis(draws, axis, 0).reshape(draws.shape[axis], -1)
    correlations = rows @ rows.T / math.sqrt(rows.shape[1])
    np.fill_diagonal(correlations, 0)
    return float(np.abs(correlations).max())


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("site", SITES)
def test_clients_rounds_steps_and_rows_are_uncorrelated(drawn: Drawn, site: str, arithmetic: Arithmetic) -> None:
    draws = drawn(site, arithmetic)
    assert draws.ndim == 5
    for axis in (0, 1, 2, 3):
        assert largest_correlation(draws, axis) < 5
    # The test sees a client, a round, a step or a row that repeats another one's noise.
    for axis in (0, 1, 2, 3):
        if draws.shape[axis] > 1:
            repeated = np.take(draws, [0, *range(draws.shape[axis] - 1)], axis=axis)
            assert largest_correlation(repeated, axis) > 100


def test_sites_are_uncorrelated(drawn: Drawn) -> None:
    flat = {(site, a): drawn(site, a).ravel() for site in SITES for a in ARITHMETICS}
    for one, two in itertools.combinations(flat, 2):
        assert abs(flat[one] @ flat[two]) / 1_000_000 < 5 / math.sqrt(1_000_000), (one, two)


@pytest.mark.parametrize("site", ["server, client level", "server, record level"])
def test_what_a_server_releases_is_whole_in_integers_and_not_in_floats(drawn: Drawn, site: str) -> None:
    # The divisors are 0.5 · 4 · 2 and 4 · 2, powers of two: the division is exact, and a unit can be read off.
    scale = SITES[site][1]
    unit = scale / MULTIPLIER / 2**20
    in_units = {a: drawn(site, a) * (scale / unit) for a in ARITHMETICS}
    off = {a: np.abs(x - np.round(x)).max() for a, x in in_units.items()}
    assert off["integer"] < 1e-6  # of a unit: float64's rounding of numbers up to 7e6
    assert off["float"] > 0.49

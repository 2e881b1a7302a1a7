"""What must hold of a round at the server, checked on the strategy that runs; tests call it here and on broken code."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Error, Message
from torch import Tensor

import strategies.dpfpl
from fl_dualpriv import messages
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.clipping import GRID_STEPS, Arithmetic
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, RandomSources, StreamKey
from fl_dualpriv.server.accounting import BudgetExhausted
from fl_dualpriv.server.strategy import RoundStrategy, ServerPrivacy
from tests.made_strategy import made_strategy, quiet, training_messages

SHAPE = (100, 100)
SIZES = (10, 20, 30, 40)
BOUND, MULTIPLIER = 0.7, 1.3
DELTA = 1e-5


def client_level(
    rate: float = 0.5,
    ledger: Ledger | None = None,
    max_epsilon: float | None = None,
    arithmetic: Arithmetic = "float",
) -> ServerPrivacy:
    return ServerPrivacy(
        unit="client",
        bound=BOUND,
        noise_multiplier=MULTIPLIER,
        sampling_rate=rate,
        ledger_multiplier=MULTIPLIER,
        ledger=ledger,
        max_epsilon=max_epsilon,
        delta=DELTA,
        arithmetic=arithmetic,
    )


def make(
    privacy: ServerPrivacy,
    sources: RandomSources = KeyedRandom,
    *,
    strategy_class: type[RoundStrategy] | None = None,
    sizes: Sequence[int] = SIZES,
    rounds: int = 20,
) -> RoundStrategy:
    """DP-FPL's strategy, or another, over clients that each have a node of their own, or share one if they are many."""
    cls = strategy_class or strategies.dpfpl.DPFPL
    nodes = [50 + p if len(sizes) == 4 else 50 for p in range(len(sizes))]
    return made_strategy(cls, privacy, sources, sizes=sizes, nodes=nodes, rounds=rounds)


def ask(strategy: RoundStrategy, server_round: int, shape: tuple[int, ...] = SHAPE) -> list[Message]:
    # float64: a step of float32 would round what is looked at
    return training_messages(strategy, server_round, torch.zeros(shape, dtype=torch.float64))


def one_round(strategy: RoundStrategy, uploads: Mapping[int, Tensor], server_round: int = 1, copies: int = 1) -> Tensor:
    """Ask everybody, let those answer whose upload is given and the others fail; how the prompt moved."""
    shape = tuple(next(iter(uploads.values())).shape) if uploads else SHAPE
    replies = []
    for message in ask(strategy, server_round, shape):
        (p,) = messages.read_train(message).partitions
        if p in uploads:
            content = messages.uploads_content(messages.Uploads(partitions=(p,), values=uploads[p][None]))
            replies += [Message(content, reply_to=message)] * copies
        else:
            replies.append(Message(Error(0, "failed"), reply_to=message))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return messages.from_arrays(arrays)


def orthogonal(length: float) -> dict[int, Tensor]:
    return {p: length * row.reshape(2, 2) for p, row in enumerate(torch.eye(4, dtype=torch.float64))}


# --- sensitivity and divisor ------------------------------------------------------------------------------------------


class ByTens(RoundStrategy):
    """Weights 1, 2, 3 and 4 before the clamp."""

    def weight(self, num_examples: int) -> float:
        return num_examples / 10


def moves_by_at_most_the_sensitivity(strategy_class: type[RoundStrategy] | None) -> None:
    """Uploads are far longer than the bound; who leaves moves the noiseless step by what the noise is scaled to."""
    uploads = orthogonal(100 * BOUND)

    def moved(present: Sequence[int]) -> tuple[Tensor, float]:
        strategy = make(client_level(0.75), quiet, strategy_class=strategy_class)
        return one_round(strategy, {p: uploads[p] for p in present}), strategy.sensitivity()

    whole, sensitivity = moved(range(4))
    for gone in range(4):
        rest, _ = moved([p for p in range(4) if p != gone])
        assert float((whole - rest).norm()) <= sensitivity * (1 + 1e-9), (
            f"client {gone} moves more than the noise hides"
        )


def one_client_moves_a_round_by_at_most_its_sensitivity() -> None:
    for strategy_class in (None, ByTens):
        moves_by_at_most_the_sensitivity(strategy_class)


def a_failed_client_is_zero_and_the_divisor_is_public() -> None:
    """Three of four answer with vectors of norm S: each is worth S / (q · 4), as if all had."""
    uploads = orthogonal(BOUND)
    for failed in ((), (1,), (0, 2, 3)):
        moved = one_round(make(client_level(0.75), quiet), {p: u for p, u in uploads.items() if p not in failed})
        expected = sum((u for p, u in uploads.items() if p not in failed), torch.zeros(2, 2, dtype=torch.float64)) / 3
        assert torch.allclose(moved, expected, rtol=0, atol=1e-12), (
            f"with {len(failed)} failed, the others weigh more or less"
        )


def a_reply_counts_once() -> None:
    once, twice = (one_round(make(client_level(0.75), quiet), orthogonal(BOUND), copies=copies) for copies in (1, 2))
    assert torch.equal(once, twice), "replies that come twice move the prompt twice"


def cohorts_are_independent_coins() -> None:
    strategy = make(client_level(0.25), sizes=(1,) * 24)
    joined = np.zeros((400, 24))
    for r, row in enumerate(joined):
        row[[p for message in ask(strategy, r + 1, (1, 1)) for p in messages.read_train(message).partitions]] = 1
    # standard error sqrt(q (1 - q) / 400) = 0.022, 6 of them
    assert np.abs(joined.mean(axis=0) - 0.25).max() < 0.13, "clients join at another rate"
    # Sizes are binomial with variance n q (1 - q) = 4.5, standard error 7 %; a cohort of fixed size has none.
    spread = float(joined.sum(axis=1).var() / (24 * 0.25 * 0.75))
    assert 0.6 < spread < 1.4, f"the variance of the cohort's size is {spread:.2f} times that of coins"


# --- noise ------------------------------------------------------------------------------------------------------------


def noise_of_rounds(privacy: ServerPrivacy, rounds: int) -> np.ndarray:
    """What the server adds, times the public divisor: (round, entry). Nobody's upload is anything but zeros."""
    strategy = make(privacy)
    zeros = dict.fromkeys(range(len(SIZES)), torch.zeros(SHAPE))
    moves = [one_round(strategy, zeros, r) for r in range(1, rounds + 1)]
    return torch.stack(moves).flatten(1).numpy() * strategy.divisor()


def server_noise_has_std_z_times_s() -> None:
    """Also where nobody is in the cohort, which at 2**-40 is always."""
    arithmetics: tuple[Arithmetic, ...] = ("float", "integer")
    for rate, arithmetic in itertools.product((0.5, 2.0**-40), arithmetics):
        draws = noise_of_rounds(client_level(rate, arithmetic=arithmetic), 2) / (MULTIPLIER * BOUND)
        # 20,000 draws: standard error of the deviation 0.5 %, 5 of them
        assert abs(draws.std() - 1) < 0.025, f"rate {rate:g}, {arithmetic}: {draws.std():.3f} times the promised scale"


def server_noise_is_fresh_each_round() -> None:
    one, two, three = noise_of_rounds(client_level(), 3)
    for a, b in itertools.combinations((one, two, three), 2):
        # standard error 1/sqrt(10,000), 6 of them
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06, "two rounds have the same noise"


def an_integer_round_is_whole() -> None:
    """In grid units, whatever clients sent."""
    strategy = make(client_level(arithmetic="integer"))
    uploads = {p: torch.randn(SHAPE, generator=torch.Generator().manual_seed(p)) for p in range(4)}
    units = one_round(strategy, uploads) * strategy.divisor() * GRID_STEPS / BOUND
    # The divisor is 2, so that the division is exact; one unit is far above the rounding of the products.
    assert float((units - units.round()).abs().max()) < 1e-6, "an integer release is not whole"


# --- books ------------------------------------------------------------------------------------------------------------


def a_round_is_in_the_ledger_before_its_noise(folder: Path) -> None:
    ledger = Ledger(folder / "ledger.jsonl")
    written: list[bool] = []

    def watching(key: StreamKey) -> RandomSource:
        if key.purpose == "server-noise":
            written.append(ledger.read().last_round("token") == key.server_round)
        return KeyedRandom(key)

    strategy = make(client_level(ledger=ledger), watching)
    for server_round in (1, 2):
        one_round(strategy, {}, server_round)
    assert written == [True, True], "a round's noise was asked for before the round was written down"


def no_round_starts_above_the_servers_budget(folder: Path) -> None:
    """A budget of three rounds: three are made, and the fourth is refused before anybody is asked."""
    ledger, most = Ledger(folder / "ledger.jsonl"), epsilon(0.1, MULTIPLIER, 3, DELTA) + 1e-6
    strategy = make(client_level(0.1, ledger, most), rounds=3)
    done = 0
    for server_round in range(1, 7):
        try:
            one_round(strategy, {}, server_round)
        except BudgetExhausted:
            break
        done += 1
    spent = ledger.read().epsilon(DELTA)
    assert spent <= most, f"ε of {spent:.3f} was spent, and {most:.3f} is the budget"
    assert done == 3, f"{done} rounds were made, and 3 fit"
    assert math.isclose(spent, most, abs_tol=1e-3)

"""What must hold of adaptive clipping and of correlated noise, checked on the strategy that runs them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.correlated import BandedNoise, CorrelatedNoise, RoundRobin, TreeNoise
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.noise_memory import SECRET_NOISE
from fl_dualpriv.server.strategy import RoundStrategy, Update
from tests.guarantees.server_checks import (
    BOUND,
    MULTIPLIER,
    SIZES,
    ask,
    client_level,
    make,
    one_round,
    orthogonal,
)
from tests.made_strategy import quiet

CLIENTS = len(SIZES)
BIT_NOISE, RATE = 1.5, 0.75
ETA = 0.2


def adaptive_privacy(
    start: float = BOUND, *, expected_cohort: float = RATE * CLIENTS, learning_rate: float = ETA
) -> ServerPrivacy:
    adaptive = AdaptiveClip(
        start=start,
        target_quantile=0.5,
        learning_rate=learning_rate,
        bit_noise=BIT_NOISE,
        expected_cohort=expected_cohort,
    )
    sums = adaptive.update_noise_multiplier(MULTIPLIER)
    return replace(client_level(RATE), bound=start, noise_multiplier=sums, adaptive=adaptive)


def share_released(strategy: RoundStrategy, before: float) -> float:
    """b̃, read off the step of the clip norm."""
    return 0.5 - math.log(strategy.bound() / before) / ETA


# --- adaptive clipping ------------------------------------------------------------------------------------------------


def a_client_moves_sum_and_count_by_no_more_than_planned() -> None:
    """Without noise, in units of the noise: each client's squared distance, of both releases together, is z⁻²."""
    uploads = orthogonal(100 * BOUND) | {2: orthogonal(0.5 * BOUND)[2]}

    def released(present: tuple[int, ...]) -> tuple[Tensor, float]:
        strategy = make(adaptive_privacy(), quiet)
        moved = one_round(strategy, {p: uploads[p] for p in present}) * strategy.divisor()
        return moved, share_released(strategy, BOUND) * RATE * CLIENTS

    whole, share = released(tuple(range(CLIENTS)))
    scale = adaptive_privacy().noise_multiplier * BOUND
    for gone in range(CLIENTS):
        rest, other = released(tuple(p for p in range(CLIENTS) if p != gone))
        distance = float((whole - rest).norm() / scale) ** 2 + ((share - other) / BIT_NOISE) ** 2
        further = distance * MULTIPLIER**2
        assert further <= 1 + 1e-6, f"client {gone} moves {further:.2f} times as far"


def the_count_of_small_updates_has_its_noise() -> None:
    """Nobody sends a thing: what moves the clip norm is noise of std σ_b, over the expected cohort."""
    strategy, shares = make(adaptive_privacy(), rounds=100), []
    for server_round in range(1, 101):
        before = strategy.bound()
        one_round(strategy, {p: torch.zeros(1, 1) for p in range(CLIENTS)}, server_round)
        shares.append((share_released(strategy, before) - 0.5) * RATE * CLIENTS / BIT_NOISE)
    # standard error 1 / sqrt(200) = 0.07, 5 of them
    assert abs(float(np.std(shares)) - 1) < 0.35, f"the noise of counts is {np.std(shares):.2f} times what it must be"


def noise_follows_the_clip_norm() -> None:
    """Giants push it up, dwarfs down; each round's noise has the multiplier times the norm of that round."""
    privacy = adaptive_privacy()
    for length, up in ((1e6, True), (1e-6, False)):
        strategy = make(privacy, lambda key: KeyedRandom(key) if key.purpose == "server-noise" else Silenced())
        for server_round in range(1, 6):
            bound, upload = strategy.bound(), torch.zeros(60, 60, dtype=torch.float64)
            upload[0, 0] = length
            moved = one_round(strategy, dict.fromkeys(range(CLIENTS), upload), server_round)
            noise = moved.flatten()[1:] * strategy.divisor() / (privacy.noise_multiplier * bound)
            # 3,600 draws: standard error 1.2 %, 5 of them
            assert abs(float(noise.std()) - 1) < 0.06, f"noise of {float(noise.std()):.2f} times the clip norm's"
            assert (strategy.bound() > bound) == up, "the clip norm walks away from the quantile"


class Silenced:
    """Everybody joins, and normal noise is zero."""

    reproducible = True

    def words(self, count: int) -> np.ndarray:
        return np.full(count, 2**63, dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        return np.full(count, 0.5)


def the_clip_norm_reaches_the_quantile_from_both_sides() -> None:
    """24 clients whose updates have norms 1 … 24; the noise of counts is small beside them."""
    uploads = {p: torch.tensor([[1.0 + p]]) for p in range(24)}
    for start in (0.1, 1000.0):
        privacy = adaptive_privacy(start, expected_cohort=RATE * 24, learning_rate=1.0)
        strategy, late = make(privacy, sizes=(1,) * 24, rounds=30), []
        for server_round in range(1, 31):
            requests = ask(strategy, server_round, (1, 1))
            strategy.aggregate_train(server_round, [answer(message, uploads) for message in requests])
            late += [math.log(strategy.bound())] if server_round > 15 else []
        found = math.exp(float(np.mean(late)))
        assert 8 < found < 18, f"from {start:g} to {found:.3g}; the median is 12.5"


def answer(message: Message, uploads: dict[int, Tensor]) -> Message:
    partitions = messages.read_train(message).partitions
    values = torch.stack([uploads[p] for p in partitions])
    return Message(messages.uploads_content(messages.Uploads(partitions=partitions, values=values)), reply_to=message)


# --- correlated noise -------------------------------------------------------------------------------------------------

ROUNDS, SEPARATION = 7, 2


def correlations() -> list[CorrelatedNoise]:
    schedule = RoundRobin(rounds=ROUNDS, separation=SEPARATION)
    return [TreeNoise(schedule=schedule), BandedNoise(schedule=schedule, bands=3)]


def factor(correlated: CorrelatedNoise) -> np.ndarray:
    """C by definition: trees over rounds 1 … 7, and the square root's coefficients 1, 1/2, 3/8."""
    if isinstance(correlated, TreeNoise):
        covered = [(1,), (1, 2), (3,), (1, 2, 3, 4), (5,), (5, 6), (7,)]
        return np.array([[float(t in row) for t in range(1, 8)] for row in covered])
    return sum(np.diag([c] * (ROUNDS - k), -k) for k, c in enumerate((1.0, 1 / 2, 3 / 8)))  # type: ignore[return-value]


def correlated_privacy(correlated: CorrelatedNoise, ledger: Ledger | None = None) -> ServerPrivacy:
    return replace(client_level(1.0, ledger), correlated=correlated)


def silent_noise(key: StreamKey) -> RandomSource:
    return Silenced()


def answer_those_asked(
    strategy: RoundStrategy, uploads: dict[int, Tensor], server_round: int, absent: int | None = None
) -> Tensor:
    """A round, in which one client fails."""
    shape = tuple(next(iter(uploads.values())).shape)
    requests = ask(strategy, server_round, shape)
    kept = [m for m in requests if absent not in messages.read_train(m).partitions]
    arrays, _ = strategy.aggregate_train(server_round, [answer(m, uploads) for m in kept])
    assert arrays is not None
    return messages.from_arrays(arrays)


def a_whole_run_moves_by_no_more_than_planned() -> None:
    """Noiseless runs with and without a client: the distance of all rounds, in units of the noise, is at most 1 / z.

    The noise of the rounds is σ S C⁻¹ Z / divisor, so the distance is that of C times the differences.
    """
    uploads = orthogonal(100 * BOUND)
    for correlated in correlations():

        def rounds_of(absent: int | None, own: CorrelatedNoise = correlated) -> tuple[np.ndarray, float]:
            strategy = make(correlated_privacy(own), silent_noise, rounds=ROUNDS)
            moves = [answer_those_asked(strategy, uploads, t, absent) for t in range(1, ROUNDS + 1)]
            return torch.stack(moves).flatten(1).numpy(), strategy.divisor()

        whole, divisor = rounds_of(None)
        unit, furthest = correlated.sigma(MULTIPLIER) * BOUND / divisor, 0.0
        for gone in range(CLIENTS):
            distance = float(np.linalg.norm(factor(correlated) @ (whole - rounds_of(gone)[0]))) / unit
            assert distance <= (1 + 1e-9) / MULTIPLIER, f"client {gone} moves {distance * MULTIPLIER:.2f} times as far"
            furthest = max(furthest, distance)
        assert math.isclose(furthest, 1 / MULTIPLIER, rel_tol=1e-6), "more noise than planned"


def noise_of_a_run_has_the_covariance_of_the_inverse_factor() -> None:
    for correlated in correlations():
        strategy = make(correlated_privacy(correlated), rounds=ROUNDS)
        zeros = dict.fromkeys(range(CLIENTS), torch.zeros(80, 80))
        moves = [answer_those_asked(strategy, zeros, t) for t in range(1, ROUNDS + 1)]
        scale = correlated.sigma(MULTIPLIER) * BOUND / strategy.divisor()
        found = np.cov(torch.stack(moves).flatten(1).numpy() / scale)
        inverse = np.linalg.inv(factor(correlated))
        expected = inverse @ inverse.T
        # 6,400 coordinates: standard error of an entry at most sqrt(2 / 6400) of the largest variance; 6 of them
        assert np.abs(found - expected).max() < 6 * math.sqrt(2 / 6400) * expected.max(), (
            f"the noise of {type(correlated).__name__} has another covariance"
        )


def clients_are_asked_in_their_turns_alone() -> None:
    for correlated in correlations():
        strategy = make(correlated_privacy(correlated), rounds=ROUNDS)
        zeros = dict.fromkeys(range(CLIENTS), torch.zeros(1, 1))
        for server_round in range(1, ROUNDS + 1):
            asked = [p for m in ask(strategy, server_round, (1, 1)) for p in messages.read_train(m).partitions]
            turns = [p for p in range(CLIENTS) if p % SEPARATION == server_round % SEPARATION]
            assert asked == turns, f"round {server_round} asks {asked}, and it is the turn of {turns}"
            answer_those_asked(strategy, zeros, server_round)


def a_run_is_in_the_ledger_before_its_noise(folder: Path) -> None:
    """At each draw, the ledger of the rounds so far covers them: a Gaussian release by the leading block of C."""
    for correlated in correlations():
        ledger = Ledger(folder / f"{type(correlated).__name__}.jsonl")
        unit, covered = correlated.sigma(MULTIPLIER), []

        def watching(
            key: StreamKey,
            own: Ledger = ledger,
            c: np.ndarray = factor(correlated),  # noqa: B008 - of this turn of the loop
            sigma: float = unit,
            found: list[bool] = covered,
        ) -> RandomSource:
            if key.purpose == "server-noise":
                t = key.server_round
                turns = [[r for r in range(t) if r % SEPARATION == first] for first in range(SEPARATION)]
                needed = max(float(np.linalg.norm(c[:t, mine].sum(axis=1))) for mine in turns) / sigma
                events = own.read().events
                charged = sum(event.releases * event.noise_multiplier**-2 for event in events)
                unsampled = all(event.sampling_rate == 1 for event in events)
                found.append(unsampled and needed**2 <= charged * (1 + 1e-9))
            return KeyedRandom(key)

        strategy = make(correlated_privacy(correlated, ledger), watching, rounds=ROUNDS)
        zeros = dict.fromkeys(range(CLIENTS), torch.zeros(1, 1))
        for server_round in range(1, ROUNDS + 1):
            answer_those_asked(strategy, zeros, server_round)
        assert covered == [True] * ROUNDS, (
            f"{type(correlated).__name__}: noise was drawn that the ledger does not cover"
        )


class Nosy(RoundStrategy):
    """Notes what its hooks find in the state."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        self.found.update(self.state)
        return super().combine(updates)

    def sensitivity(self) -> float:
        return super().sensitivity()

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        self.found.update(self.state)
        return prompt + diff

    found: ClassVar[set[str]] = set()


def a_strategys_code_does_not_see_the_noise() -> None:
    for correlated in correlations():
        strategy = make(correlated_privacy(correlated), strategy_class=Nosy, rounds=ROUNDS)
        Nosy.found.clear()
        for server_round in (1, 2, 3):
            answer_those_asked(strategy, dict.fromkeys(range(CLIENTS), torch.zeros(1, 1)), server_round)
        assert SECRET_NOISE in strategy.state
        assert SECRET_NOISE not in Nosy.found, "hooks can read the noise of rounds that were released"


def a_round_of_correlated_noise_is_made_once() -> None:
    """Neither again, nor out of order, nor after the memory of the noise was lost."""
    zeros = dict.fromkeys(range(CLIENTS), torch.zeros(1, 1))
    for correlated in correlations():
        strategy = make(correlated_privacy(correlated), rounds=ROUNDS)
        for server_round in (1, 2):
            answer_those_asked(strategy, zeros, server_round)
        kept = dict(strategy.state)
        for state, server_round in ((kept, 2), (kept, 4), ({}, 3)):
            strategy.state = dict(state)
            try:
                answer_those_asked(strategy, zeros, server_round)
            except PrivacyError:
                continue
            raise AssertionError(f"round {server_round} was made after round 2, with {len(state)} things remembered")

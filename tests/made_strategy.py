"""A strategy outside a run: what every argument of `RoundStrategy` is where a test says nothing of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, RandomSources, StreamKey
from fl_dualpriv.privacy.plan import RoundTerms, round_terms
from fl_dualpriv.server.strategy import RoundReport, RoundStrategy, ServerPrivacy


class Silent:
    """A stream whose noise is exactly zero, and by which everybody joins a cohort at rates above one half.

    One half is the uniform whose normal quantile is zero; 2^63 is the word whose uniform begins there.
    """

    reproducible = True

    def words(self, count: int) -> np.ndarray:
        return np.full(count, 1 << 63, dtype=np.uint64)

    def uniforms(self, count: int) -> np.ndarray:
        return np.full(count, 0.5)


def quiet(key: StreamKey) -> RandomSource:
    """Everybody joins the cohort, and the noise is zero."""
    return Silent()


def made_strategy(
    cls: type[RoundStrategy],
    privacy: ServerPrivacy | None,
    sources: RandomSources = KeyedRandom,
    *,
    sizes: Sequence[int] = (10, 20, 30, 40),
    nodes: Sequence[int] = (),
    masses: Mapping[int, float] | None = None,
    rounds: int = 3,
    evaluate_every: int = 0,
    prompt_kind: Any = "global",
    terms: RoundTerms | None = None,
    tolerates: bool = True,
    seed: int = 0,
    report: Callable[[RoundReport], None] = lambda report: None,
    **options: Any,
) -> Any:
    """``cls`` over clients with so many examples.

    Args:
        nodes: Of each client, in order; empty: 70, 71, …
        masses: Of each client; None: 1.
        terms: What clients are told; None: no record-level noise, one step.
        options: The class's own.
    """
    # Messages cannot be made outside a Flower task.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    return cls(
        cards={p: messages.ClientCard(partition=p, num_examples=n) for p, n in enumerate(sizes)},
        hosts={p: nodes[p] if nodes else 70 + p for p in range(len(sizes))},
        masses=dict(masses or dict.fromkeys(range(len(sizes)), 1.0)),
        num_rounds=rounds,
        evaluate_every=evaluate_every,
        prompt_kind=prompt_kind,
        run_token="token",
        terms=terms or round_terms(None, 1.0, 1),
        tolerates_failures=tolerates,
        privacy=privacy,
        sources=sources,
        seed=seed,
        report=report,
        **options,
    )


def training_messages(strategy: RoundStrategy, server_round: int, start: Tensor) -> list[Message]:
    """The messages of training of a round that begins at a prompt."""
    return list(strategy.configure_train(server_round, messages.to_arrays(start), ConfigRecord(), None))  # type: ignore[arg-type]

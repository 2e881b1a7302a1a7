"""What the server's noise remembers from round to round, as tensors in the strategy's state (so checkpoints hold it).

The clip norm of adaptive clipping is made of released numbers and is public. The memory of correlated noise is secret
like the noise itself: whoever has it can take the noise out of released prompts.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.correlated import CorrelatedNoise

CLIP_NORM = "mechanism.clip-norm"
SECRET_NOISE, NOISE_ROUND = "mechanism.secret-noise", "mechanism.secret-noise-round"

State = dict[str, Tensor]


@contextlib.contextmanager
def without_noise_memory(state: State) -> Iterator[None]:
    """Take the secret noise out of the state while a strategy's own code runs.

    Guarantee:
        `combine` and `server_update` are functions of uploads and of what was released: what could read the noise could
        take it out of the prompt, or put it into later sums, for which the proof does not hold.
    """
    secret = state.pop(SECRET_NOISE, None)
    try:
        yield
    finally:
        if secret is not None:
            state[SECRET_NOISE] = secret


def check_next(state: State, server_round: int) -> None:
    """Refuse a round of correlated noise that does not follow the one that is remembered.

    Guarantee:
        Each row of C⁻¹ Z is used once, and with the memory that it is made from: a round that is made twice, or after
        its memory was lost, would release sums with noise that the proof does not know.

    Raises:
        PrivacyError: If it does not.
    """
    last = int(state[NOISE_ROUND]) if NOISE_ROUND in state else 0
    if server_round != last + 1:
        raise PrivacyError(
            f"round {server_round} with correlated noise, and the server remembers the noise of round {last}: rounds "
            "are made in order, each once; resume from the last checkpoint, or start a new run"
        )


def next_noise(correlated: CorrelatedNoise, state: State, server_round: int, fresh: Tensor) -> Tensor:
    """Row ``server_round`` of C⁻¹ applied to all fresh draws so far; the state remembers what later rows need.

    Args:
        correlated: C.
        state: Of the strategy; changed.
        server_round: From 1, in order: see `check_next`.
        fresh: Independent normal noise of this round, used for nothing else.

    Raises:
        PrivacyError: As `check_next`.
    """
    check_next(state, server_round)
    empty = torch.zeros(correlated.memory_rows, *fresh.shape, dtype=fresh.dtype)
    noise, memory = correlated.unit_noise(server_round, fresh, state.get(SECRET_NOISE, empty))
    state[SECRET_NOISE], state[NOISE_ROUND] = memory, torch.tensor(server_round)
    return noise

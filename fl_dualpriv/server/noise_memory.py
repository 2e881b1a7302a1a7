"""Memory of the server's noise across rounds, as tensors in the strategy's state (so that checkpoints hold it).

The clip norm of adaptive clipping is computed from released numbers and is public. The memory of correlated noise is as
secret as the noise itself: with it, the noise can be subtracted from released prompts.
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
    """Remove the secret noise from the state while a strategy's own code runs.

    Guarantee:
        `combine` and `server_update` are functions of uploads and of what was released. Code that could read the noise
        could subtract it from the prompt, or put it into later sums, for which the proof does not hold.
    """
    secret = state.pop(SECRET_NOISE, None)
    try:
        yield
    finally:
        if secret is not None:
            state[SECRET_NOISE] = secret


def check_next(state: State, server_round: int) -> None:
    """Refuse a round of correlated noise that does not follow the last round in the memory.

    Guarantee:
        Each row of C⁻¹ Z is used once, and with the memory that it is made from. A round that is made twice, or after
        its memory was lost, would release sums with noise that the proof does not cover.

    Raises:
        PrivacyError: If the round does not follow.
    """
    last = int(state[NOISE_ROUND]) if NOISE_ROUND in state else 0
    if server_round != last + 1:
        raise PrivacyError(
            f"round {server_round} uses correlated noise, but the server remembers the noise of round {last}: rounds "
            "must be made in order, each once; resume from the last checkpoint, or start a new run"
        )


def next_noise(correlated: CorrelatedNoise, state: State, server_round: int, fresh: Tensor) -> Tensor:
    """Apply row ``server_round`` of C⁻¹ to all fresh draws so far; the state remembers what later rows need.

    Args:
        correlated: Correlated noise with matrix C.
        state: State of the strategy; changed in place.
        server_round: Number of the round, from 1, in order: see `check_next`.
        fresh: Independent normal noise of this round, used for nothing else.

    Raises:
        PrivacyError: If the round does not follow the last one, see `check_next`.
    """
    check_next(state, server_round)
    empty = torch.zeros(correlated.memory_rows, *fresh.shape, dtype=fresh.dtype)
    noise, memory = correlated.unit_noise(server_round, fresh, state.get(SECRET_NOISE, empty))
    state[SECRET_NOISE], state[NOISE_ROUND] = memory, torch.tensor(server_round)
    return noise

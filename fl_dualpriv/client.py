"""What belongs to a client: its data as features, its personal prompt and its ledger, on its own disk."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.plan import RecordLevelPlan


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's records, ready for prompt learning.

    Attributes:
        features: (record, embed_dim), unit norm; the row of an unreadable record is NaN, so that it stays counted.
        labels: (record,).
    """

    features: Tensor
    labels: Tensor

    @property
    def num_examples(self) -> int:
        """n_i, public metadata."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class PersonalState:
    """p_L and the power iteration's memory. It never travels.

    Attributes:
        personal: p_L, (n_ctx, ctx_dim); zeros before the first step.
        carrier: The last v, (k, ctx_dim), start of the next power iteration.
        server_round: The last round that moved it.
    """

    personal: Tensor
    carrier: Tensor
    server_round: int

    def to(self, device: torch.device) -> "PersonalState":
        """The same state on another device."""
        return replace(self, personal=self.personal.to(device), carrier=self.carrier.to(device))


def fresh_state(n_ctx: int, ctx_dim: int, rank: int) -> PersonalState:
    """p_L = 0, and a fixed start of the power iteration that depends on no data."""
    return PersonalState(
        personal=torch.zeros(n_ctx, ctx_dim), carrier=_first_carrier(ctx_dim, rank).clone(), server_round=0
    )


@functools.lru_cache(maxsize=4)  # the decomposition costs more than a whole step of a small prompt
def _first_carrier(ctx_dim: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(ctx_dim, rank, generator=generator))[0].T.contiguous()


class ClientFolder:
    """A client's own state folder: ``prompt.safetensors`` and ``ledger.jsonl``, each replaced or appended whole."""

    def __init__(self, path: Path) -> None:
        self._prompt = path / "prompt.safetensors"
        self.ledger = path / "ledger.jsonl"

    def load(self, run_token: str, n_ctx: int, ctx_dim: int, rank: int) -> PersonalState:
        """The state this run left here, or a fresh one if another run wrote the file or nobody did.

        Raises:
            ValueError: If the file is of this run but does not hold such a state: it was damaged or exchanged.
        """
        if self._prompt.exists():
            tensors, metadata = read_tensors(self._prompt)
            if metadata.get("run-token") == run_token:
                for name, shape in (("personal", (n_ctx, ctx_dim)), ("carrier", (rank, ctx_dim))):
                    found = tensors[name]
                    if tuple(found.shape) != shape or found.dtype != torch.float32:
                        raise ValueError(
                            f"{self._prompt.name} holds {name} {tuple(found.shape)}, {found.dtype}; expected {shape}, "
                            "torch.float32"
                        )
                return PersonalState(
                    personal=tensors["personal"],
                    carrier=tensors["carrier"],
                    server_round=int(metadata["server-round"]),
                )
        return fresh_state(n_ctx, ctx_dim, rank)

    def save(self, state: PersonalState, global_prompt: Tensor, run_token: str) -> None:
        """Keep the personal prompt beside the global prompt it was trained on: together they are the client's model."""
        write_tensors(
            self._prompt,
            {"personal": state.personal, "carrier": state.carrier, "global": global_prompt},
            {"run-token": run_token, "server-round": str(state.server_round)},
        )


def check_task(plan: RecordLevelPlan, ledger: Ledger, state: PersonalState, server_round: int, steps: int) -> None:
    """Refuse a round that was done before, and one that would exceed the releases this client's plan accounts for.

    Guarantee:
        The ledger in this folder never holds more events than the plan composes, whatever rounds, run tokens or
        repetitions a server asks for. It is checked before the first release of the round.

    Raises:
        PrivacyError: If the round is refused.
    """
    if server_round <= state.server_round:
        raise PrivacyError(f"round {server_round} was done (last: {state.server_round}); a repetition is refused")
    made = ledger.count()
    if made + steps > plan.releases:
        raise PrivacyError(
            f"{made} releases are in the ledger and the round makes {steps} more; the plan accounts for "
            f"{plan.releases}: the round is refused"
        )


def check_noise(plan: RecordLevelPlan, offered: float) -> None:
    """Refuse a server that asks for less noise than this client's own configuration promises.

    Guarantee:
        After this check, the noise the client adds is at least what its plan accounts for.

    Raises:
        PrivacyError: If ``offered`` is below the plan's multiplier.
    """
    if not offered >= plan.noise_multiplier:
        raise PrivacyError(
            f"the server asks for noise multiplier {offered:g}, this client's plan needs {plan.noise_multiplier:g}; "
            "the step is refused"
        )

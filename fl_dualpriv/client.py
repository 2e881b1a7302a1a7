"""What belongs to a client: its data as features, its personal prompt and its ledger, on its own disk."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.files import append_json_line, read_tensors, write_tensors
from fl_dualpriv.history import History, HistoryShapes
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, utc_now
from fl_dualpriv.privacy.plan import RecordLevelPlan

_MOST_LETTERS = 200
_MOST_REFUSED_BYTES = 2**20


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
        history: What update pruning and the optimizer remember of the client's noised releases; empty before the first.
    """

    personal: Tensor
    carrier: Tensor
    server_round: int
    history: History = field(default_factory=dict)

    def to(self, device: torch.device) -> "PersonalState":
        """The same state on another device."""
        return replace(
            self,
            personal=self.personal.to(device),
            carrier=self.carrier.to(device),
            history={name: tensor.to(device) for name, tensor in self.history.items()},
        )


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
    """A client's own folder: its prompt, its ledger and the refused attempts; each replaced or appended whole."""

    def __init__(self, path: Path) -> None:
        self._prompt = path / "prompt.safetensors"
        self._refusals = path / "refusals.jsonl"
        self.ledger = path / "ledger.jsonl"

    def log_refusal(self, run_token: str, what: str, reason: str) -> None:
        """Note a refused attempt. A hostile server cannot fill the disk with them, and a full disk is no help to it."""
        line = {
            "time": utc_now(),
            "run": run_token[:_MOST_LETTERS],
            "asked": what[:_MOST_LETTERS],
            "reason": reason[: 10 * _MOST_LETTERS],
        }
        with contextlib.suppress(OSError):
            if not self._refusals.exists() or self._refusals.stat().st_size < _MOST_REFUSED_BYTES:
                append_json_line(self._refusals, line)

    def load(
        self, run_token: str, n_ctx: int, ctx_dim: int, rank: int, history: HistoryShapes | None = None
    ) -> PersonalState:
        """The state this run left here, or a fresh one if another run wrote the file or nobody did.

        Args:
            run_token: Of this run.
            n_ctx: Of the prompt.
            ctx_dim: Of the prompt.
            rank: k.
            history: What the run remembers of releases, which must be there, no more and no less; None: it is not
                looked at, as for scores.

        Raises:
            ValueError: If the file is of this run but does not hold such a state: it was damaged or exchanged.
        """
        if self._prompt.exists():
            tensors, metadata = read_tensors(self._prompt)
            if metadata.get("run-token") == run_token:
                shapes = {"personal": (n_ctx, ctx_dim), "carrier": (rank, ctx_dim)}
                self._check(tensors, {name: (shape, torch.float32) for name, shape in shapes.items()})
                if history is not None:
                    self._check(tensors, history)
                    unknown = tensors.keys() - shapes.keys() - history.keys() - {"global"}
                    if unknown:
                        raise ValueError(
                            f"{self._prompt.name} holds {', '.join(sorted(unknown))}; no such thing is kept"
                        )
                return PersonalState(
                    personal=tensors["personal"],
                    carrier=tensors["carrier"],
                    server_round=int(metadata["server-round"]),
                    history={name: tensors[name] for name in history or {}},
                )
        return fresh_state(n_ctx, ctx_dim, rank)

    def _check(self, tensors: Mapping[str, Tensor], shapes: HistoryShapes) -> None:
        for name, (shape, dtype) in shapes.items():
            if name not in tensors:
                raise ValueError(f"{self._prompt.name} holds no {name}; expected {shape}, {dtype}")
            found = tensors[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(
                    f"{self._prompt.name} holds {name} {tuple(found.shape)}, {found.dtype}; expected {shape}, {dtype}"
                )

    def save(self, state: PersonalState, global_prompt: Tensor, run_token: str) -> None:
        """Keep the personal prompt beside the global prompt it was trained on: together they are the client's model."""
        write_tensors(
            self._prompt,
            {**state.history, "personal": state.personal, "carrier": state.carrier, "global": global_prompt},
            {"run-token": run_token, "server-round": str(state.server_round)},
        )


def check_round(plan: RecordLevelPlan, made: LedgerContent, state: PersonalState, event: LedgerEvent) -> None:
    """Refuse a round that was done before, and one that would exceed the releases this client's plan accounts for.

    Guarantee:
        No run ever has more events in the ledger of this folder than its plan composes, and without an owner's budget
        neither have all runs together, whatever rounds, run tokens or repetitions a server asks for. It is checked
        before the first release of the round; an event of this round in the ledger, of a try that a crash ended, is a
        round that was done.

    Raises:
        PrivacyError: If the round is refused.
    """
    done = max(state.server_round, made.last_round(event.run))
    if event.server_round <= done:
        raise PrivacyError(f"round {event.server_round} was done (last: {done}); a repetition is refused")
    releases = made.releases(event.run)
    if releases + event.releases > plan.releases:
        raise PrivacyError(
            f"{releases} releases of this run are in the ledger and the round makes {event.releases} more; the plan "
            f"accounts for {plan.releases}: the round is refused"
        )


def check_single_run(plan: RecordLevelPlan, made: LedgerContent, event: LedgerEvent) -> None:
    """Where no owner has set a budget, the plan of one run is all that may ever be spent in a folder.

    Raises:
        PrivacyError: If the ledger, damaged lines included, holds too many releases of other runs.
    """
    releases = made.releases(damaged_as=event.releases)
    if releases + event.releases > plan.releases:
        raise PrivacyError(
            f"{releases} releases are in the ledger and the round makes {event.releases} more; the plan accounts for "
            f"{plan.releases}, and the owner of this node has set no budget for more than one run: the round is refused"
        )

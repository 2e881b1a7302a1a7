"""What belongs to a client: its data as features, its personal prompt and its ledger, on its own disk."""

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fl_dualpriv.client.release_memory import ReleaseMemory, ReleaseMemoryShapes
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.files import append_json_line, keep_previous, read_metadata, read_tensors, write_tensors
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, utc_now
from fl_dualpriv.privacy.plan import RecordLevelPlan

_ROUNDS_KEPT = 2
_MOST_LETTERS = 200
_MOST_REFUSED_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class PersonalState:
    """p_L and the power iteration's memory. It never travels.

    Attributes:
        personal: p_L, (n_ctx, ctx_dim); zeros before the first step.
        row_basis: The last v, (k, ctx_dim), start of the next power iteration.
        server_round: The last round that moved it.
        release_memory: Tensors that update pruning and the optimizer keep of the client's noised releases. Empty before
            the first release.
    """

    personal: Tensor
    row_basis: Tensor
    server_round: int
    release_memory: ReleaseMemory = field(default_factory=dict)

    def to(self, device: torch.device) -> "PersonalState":
        """The same state on another device."""
        return replace(
            self,
            personal=self.personal.to(device),
            row_basis=self.row_basis.to(device),
            release_memory={name: tensor.to(device) for name, tensor in self.release_memory.items()},
        )


def fresh_state(n_ctx: int, ctx_dim: int, rank: int) -> PersonalState:
    """p_L = 0, and a fixed start of the power iteration that depends on no data."""
    return PersonalState(
        personal=torch.zeros(n_ctx, ctx_dim), row_basis=_first_row_basis(ctx_dim, rank).clone(), server_round=0
    )


@functools.lru_cache(maxsize=4)  # the decomposition costs more than a whole step of a small prompt
def _first_row_basis(ctx_dim: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(ctx_dim, rank, generator=generator))[0].T.contiguous()


class ClientFolder:
    """A client's own folder: its prompt, its ledger and the refused attempts; each replaced or appended whole.

    For a server that was cut off and asks again there are ``sent.safetensors``, the uploads of the last two rounds, and
    ``prompt.previous.safetensors``, the state before the last one. With ``trusts-server`` uploads are clean sums: that
    file is for nobody's eyes but the server's.
    """

    def __init__(self, path: Path) -> None:
        self._prompt = path / "prompt.safetensors"
        self._previous = path / "prompt.previous.safetensors"
        self._sent = path / "sent.safetensors"
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
        self,
        run_token: str,
        n_ctx: int,
        ctx_dim: int,
        rank: int,
        release_memory: ReleaseMemoryShapes | None = None,
        *,
        previous: bool = False,
        terms: str = "",
    ) -> PersonalState:
        """The state this run left here, or a fresh one if another run wrote the file or nobody did.

        Guarantee:
            With ``terms`` no state, and so no kept upload, goes from a run into one that promises something else. Run
            tokens are no secret: they stand in published files.

        Args:
            run_token: Of this run.
            n_ctx: Of the prompt.
            ctx_dim: Of the prompt.
            rank: k.
            release_memory: Shapes of the tensors that the run keeps of releases. The file must hold these and no
                others. None skips the check, as for scores.
            previous: The state before the last round instead.
            terms: What the run promises, as `save` kept it; empty: it is not looked at.

        Raises:
            PrivacyError: If the run of this token kept its state under other terms.
            ValueError: If the file is of this run but does not hold such a state: it was damaged or exchanged.
        """
        file = self._previous if previous else self._prompt
        if file.exists():
            tensors, metadata = read_tensors(file)
            if metadata.get("run-token") == run_token:
                if terms and metadata.get("terms", "") != terms:
                    raise PrivacyError("the run of this token was on other terms than this one; it is refused")
                shapes = {"personal": (n_ctx, ctx_dim), "carrier": (rank, ctx_dim)}
                _check(file.name, tensors, {name: (shape, torch.float32) for name, shape in shapes.items()})
                if release_memory is not None:
                    _check(file.name, tensors, release_memory)
                    unknown = tensors.keys() - shapes.keys() - release_memory.keys() - {"global"}
                    if unknown:
                        raise ValueError(f"{file.name} holds {', '.join(sorted(unknown))}; no such thing is kept")
                return PersonalState(
                    personal=tensors["personal"],
                    row_basis=tensors["carrier"],
                    server_round=int(metadata["server-round"]),
                    release_memory={name: tensors[name] for name in release_memory or {}},
                )
        return fresh_state(n_ctx, ctx_dim, rank)

    def save(self, state: PersonalState, global_prompt: Tensor, run_token: str, terms: str = "") -> None:
        """Keep the personal prompt beside the global prompt it was trained on: together they are the client's model.

        The state of an earlier round of the run becomes the previous one; at no moment is there no state.
        """
        if self._prompt.exists() and _round_of(read_metadata(self._prompt), run_token) < state.server_round:
            keep_previous(self._prompt, self._previous)
        write_tensors(
            self._prompt,
            {**state.release_memory, "personal": state.personal, "carrier": state.row_basis, "global": global_prompt},
            {"run-token": run_token, "server-round": str(state.server_round), "terms": terms},
        )

    def keep_sent(self, upload: Tensor, global_prompt: Tensor, server_round: int, run_token: str) -> None:
        """Keep what is about to be sent, before the state: a round whose state is kept has its upload here."""
        tensors, metadata = self._read_sent(run_token)
        tensors, metadata = dict(tensors), dict(metadata)
        others = sorted((int(name) for name in tensors if int(name) != server_round), reverse=True)
        for old in others[_ROUNDS_KEPT - 1 :]:
            del tensors[str(old)], metadata[f"prompt-{old}"]
        tensors[str(server_round)] = upload
        metadata |= {"run-token": run_token, f"prompt-{server_round}": digest(global_prompt)}
        write_tensors(self._sent, tensors, metadata, private=True)

    def sent(self, server_round: int, global_prompt: Tensor, run_token: str) -> Tensor | None:
        """What was sent in a round of this run, bit by bit; None if it is not kept, or answered another prompt.

        Guarantee:
            To send it once more releases nothing: it is a function of what was released.
        """
        tensors, metadata = self._read_sent(run_token)
        if metadata.get(f"prompt-{server_round}") != digest(global_prompt):
            return None
        return tensors.get(str(server_round))

    def _read_sent(self, run_token: str) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        if not self._sent.exists():
            return {}, {}
        try:
            tensors, metadata = read_tensors(self._sent)
        except SafetensorError:  # damaged: then nothing is sent again
            return {}, {}
        return (tensors, metadata) if metadata.get("run-token") == run_token else ({}, {})


def digest(prompt: Tensor) -> str:
    """SHA-256 of a prompt's numbers."""
    return hashlib.sha256(prompt.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _round_of(metadata: Mapping[str, str], run_token: str) -> int:
    """Round of a state of this run; the states of other runs are older than all of them."""
    return int(metadata["server-round"]) if metadata.get("run-token") == run_token else 0


def _check(file: str, tensors: Mapping[str, Tensor], shapes: ReleaseMemoryShapes) -> None:
    for name, (shape, dtype) in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} holds no {name}; expected {shape}, {dtype}")
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ValueError(f"{file} holds {name} {tuple(found.shape)}, {found.dtype}; expected {shape}, {dtype}")


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
        PrivacyError: If the ledger, damaged lines included, holds too many releases of other runs, or one on weaker
            terms than this plan's.
    """
    weaker = [
        e for e in made.events if e.sampling_rate > plan.sampling_rate or e.noise_multiplier < event.noise_multiplier
    ]
    if weaker:
        raise PrivacyError(
            f"the ledger holds releases of another run at q = {weaker[0].sampling_rate:g} and z = "
            f"{weaker[0].noise_multiplier:g}, which this plan, q = {plan.sampling_rate:g} and z = "
            f"{plan.noise_multiplier:g}, does not cover; the owner of this node has set no budget for more than one "
            "run: the round is refused"
        )
    releases = made.releases(damaged_as=event.releases)
    if releases + event.releases > plan.releases:
        raise PrivacyError(
            f"{releases} releases are in the ledger and the round makes {event.releases} more; the plan accounts for "
            f"{plan.releases}, and the owner of this node has set no budget for more than one run: the round is refused"
        )


def is_same_release(made: LedgerContent, state: PersonalState, event: LedgerEvent, *, reproducible: bool) -> bool:
    """Whether the round was paid for by a try that a crash ended, and comes out bit by bit as that one would have.

    Guarantee:
        If this is true, the event stands in the ledger already, nothing of its release has left the client (its state,
        which comes before the upload, is not there), and the draws are functions of the seed, the round and a state
        that is the one of the round before. So the round makes the release that the event in the ledger is for. With
        randomness of the operating system it is never true: a second draw is a second release.
    """
    before = max((e.server_round for e in made.events if e.run == event.run and e != event), default=0)
    return reproducible and event in made.events and before <= state.server_round < event.server_round

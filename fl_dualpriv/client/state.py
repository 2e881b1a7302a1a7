"""State of a client on its own disk: personal prompt, release memory, saved uploads and ledger."""

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

PART_FILE = "part.safetensors"
_ROUNDS_KEPT = 2
_MOST_LETTERS = 200
_MOST_REFUSED_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class PersonalState:
    """Personal prompt p_L and the memory of the power iteration. It never travels.

    Attributes:
        personal: Personal prompt p_L, (n_ctx, ctx_dim); zeros before the first step.
        row_basis: The last v, (k, ctx_dim), which starts the next power iteration.
        server_round: The last round that changed the state.
        release_memory: Tensors that update pruning, the optimizer and noise-aware personal prompts keep of the client's
            noised releases. Empty before the first release.
    """

    personal: Tensor
    row_basis: Tensor
    server_round: int
    release_memory: ReleaseMemory = field(default_factory=dict)

    def to(self, device: torch.device) -> "PersonalState":
        """Return the same state on another device."""
        return replace(
            self,
            personal=self.personal.to(device),
            row_basis=self.row_basis.to(device),
            release_memory={name: tensor.to(device) for name, tensor in self.release_memory.items()},
        )


def fresh_state(n_ctx: int, ctx_dim: int, rank: int) -> PersonalState:
    """Return p_L = 0, and a fixed start of the power iteration that depends on no data."""
    return PersonalState(
        personal=torch.zeros(n_ctx, ctx_dim), row_basis=_first_row_basis(ctx_dim, rank).clone(), server_round=0
    )


@functools.lru_cache(maxsize=4)  # the decomposition costs more than a whole step of a small prompt
def _first_row_basis(ctx_dim: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(ctx_dim, rank, generator=generator))[0].T.contiguous()


class ClientFolder:
    """Folder of one client: its prompt, its ledger and the refused requests. Each write replaces or appends as a whole.

    Two files serve a server that was cut off and asks again: ``sent.safetensors`` has the uploads of the last two
    rounds, and ``prompt.previous.safetensors`` has the state before the last one. With ``trusts-server`` uploads are
    clean sums, so only the server may read ``sent.safetensors``.
    """

    def __init__(self, path: Path) -> None:
        self._prompt = path / "prompt.safetensors"
        self._previous = path / "prompt.previous.safetensors"
        self._sent = path / "sent.safetensors"
        self._part = path / PART_FILE
        self._refusals = path / "refusals.jsonl"
        self.ledger = path / "ledger.jsonl"

    def log_refusal(self, run_token: str, what: str, reason: str) -> None:
        """Note a refused request. The size of the file is bounded, and a full disk does not prevent the refusal."""
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
        partial: bool = False,
    ) -> PersonalState:
        """Load the state of this run, or return a fresh one if the file is missing or of another run.

        Guarantee:
            With ``terms`` no state, and so no saved upload, passes from a run to another one with different terms. Run
            tokens are not secret: they stand in published files.

        Args:
            run_token: Token of this run.
            n_ctx: Number of context tokens of the prompt.
            ctx_dim: Dimension of a context token.
            rank: Rank k.
            release_memory: Shapes of the tensors that the run keeps of releases. The file must hold these and no
                others. None skips the check, as for scores.
            previous: Load the state before the last round instead.
            terms: Privacy terms of the run, as given to `save`. An empty string skips the check.
            partial: True if the file may hold more of the release memory than this, as for scores.

        Raises:
            PrivacyError: If the run of this token saved its state under other terms.
            ValueError: If the file is of this run but does not hold such a state: it was damaged or replaced.
        """
        file = self._previous if previous else self._prompt
        if file.exists():
            tensors, metadata = read_tensors(file)
            if metadata.get("run-token") == run_token:
                if terms and metadata.get("terms", "") != terms:
                    raise PrivacyError("the run of this token was on other terms than this request; it is refused")
                shapes = {"personal": (n_ctx, ctx_dim), "carrier": (rank, ctx_dim)}
                _check(file.name, tensors, {name: (shape, torch.float32) for name, shape in shapes.items()})
                if int(metadata["server-round"]) == 0:  # a selected start, before the first release of a step
                    release_memory = None
                if release_memory is not None:
                    _check(file.name, tensors, release_memory)
                    unknown = tensors.keys() - shapes.keys() - release_memory.keys() - {"global"}
                    if unknown and not partial:
                        raise ValueError(
                            f"{file.name} holds {', '.join(sorted(unknown))}; this run keeps no such tensor"
                        )
                return PersonalState(
                    personal=tensors["personal"],
                    row_basis=tensors["carrier"],
                    server_round=int(metadata["server-round"]),
                    release_memory={name: tensors[name] for name in release_memory or {}},
                )
        return fresh_state(n_ctx, ctx_dim, rank)

    def has_state(self, run_token: str) -> bool:
        """Return True if the folder holds a state of this run."""
        return self._prompt.exists() and read_metadata(self._prompt).get("run-token") == run_token

    def save(self, state: PersonalState, global_prompt: Tensor, run_token: str, terms: str = "") -> None:
        """Save the personal prompt with the global prompt it was trained on: together they are the client's model.

        The state of an earlier round of the run becomes the previous one. At every moment there is a complete state.
        """
        if self._prompt.exists() and _round_of(read_metadata(self._prompt), run_token) < state.server_round:
            keep_previous(self._prompt, self._previous)
        write_tensors(
            self._prompt,
            {**state.release_memory, "personal": state.personal, "carrier": state.row_basis, "global": global_prompt},
            {"run-token": run_token, "server-round": str(state.server_round), "terms": terms},
        )

    def keep_sent(self, upload: Tensor, global_prompt: Tensor, server_round: int, run_token: str) -> None:
        """Save an upload before it is sent and before the state, so that every saved state has its upload."""
        tensors, metadata = self._read_sent(run_token)
        tensors, metadata = dict(tensors), dict(metadata)
        others = sorted((int(name) for name in tensors if int(name) != server_round), reverse=True)
        for old in others[_ROUNDS_KEPT - 1 :]:
            del tensors[str(old)], metadata[f"prompt-{old}"]
        tensors[str(server_round)] = upload
        metadata |= {"run-token": run_token, f"prompt-{server_round}": digest(global_prompt)}
        write_tensors(self._sent, tensors, metadata, private=True)

    def keep_part(self, part: Tensor, global_prompt: Tensor, server_round: int, run_token: str) -> None:
        """Save a p_L that the server made, with the p_G after the same round, see `server.collective`.

        It stands in its own file: the state is changed by rounds only, so that a score cannot set it back.
        """
        metadata = {"run-token": run_token, "server-round": str(server_round)}
        write_tensors(self._part, {"personal": part, "global": global_prompt}, metadata)

    def sent(self, server_round: int, global_prompt: Tensor, run_token: str) -> Tensor | None:
        """Return the upload of a round of this run, bit by bit; None if it is not saved, or was for another prompt.

        Guarantee:
            Sending the upload again releases nothing, because it is a function of what was released.
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
        except SafetensorError:  # a damaged file: no upload is sent again
            return {}, {}
        return (tensors, metadata) if metadata.get("run-token") == run_token else ({}, {})


def digest(prompt: Tensor) -> str:
    """Return the SHA-256 of a prompt's numbers."""
    return hashlib.sha256(prompt.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _round_of(metadata: Mapping[str, str], run_token: str) -> int:
    """Return the round of a state of this run, or 0 for a state of another run, which counts as older."""
    return int(metadata["server-round"]) if metadata.get("run-token") == run_token else 0


def _check(file: str, tensors: Mapping[str, Tensor], shapes: ReleaseMemoryShapes) -> None:
    for name, (shape, dtype) in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} holds no {name}; expected {shape}, {dtype}")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{file} holds {name} {tuple(tensor.shape)}, {tensor.dtype}; expected {shape}, {dtype}")


def check_round(plan: RecordLevelPlan, made: LedgerContent, state: PersonalState, event: LedgerEvent) -> None:
    """Refuse a round that was done before, and one that would exceed the releases this client's plan accounts for.

    Guarantee:
        No run ever has more events in the ledger of this folder than its plan composes, and without an owner's budget
        neither have all runs together, for any rounds, run tokens or repetitions that a server asks for. This is
        checked before the first release of the round. An event of this round in the ledger, from an attempt that a
        crash ended, counts as a round that was done.

    Raises:
        PrivacyError: If the round is refused.
    """
    done = max(state.server_round, made.last_round(event.run))
    if event.server_round <= done:
        raise PrivacyError(f"round {event.server_round} was done (last: {done}); a repetition is refused")
    releases = made.steps(event.run)
    if releases + event.releases > plan.releases:
        raise PrivacyError(
            f"{releases} releases of this run are in the ledger and the round makes {event.releases} more; the plan "
            f"accounts for {plan.releases}: the round is refused"
        )


def check_selection(made: LedgerContent, state: PersonalState, event: LedgerEvent) -> None:
    """Refuse to select a start twice in a run, or after its first round.

    Guarantee:
        No run ever has more than one selection in the ledger of this folder. An event from an attempt that a crash
        ended counts, as in `check_round`.

    Raises:
        PrivacyError: If the selection is refused.
    """
    if made.selections(event.run):
        raise PrivacyError("the start of this run was selected already; a repetition is refused")
    if (last := max(state.server_round, made.last_round(event.run))) > 0:
        raise PrivacyError(f"a start is selected before round 1, and round {last} was done; the request is refused")


def is_same_selection(made: LedgerContent, state: PersonalState, event: LedgerEvent, *, reproducible: bool) -> bool:
    """Return True if an attempt that a crash ended paid for the selection, and this one repeats it bit by bit.

    Guarantee:
        As in `is_same_release`: the caller found no saved release, so nothing has left the client.
    """
    return reproducible and event in made.events and made.last_round(event.run) == state.server_round == 0


def is_same_release(made: LedgerContent, state: PersonalState, event: LedgerEvent, *, reproducible: bool) -> bool:
    """Return True if an attempt that a crash ended paid for the round, and the round repeats that attempt bit by bit.

    Guarantee:
        If this is True, the event already stands in the ledger, nothing of its release has left the client (its state,
        which is saved before the upload leaves, is not there), and the draws are functions of the seed, the round and
        a state that is the one of the round before. So the round makes the release that the event in the ledger is
        for. With randomness of the operating system it is never True: a second draw is a second release.
    """
    before = max((e.server_round for e in made.events if e.run == event.run and e != event), default=0)
    return reproducible and event in made.events and before <= state.server_round < event.server_round

"""The server's checkpoint, from which an interrupted run continues. One file, replaced in one step, verified on load.

The checkpoint of a round is on disk before the result of the round leaves the server. So no client saw the result of a
round without a checkpoint, and a round with a checkpoint is never made twice.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import keep_previous, write_bytes

_log = logging.getLogger("fl_dualpriv")

FORMAT = 2
FILES = ("checkpoint.bin", "checkpoint.previous.bin")
# Keys that never change a result. All other keys must stay the same on resume.
_FREE = ("output.", "resources.", "join-timeout", "reply-timeout", "dead-actors")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run.

    Attributes:
        run_token: Token that marks the run in all ledgers.
        rounds_done: Number of rounds whose result is the ``prompt`` of the checkpoint.
        events: Number of events of this run in the server's ledger; on load the ledger must hold at least as many.
        deliveries: Number of uploads that counted.
        failures: Number of client calls that failed.
        last_failure: Reason of the last failure; None if there was none.
    """

    run_token: str
    rounds_done: int
    events: int
    deliveries: int
    failures: int
    last_failure: str | None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a server between two rounds.

    Attributes:
        progress: Progress of the run.
        prompt: p_G, (n_ctx, ctx_dim).
        state: Full memory of the strategy.
    """

    progress: Progress
    prompt: Tensor
    state: dict[str, Tensor]


class Damaged(ValueError):
    """The file is not a whole checkpoint."""


class CheckpointFolder:
    """The last two checkpoints of a run.

    Args:
        folder: Folder of the run.
        run_config: Flat run configuration.
        cards: Public number of records of each client, in order. If the data were exchanged, it is another run.
        data: `data_identity` of the server's data. It is derived from names of private files, so it stays in the
            checkpoint, which is an operator's file.
    """

    def __init__(
        self, folder: Path, run_config: Mapping[str, ConfigValue], cards: list[int], data: Mapping[str, str]
    ) -> None:
        self._last, self._previous = (folder / name for name in FILES)
        fixed = {key: value for key, value in sorted(run_config.items()) if not key.startswith(_FREE)}
        self._made_by = {"version": version("fl-dualpriv"), "config": fixed, "records": cards, "data": dict(data)}

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the last checkpoint, which becomes the previous one.

        Guarantee:
            When this returns, the checkpoint is on disk, synced. A crash at any moment leaves whole files under both
            names, the newer of them at least as new as the last checkpoint before the call.

        Raises:
            OSError: If the checkpoint cannot be written. The result of the round must then not leave.
        """
        tensors = {"prompt": checkpoint.prompt} | {f"state.{k}": v for k, v in checkpoint.state.items()}
        # Copies, because a strategy may keep views of shared memory, which safetensors refuses.
        payload = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        header = json.dumps({**self._made_by, "progress": asdict(checkpoint.progress)}).encode()
        body = b"%d\n%s\n%s" % (FORMAT, header, payload)
        if self._last.exists():
            keep_previous(self._last, self._previous)
        content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        write_bytes(self._last, content, synced=True, private=True)

    def remove(self) -> None:
        """Remove all checkpoints and their temporary files after the results are written.

        The memory of a strategy may be secret, as that of correlated noise is. So may a temporary file that a killed
        write left. Only this run holds the folder, so no other process is writing there.
        """
        left = [f for name in FILES for f in self._last.parent.glob(f".{name}.*.tmp")]
        for file in (self._last, self._previous, *left):
            file.unlink(missing_ok=True)

    def read(self, *, may_go_back: bool) -> Checkpoint | None:
        """Return the last checkpoint, or the previous one if the last is damaged; None if there is none.

        Args:
            may_go_back: True if rounds whose results were seen may be made again.

        Raises:
            ConfigError: If all checkpoints are damaged, if the previous one is needed and ``may_go_back`` is False, or
                if a checkpoint has another version, configuration or data.
        """
        problems: list[str] = []
        for file in (self._last, self._previous):
            try:
                content = file.read_bytes()
            except FileNotFoundError:
                if file == self._last and self._previous.exists():
                    problems.append(f"{file.name} is missing")  # a crash cannot cause this
                continue
            try:
                checkpoint = self._parse(file, content)
            except Damaged as damage:
                problems.append(f"{file.name} is damaged ({damage})")
                continue
            if problems and not may_go_back:
                raise ConfigError(
                    f"{problems[0]}, and the previous one cannot be used: with unseeded correlated noise, or unseeded "
                    "noise on sums of records (trusts-server), a round whose result was seen must not be made twice. "
                    "Start a new run in another folder"
                )
            if problems:
                _log.warning(
                    "%s: continuing from %s, round %d", problems[0], file.name, checkpoint.progress.rounds_done
                )
            return checkpoint
        if problems:
            raise ConfigError(
                f"{self._last.parent} cannot be resumed: {'; '.join(problems)}. The ledgers list all releases; start a "
                "new run in another folder"
            )
        return None

    def _parse(self, file: Path, content: bytes) -> Checkpoint:
        checksum, _, body = content.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            raise Damaged(f"checksum mismatch ({len(content)} bytes)")
        form, _, rest = body.partition(b"\n")
        if form != b"%d" % FORMAT:
            raise ConfigError(
                f"{file} has format {form[:20].decode(errors='replace')}, this version reads {FORMAT}: resume the run "
                "with the version that began it"
            )
        header, _, payload = rest.partition(b"\n")
        try:
            metadata: dict[str, Any] = json.loads(header)
            self._check_origin(file, metadata)
            progress = Progress(**{field.name: metadata["progress"][field.name] for field in fields(Progress)})
            tensors = load(payload)
            state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name != "prompt"}
            return Checkpoint(progress=progress, prompt=tensors["prompt"], state=state)
        except (KeyError, TypeError, SafetensorError) as error:
            raise Damaged(f"{type(error).__name__}: {error}") from error

    def _check_origin(self, file: Path, origin: Mapping[str, Any]) -> None:
        """Refuse a checkpoint from another version, another configuration or other data.

        Raises:
            ConfigError: If one of them differs. The message names the differences.
        """
        mine = self._made_by
        if origin["version"] != mine["version"]:
            raise ConfigError(
                f"{file} was written by fl-dualpriv {origin['version']}, this is {mine['version']}: resume the run "
                "with the version that began it"
            )
        then, now = origin["config"], mine["config"]
        changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        if changed:
            told = "; ".join(f"{key} = {now.get(key)!r}, was {then.get(key)!r}" for key in changed[:5])
            raise ConfigError(
                f"{file} is of a run with another configuration: {told}. Start a new run in another folder"
            )
        if origin["records"] != mine["records"]:
            raise ConfigError(
                f"{file} is of a run over other data: the clients' numbers of records differ. Start a new run in "
                "another folder"
            )
        then, now = origin["data"], mine["data"]
        if changed := [name for name in now if then.get(name) != now[name]]:
            raise ConfigError(
                f"{file} is of a run over other data: {', '.join(changed)} changed since. Put the data back into their "
                "earlier state, or start a new run in another folder"
            )

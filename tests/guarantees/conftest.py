"""What tests of the guarantees share: a node as a server finds it, and a process that dies where it is told to."""

import io
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.privacy.filters.budget import Budget

if TYPE_CHECKING:
    from fl_dualpriv import messages
    from fl_dualpriv.client.node import RunContext

ROOT = Path(__file__).parents[2]
OURS = {
    str(ROOT / name)
    for name in (
        "fl_dualpriv/client/round.py",
        "fl_dualpriv/client/step.py",
        "fl_dualpriv/client/state.py",
        "fl_dualpriv/files.py",
        "fl_dualpriv/server/strategy.py",
        "fl_dualpriv/server/accounting.py",
        "fl_dualpriv/privacy/filters/budget.py",
        "fl_dualpriv/privacy/ledger.py",
        "fl_dualpriv/privacy/noise.py",
        "fl_dualpriv/privacy/release.py",
    )
}
"""Whose lines are points at which a process can die."""

Notes = list[dict[str, Any]]
Mutation = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, kw_only=True)
class TinyNode:
    """Rounds of the one client of a node, asked for as a server would.

    Attributes:
        run_context: Model, data and plan, made once.
        folder: Of the client's state.
        budget: The owner's limits, or None.
    """

    run_context: "RunContext"
    folder: Path
    budget: Budget | None = None

    def train(self, server_round: int, token: str = "t", prompt: Tensor | None = None) -> "messages.Uploads":
        # Late: most tests here need no model, and its import takes seconds.
        from fl_dualpriv import messages
        from fl_dualpriv.client.node import Node
        from fl_dualpriv.client.round import TrainRound

        node = Node(
            run_context=self.run_context, index=0, run_folder=self.folder, state_dir=self.folder, budget=self.budget
        )
        task = messages.TrainRequest(
            partitions=(0,),
            global_prompt=torch.zeros(self.run_context.prompt_shape) if prompt is None else prompt,
            server_round=server_round,
            run_token=token,
            terms=self.run_context.terms,
        )
        return TrainRound(node, task).run()


@pytest.fixture(scope="session")
def make_run_context(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "RunContext"]:
    """A population of one client with 22 images, one of which cannot be read; three rounds of two steps.

    ``make_setting({"privacy.arithmetic": "integer"})``: other settings.
    """
    images, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (images / name).mkdir()
        for i in range(16):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"{i:02d}.png")
    base: dict[str, Any] = {
        "population": 1,
        "rounds": 3,
        "train.local-steps": 2,
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.noise-multiplier": 4.0,
        "privacy.record.delta": 1e-3,
        "data.ref": "folder",
        "data.path": str(images),
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
        "output.dir": str(images / "out"),
    }
    defaults = app_defaults(ROOT)

    def make(changes: dict[str, Any] | None = None) -> "RunContext":
        from fl_dualpriv.client.node import RunContext

        return RunContext(RunConfig.from_run_config(defaults | base | (changes or {})))

    return make


@pytest.fixture(scope="session")
def tiny_node() -> type[TinyNode]:
    """Where test modules get the class from: they cannot import this file."""
    return TinyNode


# --- a process that dies ----------------------------------------------------------------------------------------------


class Tracer:
    """Counts the points of this process and kills it at one of them.

    Args:
        notes: Where it says what is about to leave, and what of the disk is safe from a power cut.
        root: Folder whose files are watched.
        kill_at: Number of the fatal point, from 1; 0: none.
        lines: Whether each line of our code is a point, too.
    """

    def __init__(self, notes: Path, root: Path, kill_at: int, lines: bool) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_SYNC)
        self._root, self._kill_at, self._lines = root, kill_at, lines
        self.points = 0
        self.doing: tuple[str, int] = ("", 0)

    def note(self, **what: Any) -> None:
        os.write(self._notes, json.dumps(what).encode() + b"\n")

    def point(self) -> None:
        self.points += 1
        if self.points == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watches(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self._root)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        from fl_dualpriv.privacy import release
        from fl_dualpriv.server import strategy as server

        open_, fsync = io.open, os.fsync

        def traced_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if set(mode) <= set("rbt") or not self.watches(file):
                return open_(file, mode, *rest, **named)
            self.point()
            return _TracedFile(open_(file, mode, *rest, **named), self)

        def traced_fsync(handle: int) -> None:
            self.point()
            fsync(handle)
            path = Path(f"/proc/self/fd/{handle}").readlink()
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                self.note(names_of=str(path), names=[entry.name for entry in path.iterdir()])
            else:
                self.note(file=str(path), size=found.st_size)
            self.point()

        patch.setattr(io, "open", traced_open)
        patch.setattr(os, "fsync", traced_fsync)
        for name in ("mkdir", "replace", "rename", "unlink"):
            patch.setattr(os, name, self._around(getattr(os, name)))
        for module, name in (
            (release, "gaussian_noise"),
            (release, "rounded_gaussian"),
            (server, "gaussian_noise"),
        ):
            patch.setattr(module, name, self._draw(getattr(module, name)))
        if self._lines:
            sys.settrace(self._enter)

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any, **named: Any) -> Any:
            self.point()
            result = call(*arguments, **named)
            self.point()
            return result

        return traced

    def _draw(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            self.note(drawn=self.doing)
            return self._around(call)(*arguments)

        return traced

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in OURS else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.point()
        return self._line


class _TracedFile:
    """A file whose writes can be cut off in the middle."""

    def __init__(self, file: Any, tracer: Tracer) -> None:
        self._file, self._tracer, self._pending = file, tracer, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_TracedFile":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        self._tracer.point()
        self._pending.append(data)
        return len(data)

    def flush(self) -> None:
        for data in self._pending:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self._file.write(part)
                self._file.flush()
                self._tracer.point()
        self._pending = []

    def close(self) -> None:
        self.flush()
        self._file.close()


def _in_a_process(
    notes: Path,
    root: Path,
    play: Callable[[Tracer], None],
    kill_at: int = 0,
    lines: bool = False,
    mutate: Mutation | None = None,
) -> Notes:
    """Play in a process of its own until its fatal point; all notes so far, with those of processes before it."""
    child = os.fork()
    if child == 0:
        try:
            patch, tracer = pytest.MonkeyPatch(), Tracer(notes, root, kill_at, lines)
            tracer.install(patch)
            if mutate is not None:
                mutate(patch)
            play(tracer)
            sys.settrace(None)
            tracer.note(points=tracer.points)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if kill_at:
        assert os.WIFSIGNALED(status), "it was not killed: there are fewer points than that"
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        assert status == 0
    return [json.loads(line) for line in notes.read_text().splitlines()]


def _lose_power(root: Path, notes: Notes, *, keep_prompts: bool) -> None:
    """Leave of the files below ``root`` what was synced: contents as far as synced, under names that were synced.

    Prompts are never synced; a power cut may spare them all the same.
    """
    names, sizes = dict[str, set[str]](), dict[str, int]()
    for note in notes:
        if "names_of" in note:
            names[note["names_of"]] = set(note["names"])
        elif "file" in note:
            sizes[note["file"]] = note["size"]
    for file in [path for path in root.rglob("*") if path.is_file()]:
        steps = [file, *file.parents]
        below = steps[: steps.index(root)]
        named = all(path.name in names.get(str(path.parent), set()) for path in below)
        if file.suffix == ".safetensors":
            named = keep_prompts and named
        elif named:
            os.truncate(file, sizes.get(str(file), 0))
        if not named:
            file.unlink()


@pytest.fixture(scope="session")
def in_a_process() -> Callable[..., Notes]:
    """See `_in_a_process`."""
    return _in_a_process


@pytest.fixture(scope="session")
def lose_power() -> Callable[..., None]:
    """See `_lose_power`."""
    return _lose_power

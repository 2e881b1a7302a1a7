"""Where the file system has no hard links, the state before the last is kept all the same."""

import errno
import os
import shutil
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fl_dualpriv import files
from fl_dualpriv.client.state import ClientFolder, PersonalState
from fl_dualpriv.files import keep_previous
from fl_dualpriv.run.checkpoint import FILES, Checkpoint, CheckpointFolder, Progress
from tests.no_hard_links import cannot_refuse, refuse_hard_links

ROUNDS = 3


def checkpoints(folder: Path) -> None:
    kept = CheckpointFolder(folder, {}, [5], {})
    for done in range(1, ROUNDS + 1):
        progress = Progress(run_token="t", rounds_done=done, events=done, deliveries=0, failures=0, last_failure=None)
        kept.write(Checkpoint(progress=progress, prompt=torch.full((2, 3), float(done)), state={}))
    (folder / FILES[0]).write_bytes(b"")  # damaged: now the one before must be whole
    found = kept.read(may_go_back=True)
    assert found is not None
    assert found.progress.rounds_done == ROUNDS - 1
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert stat.S_IMODE((folder / FILES[1]).stat().st_mode) == 0o600  # a strategy's memory may be secret


def personal_prompts(folder: Path) -> None:
    client = ClientFolder(folder)
    for done in range(1, ROUNDS + 1):
        state = PersonalState(
            personal=torch.full((4, 6), float(done)), row_basis=torch.ones(2, 6), server_round=done, release_memory={}
        )
        client.save(state, torch.ones(4, 6), "mine")
    assert client.load("mine", 4, 6, 2).server_round == ROUNDS
    previous = client.load("mine", 4, 6, 2, previous=True)
    assert previous.server_round == ROUNDS - 1
    assert torch.equal(previous.personal, torch.full((4, 6), ROUNDS - 1.0))
    assert {path.name for path in folder.iterdir()} == {"prompt.safetensors", "prompt.previous.safetensors"}


@pytest.mark.skipif(bool(cannot_refuse()), reason=cannot_refuse() or "it can")
@pytest.mark.parametrize("write", [checkpoints, personal_prompts])
@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])  # vfat; network mounts; FUSE
def test_rounds_are_kept_where_the_kernel_refuses_hard_links(
    write: Callable[[Path], None], error: int, tmp_path: Path
) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refuse_hard_links(error)
            write(tmp_path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("write", [checkpoints, personal_prompts])
def test_rounds_are_kept_where_there_are_hard_links(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)


@pytest.mark.parametrize("fails", ["half a copy", "the sync", "the rename"])
def test_a_copy_that_is_cut_off_leaves_both_files_whole(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, previous = tmp_path / "last", tmp_path / "previous"
    last.write_bytes(b"new" * 1000)
    previous.write_bytes(b"old" * 1000)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:1500])
        full()

    monkeypatch.setattr(os, "link", refused)
    name = {"half a copy": (shutil, "copyfile"), "the sync": (files, "_sync"), "the rename": (Path, "replace")}[fails]
    monkeypatch.setattr(*name, half if fails == "half a copy" else full)
    with pytest.raises(OSError, match="No space left"):
        keep_previous(last, previous)
    assert last.read_bytes() == b"new" * 1000
    assert previous.read_bytes() == b"old" * 1000
    assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}

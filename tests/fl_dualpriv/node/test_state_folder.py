"""The folder of a node's state is for its owner only, and `fl-dualpriv node check` agrees with what it made."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_dualpriv.node import check as node_check
from fl_dualpriv.node.file import NodeFile


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)  # as most systems have it
    yield
    os.umask(before)


def test_a_check_does_not_complain_of_the_folder_that_it_made(umask: None, tmp_path: Path) -> None:
    state = tmp_path / "made" / "state"
    node = NodeFile(state_dir=state, data_path=None, budget=None, apps=())
    for _ in range(2):
        found = node_check._state(node)
        assert (found.verdict, "can be written to" in found.says) == ("good", True), found.says
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    state.chmod(0o755)  # the owner's decision stays, and is named
    assert node_check._state(node).verdict == "note"
    assert stat.S_IMODE(state.stat().st_mode) == 0o755

"""What the owner of a node is told of the data before the node joins, and that it does not join for nothing."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.data.load import load_data, load_questions
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.node import check as node_check
from fl_dualpriv.node.data import before_joining
from fl_dualpriv.node.file import NodeFile


@pytest.mark.parametrize("path", ["images\\\\{}.png", "{}.jpg"])
def test_questions_whose_images_cannot_be_opened_do_not_count(tmp_path: Path, path: str):
    """Written on Windows, or moved without their images."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    rows = ["image,question,answer", *(f"{path.format(i)},What?,this" for i in range(3))]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    for split in ("val", "test"):
        (tmp_path / f"{split}.csv").write_text("image,question,answer\nimages/0.png,What?,this")
    load_questions.cache_clear()
    node = NodeFile(state_dir=None, data_path=tmp_path, budget=None, apps=())
    found = node_check._data(node)
    assert (found.verdict, "0 usable of 3, 3 whose image is missing" in found.says) == ("bad", True), found.says
    assert ("write its path with / in place of" in found.says) is ("\\" in path)
    with pytest.raises(ConfigError, match="this node does not join:\n  none of the 3 training questions can be used"):
        before_joining(node)
    (tmp_path / "train.csv").write_text("\n".join([*rows, "images/1.png,What?,this", "images/1.png,,this"]))
    load_questions.cache_clear()
    found = node_check._data(node)
    assert found.verdict == "note"
    assert "1 usable of 5, 3 whose image is missing, 1 without usable words" in found.says
    assert "train.csv, line 6: question must be a non-empty text" in found.says
    assert before_joining(node)[0].endswith(" types, 1 usable of 5, 3 whose image is missing, 1 without usable words")


def test_a_node_without_a_usable_record_is_not_started(tmp_path: Path):
    for name in ("cat", "dog"):
        for split in ("train", "val", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / f"{i}.png")
    text = f"""state-dir = "{tmp_path / "state"}"
data-path = "{tmp_path / "images"}"
[server]
address = "127.0.0.1:1"
insecure = true
[app]
allowed = ["{"0a" * 32}"]
"""
    (tmp_path / "node.toml").write_text(text)
    for file in (tmp_path / "images" / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    load_data.cache_clear()
    refused = CliRunner().invoke(cli.app, ["node", "start", str(tmp_path / "node.toml")])
    assert refused.exit_code == 2
    assert "this node does not join" in refused.stderr
    assert "none of the 4 training images can be used: 4 cannot be read" in refused.stderr
    assert "cat/0.png cannot be read" in refused.stderr

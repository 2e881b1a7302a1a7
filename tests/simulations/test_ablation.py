"""The ablation: its grid is whole and valid, its statistics are what they are called, and its command runs."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.errors import ConfigError
from simulations import ablation

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "simulations" / "configs" / "ablation-dualpriv.toml"


@pytest.fixture
def document() -> dict[str, Any]:
    return tomllib.loads(SHIPPED.read_text())


def test_the_shipped_grid_is_valid_and_no_two_runs_share_a_folder(document: dict[str, Any]):
    cells = ablation.cells_of(document)
    rows = sum(len(ablation.on(document, base)) for base in document["bases"])
    assert rows >= len(document["variants"]) + 10
    assert len(cells) == rows * len(document["epsilons"]) * len(document["seeds"])
    assert len({cell.folder for cell in cells}) == len(cells)
    assert {1.0, 4.0, math.inf} == set(document["epsilons"])
    assert len(document["seeds"]) >= 5
    by_name = {cell.name: cell.settings for cell in cells if cell.base == "demo" and cell.epsilon == 4}
    first = by_name.pop(document["variants"][0]["name"])
    assert first["pruning.visual-keep-ratio"] == first["pruning.update-keep-ratio"] == 1
    assert all(settings != first for settings in by_name.values())


def test_no_noise_at_infinity(document: dict[str, Any]):
    for cell in ablation.cells_of(document):
        mechanism = cell.settings["privacy.record.mechanism"]
        assert mechanism == ("gaussian" if math.isfinite(cell.epsilon) else "none")
        assert mechanism == "none" or cell.settings["privacy.record.epsilon"] == cell.epsilon


def test_what_is_wrong_is_said_before_the_first_run(document: dict[str, Any]):
    document["variants"][1]["keyz"] = {}
    with pytest.raises(ConfigError, match="unknown keyz"):
        ablation.cells_of(document)
    del document["variants"][1]["keyz"]
    document["variants"][1]["keys"] = {"pruning.update-keep-ratio": 2.0}
    with pytest.raises(ConfigError, match=r"'tokens pruned, dropped' on demo, ε = 1: .*\n.*update-keep-ratio"):
        ablation.cells_of(document)


def test_a_difference_is_paired_and_has_students_interval():
    # Gaps 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303, so ± 4.303 / sqrt(3) = 2.484.
    assert ablation.difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == "+2.0 ± 2.5"
    # Gaps 2, 2, 2.3: mean 2.1, sd 0.1732, ± 0.430: zero is outside.
    assert ablation.difference([2.0, 2.0, 2.3], [0.0, 0.0, 0.0]) == "**+2.1 ± 0.4**"
    assert ablation.difference([1.0], [0.5]) == "+0.5"


def test_the_table_has_a_row_a_variant(document: dict[str, Any]):
    document["seeds"] = [0, 1]
    names = [variant["name"] for variant in document["variants"]]
    scores = {
        (name, epsilon, seed): 0.5 + 0.01 * i + 0.001 * seed
        for i, name in enumerate(names)
        for epsilon in document["epsilons"]
        for seed in (0, 1)
    }
    lines = ablation.table(document, "demo", scores).splitlines()
    assert len(lines) == 2 + len(names)
    # 50.0 and 50.1: mean 50.05, standard deviation 0.07.
    assert lines[2].startswith(f"| {names[0]} | 50.0 ± 0.1 |  |")
    assert "**+1.0 ± 0.0**" in lines[3]


@pytest.mark.slow
def test_the_command_runs_and_does_not_repeat_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = tomllib.loads(SHIPPED.read_text())
    keys = {"rounds": 1, "train.local-steps": 1, "method": "promptfl"}
    text = "\n".join(
        [
            'seeds = [0]\nepsilons = [4.0]\n[common]\n"evaluation.split" = "val"',
            f'[bases.demo]\ntitle = "small"\nconfig = "{small["bases"]["demo"]["config"]}"',
            "keys = {" + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in keys.items()) + "}",
            '[[variants]]\nname = "one"\n[[variants]]\nname = "two"\nkeys = {"pruning.update-keep-ratio" = 0.5}',
        ]
    )
    (tmp_path / "small.toml").write_text(text)
    arguments = ["ablation", str(tmp_path / "small.toml"), "--runs", str(tmp_path / "runs"), "--workers", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "table.md")])
    ablation.main()
    written = (tmp_path / "table.md").read_text()
    assert "| one |" in written
    assert "| two |" in written
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert len(stamps) == 2
    ablation.main()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

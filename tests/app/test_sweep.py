"""`fl-dualpriv sweep` and `table` through the command: checked first, cut off and continued, on two Ray machines."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli.sweeping import cells_to_run, open_sweep
from fl_dualpriv.files import read_tensors
from tests.fl_dualpriv.sweep.sweep_files import pretend, summary

ROOT = Path(__file__).parents[2]
GRID = """
title = "Two by two by two"
base = "by-class.toml"
seeds = [0, 1]
[set]
rounds = 1
population = 3
"train.local-steps" = 1
"evaluation.every" = 1000
"resources.feature-cache" = "off"
"pruning.visual-keep-ratio" = 1.0
[axes]
"privacy.record.epsilon" = [4.0, inf]
[[rows]]
name = "ours"
[[rows]]
name = "shared"
method = "promptfl"
"""


def sweep_file(folder: Path, text: str = GRID) -> Path:
    (folder / "by-class.toml").write_bytes((ROOT / "simulations" / "configs" / "by-class.toml").read_bytes())
    file = folder / "grid.toml"
    file.write_text(text, encoding="utf-8")
    return file


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def start(*words: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fl_dualpriv.cli.main", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", cwd=ROOT)


def test_a_dry_run_prints_cells_cost_and_what_is_missing(tmp_path: Path) -> None:
    text = GRID.replace("rounds = 1\n", 'rounds = 1\n"data.ref" = "folder"\n"data.path" = "/nowhere/images"\n', 1)
    file = sweep_file(tmp_path, text.replace("population = 3\n", ""))
    done = call("sweep", file, "--app", ROOT, "--runs", tmp_path / "runs", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "shared, ε = ∞: seeds 0, 1" in done.output
    assert "8 cells, 0 trials, 0 runs of finalists; 0 finished" in done.output
    assert "no such folder or file" in done.output
    assert not (tmp_path / "runs").exists()
    refused = call("sweep", file, "--app", ROOT, "--runs", tmp_path / "runs")
    assert refused.exit_code == 2
    assert "no cell was started, because something is missing" in refused.output
    assert not (tmp_path / "runs").exists()


def test_weights_that_a_cell_would_download_are_named(tmp_path: Path) -> None:
    names = '"backbone.name" = "ViT-B-16"\n"backbone.pretrained" = "openai"\n'
    file = sweep_file(tmp_path, GRID.replace("rounds = 1\n", f"rounds = 1\n{names}", 1))
    done = call("sweep", file, "--app", ROOT, "--runs", tmp_path / "runs", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "the weights are not in the cache; the first cell downloads them" in done.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('method = "promptfl"', 'method = "promptfll"', "promptfll"),
        ('method = "promptfl"', "train.local-steps = 0", "train.local-steps"),
        ("seeds = [0, 1]", "sedes = [0, 1]", "did you mean seeds?"),
        ("rounds = 1\n", 'rounds = 1\n"train.rate" = 3\n', "train.rate"),
    ],
)
def test_bad_cells_are_refused_before_the_first_run(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = sweep_file(tmp_path, GRID.replace(old, new, 1))
    done = call("sweep", file, "--app", ROOT, "--runs", tmp_path / "runs")
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def test_a_table_without_runs_says_what_to_do(tmp_path: Path) -> None:
    done = call("table", sweep_file(tmp_path), "--app", ROOT, "--runs", tmp_path / "runs")
    assert done.exit_code == 2
    assert "run `fl-dualpriv sweep` first" in done.output


def test_auto_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = call("sweep", sweep_file(tmp_path), "--app", ROOT, "--runs", tmp_path / "r", "--ray-address", "auto")
    assert done.exit_code == 2
    assert "the environment has no RAY_ADDRESS" in done.output


PAPER = sorted((ROOT / "simulations" / "paper").glob("*-*.toml"))


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_published_tables_dry_run_names_its_cells_and_what_is_missing(file: Path, tmp_path: Path) -> None:
    done = call("sweep", file, "--runs", tmp_path / "runs", "--dry-run")
    assert done.exit_code == 0, done.output
    assert re.search(r"^\d+ cells, \d+ trials", done.output, flags=re.MULTILINE)
    assert "missing here: nothing" not in done.output
    assert "no such folder or file" in done.output
    assert "the weights are not in the cache" in done.output


@pytest.mark.parametrize("words", [("--out",), ("--json",)])
def test_a_table_that_cannot_be_written_is_one_line(tmp_path: Path, words: tuple[str]) -> None:
    file = sweep_file(tmp_path)
    opened = open_sweep(file, tmp_path / "runs", ROOT)
    for cell in cells_to_run(opened, []):
        pretend(cell, opened.runs, summary(0.5))
    done = call("table", file, "--app", ROOT, "--runs", tmp_path / "runs", *words, tmp_path)
    assert done.exit_code == 2
    assert "cannot be written" in done.output
    done = call(
        "table", file, "--app", ROOT, "--runs", tmp_path / "runs", "--seeds", "1", "--json", tmp_path / "j.json"
    )
    content = json.loads((tmp_path / "j.json").read_text())
    assert content["command"].count(" --seeds 1") == 2
    assert content["missing runs"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ray-address", "127.0.0.1:1"), "nothing answers there"),
        (("--ray-address", "nonsense"), "must be HOST:PORT"),
        (("--ray-address", "ray://127.0.0.1:1"), "nothing answers there"),
        (("--runs", "/proc/x"), "cannot be used for runs"),
    ],
)
def test_machines_and_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, words: tuple[str, str], message: str
) -> None:
    more = () if words[0] == "--runs" else ("--runs", tmp_path / "runs")
    done = call("sweep", sweep_file(tmp_path), "--app", ROOT, *more, *words)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_key_of_the_command_line_must_not_be_an_axis(tmp_path: Path) -> None:
    done = call("sweep", sweep_file(tmp_path), "--app", ROOT, "--set", "privacy.record.epsilon=2")
    assert done.exit_code == 2
    assert "is an axis" in done.output


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("|")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_ends_with_the_table_of_one_that_was_not_killed(tmp_path: Path) -> None:
    file, cut, whole = sweep_file(tmp_path), tmp_path / "cut", tmp_path / "whole"
    process = start("sweep", file, "--app", ROOT, "--runs", cut)
    deadline = time.monotonic() + 200
    while not list(cut.glob("*/summary.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The workers of Ray end with the process that started them; then the lock of the folder is free.
    finished = {path: path.stat().st_mtime_ns for path in cut.glob("*/summary.json")}
    assert 1 <= len(finished) < 8
    time.sleep(5)
    again = start("sweep", file, "--app", ROOT, "--runs", cut)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert re.search(rf"table: 8 runs, [{len(finished)}-7] finished before", output)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    other = start("sweep", file, "--app", ROOT, "--runs", whole)
    uninterrupted, _ = other.communicate(timeout=300)
    assert other.returncode == 0, uninterrupted
    assert len(table_of(output)) == 2 + 2 * 4
    assert table_of(output) == table_of(uninterrupted)
    prompts = sorted(path.relative_to(cut) for path in cut.glob("*/prompts/global.safetensors"))
    assert len(prompts) == 8
    for path in prompts:
        ours, theirs = (read_tensors(folder / path)[0]["global"] for folder in (cut, whole))
        assert ours.equal(theirs), path
    done = call("table", file, "--app", ROOT, "--runs", cut, "--json", tmp_path / "out.json")
    assert table_of(done.output) == table_of(output)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["seeds"] == [0, 1]
    assert len(content["lines"]) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_published_table_on_made_data_says_so_and_has_no_latex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = [sys.executable, "-m", "tools.make_paper_shapes", "--out", str(tmp_path), "--train", "2", "--test", "1"]
    subprocess.run(make, cwd=ROOT, check=True)
    monkeypatch.chdir(tmp_path)
    sets = {"backbone.name": "local-dir:clip", "backbone.pretrained": "", "rounds": "1", "train.sampling-rate": "0.2"}
    common: list[str | Path] = [ROOT / "simulations" / "paper" / "dpfpl-cifar100.toml", "--seeds", "1"]
    common += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fl_dualpriv.cli.main", "sweep", *map(str, common)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made data, not comparable" in done.stdout
    assert "| 66.23 |" in done.stdout  # the published number beside ours
    page = call("table", *common, "--out", tmp_path / "page.md")
    assert page.exit_code == 0, page.output
    assert "**Made data, not comparable.**" in (tmp_path / "page.md").read_text()
    refused = call("table", *common, "--format", "latex")
    assert refused.exit_code == 2
    assert "there is no LaTeX table" in refused.output


@pytest.fixture
def two_machines() -> Iterator[str]:
    """A Ray cluster of two raylets with separate object stores; yields its address."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cells_and_clients_run_on_both_machines_of_a_cluster(
    two_machines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", two_machines)
    process = start("sweep", sweep_file(tmp_path), "--app", ROOT, "--runs", tmp_path / "runs", "--ray-address", "auto")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    used = re.search(r"runs by machine: .*: (\d+), .*: (\d+)", output)
    assert used is not None, output
    assert sum(map(int, used.groups())) == 8
    common = ["--set", "rounds=1", "--set", "population=4", "--set", "train.local-steps=1", "--app", str(ROOT)]
    common += ["--set", "resources.feature-cache=off", "--set", "privacy.randomness=seeded"]
    config = tmp_path / "by-class.toml"
    for engine, more in (("local", []), ("ray", ["--set", f"resources.ray-address={two_machines}"])):
        run = start("run", config, "--engine", engine, "--out", tmp_path / engine, *common, *more)
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0, said
    assert re.search(r"actors by machine: .*: 1, .*: 1", said), said
    for name in ["prompts/global.safetensors", *(f"clients/client-{i:03d}/prompt.safetensors" for i in range(4))]:
        ours, theirs = (read_tensors(tmp_path / engine / name)[0] for engine in ("local", "ray"))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
    assert not list((tmp_path / "ray").glob("fdp-*"))  # what the machines shared for the run is gone

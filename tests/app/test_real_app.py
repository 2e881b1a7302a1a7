"""The project's own app through its own command, on both engines: the same prompts, and true exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fl_dualpriv.files import read_tensors
from fl_dualpriv.run.cpus import usable_cpus
from fl_dualpriv.run.file_kinds import read_totals, results_in, without_kind
from tests.app.run_folders import results, write_images

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("own")
    write_images(root)
    file = root / "own.toml"
    file.write_text(
        f"""
rounds = 2
population = 3
train.local-steps = 2
privacy.randomness = "seeded"
privacy.record.delta = 1e-3
data.path = "{root / "images"}"
backbone.name = "local-dir:{tiny_clip_dir}"
"""
    )
    return file


def command(config: Path, out: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    arguments = ["run", str(config), "--app", str(ROOT), "--out", str(out), *extra]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fl_dualpriv.cli.main", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def prompts(out: Path) -> dict[str, torch.Tensor]:
    files = [out / "prompts" / "global.safetensors", *sorted(out.glob("clients/*/prompt.safetensors"))]
    return {f"{f.parent.name} {name}": tensor for f in files for name, tensor in read_tensors(f)[0].items()}


def test_both_engines_end_with_the_same_prompts_bit_by_bit(config: Path, tmp_path: Path) -> None:
    for engine in ("local", "ray"):
        done = command(config, tmp_path / engine, "--engine", engine)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads((tmp_path / engine / "summary.json").read_text())
        assert (summary["engine"], read_totals(tmp_path / engine)["failures"]) == (engine, 0)
        assert without_kind(tmp_path / engine) == []
        assert f"made of the releases in the table: {', '.join(results_in(tmp_path / engine))}; no" in done.stdout
    # The engine and the folder are in the summary; nothing else in a result tells the two runs apart.
    assert results(tmp_path / "local") == results(tmp_path / "ray")
    local, ray = prompts(tmp_path / "local"), prompts(tmp_path / "ray")
    assert list(local) == list(ray)
    assert len(local) == 1 + 3 * 3  # the global prompt; three tensors for each of three clients
    assert all(torch.equal(local[name], ray[name]) for name in local)
    assert all(bool(tensor.any()) for tensor in local.values())


def test_six_clients_on_two_nodes(config: Path, tmp_path: Path) -> None:
    few = ["--set", "population=6", "--set", "supernodes=2", "--set", "data.partition=iid"]
    for engine in ("local", "ray"):
        done = command(config, tmp_path / engine, "--engine", engine, *few)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"6 clients on 2 nodes, engine {engine}" in done.stdout
        assert "peak memory: " in done.stdout
        summary = json.loads((tmp_path / engine / "summary.json").read_text())
        assert (summary["engine"], summary["population"]) == (engine, 6)
        assert read_totals(tmp_path / engine)["failures"] == 0
        events = [len(f.read_text().splitlines()) for f in (tmp_path / engine).glob("clients/*/ledger.jsonl")]
        assert events == [2] * 6  # two rounds, each in its own client's ledger
    local, ray = prompts(tmp_path / "local"), prompts(tmp_path / "ray")
    assert list(local) == list(ray)
    assert len(local) == 1 + 6 * 3
    assert all(torch.equal(local[name], ray[name]) for name in local)
    actors = len(list((tmp_path / "ray").glob("actors/actor-*.json")))
    assert 1 <= actors <= min(2, usable_cpus())


def test_a_missing_data_path_is_one_message_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    done = command(config, tmp_path / "out", "--engine", "ray", "--set", "data.path=/no/such/images")
    assert done.returncode == 2  # nothing was started
    assert "/no/such/images" in done.stderr
    assert "does not exist" in done.stderr

"""The folder of a run: what may be used again, what is never replaced, and the exit status of what did not begin."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fl_dualpriv.cli import job as run_job
from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli import run as run_command
from fl_dualpriv.flower.engine import RunFailed

ROOT = Path(__file__).parents[3]
Engine = Callable[[run_job.Engine, run_job.Job], None]


def ended(_engine: run_job.Engine, job: run_job.Job) -> None:
    (job.out / "operator").mkdir()
    (job.out / "operator" / "totals.json").write_text('{"failures": 0, "seconds": 1.0}')
    nothing = dict.fromkeys(("local", "neighbour", "harmonic_mean", "general", "new_client"))
    accuracy = {"zero_shot": nothing, "free": nothing | {"rival": "un-tuned"}, "final": nothing}
    about = {"method": "dpfpl", "engine": "local", "seed": 0, "rounds": 1, "population": 2, "randomness": "os"}
    (job.out / "summary.json").write_text(json.dumps({**about, "accuracy": accuracy, "privacy": []}))


def never(_engine: run_job.Engine, _job: run_job.Job) -> None:
    raise AssertionError("the engine was started")


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command with an engine that is a stand-in."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "quick.toml"
    config.write_text("rounds = 2\n")

    def call(*words: str, engine: Engine = ended, out: Path | None = None) -> Result:
        monkeypatch.setattr(run_command, "run_engine", engine)
        monkeypatch.setattr(run_command.signal, "signal", lambda *_: None)
        place = ["--out", str(out or tmp_path / "out")]
        return CliRunner().invoke(cli.app, ["run", str(config), "--app", str(ROOT), *place, *words])

    return call


def test_a_refusal_after_the_start_is_a_failure(invoke: Callable[..., Result]) -> None:
    """Flower's engine raises its own error, and the server app's lies in error.json."""

    def refused(_engine: run_job.Engine, job: run_job.Job) -> None:
        (job.out / "error.json").write_text(json.dumps({"type": "ConfigError", "message": "no", "traceback": ""}))
        raise RunFailed("ConfigError: no")

    def later(_engine: run_job.Engine, job: run_job.Job) -> None:
        (job.out / "checkpoint.bin").write_bytes(b"")
        refused(_engine, job)

    assert [invoke(engine=refused).exit_code, invoke(engine=later).exit_code] == [2, 1]


def test_a_folder_in_which_nothing_ran_is_used_again(invoke: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def failed(_engine: run_job.Engine, job: run_job.Job) -> None:
        assert not (job.out / "error.json").exists()
        for name in ("error.json", "flower.log", "curve.png"):
            (job.out / name).write_text("")
        raise RunFailed("no model")

    for _ in range(2):
        assert invoke(engine=failed).exit_code == 1
    assert invoke().exit_code == 0
    assert not (out / "error.json").exists()
    assert (out / "curve.png").exists()  # it may be anybody's
    for mark in ("rounds.jsonl", "checkpoint.bin", "ledger.jsonl", "clients/client-000"):
        other = tmp_path / mark.partition("/")[0]
        (other / mark).mkdir(parents=True) if "/" in mark else other.mkdir()
        if "/" not in mark:
            (other / mark).touch()
        (other / "error.json").touch()
        refused = invoke(engine=never, out=other)
        assert (refused.exit_code, "holds an earlier run" in refused.output) == (2, True), mark


def test_a_run_that_does_not_start_replaces_nothing(invoke: Callable[..., Result], tmp_path: Path) -> None:
    assert invoke().exit_code == 0
    words = ["--overwrite", "--set", f"data.path={tmp_path / 'nowhere'}"]
    refused = invoke(*words, engine=never)
    assert (refused.exit_code, "does not exist" in refused.output) == (2, True)
    assert (tmp_path / "out" / "summary.json").exists()


def test_names_of_data_sets_stay_and_their_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "odd#name").mkdir()
    (tmp_path / "all.parquet").touch()
    for name, expected in (
        ("owner/name", "owner/name"),
        ("owner/name#part", "owner/name#part"),
        ("saved", f"{tmp_path}/saved"),
        ("saved#part", f"{tmp_path}/saved#part"),
        ("odd#name", f"{tmp_path}/odd#name"),
        ("all.parquet", f"{tmp_path}/all.parquet"),
        ("/else/where", "/else/where"),
    ):
        found = run_job.absolute_paths({"data.path": f"datasets:{name}"}, tmp_path)
        assert found == {"data.path": f"datasets:{expected}"}

"""The front: what it refuses, what it prints, and its exit status. Engines are stand-ins here."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fl_dualpriv.cli import job as run_job
from fl_dualpriv.cli import main as cli
from fl_dualpriv.cli import run as run_command
from fl_dualpriv.cli.progress import Follower, round_text
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.engine import RunFailed
from fl_dualpriv.run.file_kinds import PROGRESS, TOTALS

ROOT = Path(__file__).parents[3]
ROUND: dict[str, Any] = {
    "round": 1,
    "accuracy": {"local": 0.5, "neighbour": None},
    "epsilon": {"record_level": 1.25, "client_level": None},
}
TOLD: dict[str, Any] = {"round": 1, "failures": 0, "seconds": 2.0}
SUMMARY: dict[str, Any] = {
    "method": "dpfpl",
    "engine": "ray",
    "seed": 0,
    "rounds": 2,
    "population": 10,
    "randomness": "os",
    "accuracy": {
        "zero_shot": {"local": 0.4, "neighbour": 0.4, "harmonic_mean": 0.4, "general": 0.4, "new_client": None},
        "free": {
            **{"local": 0.5, "neighbour": 0.4, "harmonic_mean": 0.444, "general": 0.5, "new_client": None},
            "rival": "un-tuned, own class list",
        },
        "final": {"local": 0.55, "neighbour": 0.41, "harmonic_mean": 0.47, "general": 0.45, "new_client": None},
    },
    "privacy": [
        {
            "release": "client upload",
            "unit": "record",
            "relation": "add-remove",
            "sampling": "Poisson q=0.15",
            "releases": 10,
            "epsilon": 3.9,
            "delta": 1e-4,
            "trusts": "nobody",
            "guarantee": "theorem",
            "note": "",
        }
    ],
}
Engine = Callable[[run_job.Engine, run_job.Job], None]


def good_engine(_engine: run_job.Engine, job: run_job.Job) -> None:
    (job.out / "operator").mkdir()
    with (job.out / PROGRESS).open("a") as stream:
        stream.write(json.dumps(TOLD) + "\n" + json.dumps(TOLD | {"round": 2, "failures": 1}) + "\n")
    with (job.out / "rounds.jsonl").open("a") as stream:
        stream.write(json.dumps(ROUND) + "\n" + json.dumps(ROUND | {"round": 2}) + "\n")
    (job.out / TOTALS).write_text(json.dumps({"failures": 1, "seconds": 4.0}))
    (job.out / "summary.json").write_text(json.dumps(SUMMARY))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "quick.toml"
    file.write_text("rounds = 2\n")
    return file


@pytest.fixture
def invoke(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command with an engine that is a stand-in."""

    def call(*words: str, engine: Engine = good_engine, out: Path | None = None) -> Result:
        monkeypatch.setattr(run_command, "run_engine", engine)
        monkeypatch.setattr(run_command.signal, "signal", lambda *_: None)
        place = ["--out", str(out or tmp_path / "out")]
        return CliRunner().invoke(cli.app, ["run", str(config), "--app", str(ROOT), *place, *words])

    return call


def never(_engine: run_job.Engine, _job: run_job.Job) -> None:
    raise AssertionError("the engine was started")


def test_a_good_run_prints_rounds_tables_and_place(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "round 1/2 · 2.0 s · local 50.0 %, neighbour - · ε 1.25 (record)\n" in result.output
    assert "round 2/2 · 2.0 s · local 50.0 %, neighbour - · ε 1.25 (record) · 1 failed\n" in result.output
    assert "+5.0" in result.output  # 55 - 50, the free rival
    assert "theorem" in result.output
    assert f"results: {tmp_path / 'out'}\n" in result.output
    assert "made of the releases in the table: rounds.jsonl, summary.json; no ε covers the other files" in result.output


def test_without_a_theorem_no_file_is_said_to_be_covered(invoke: Callable[..., Result]) -> None:
    def engine(kind: run_job.Engine, job: run_job.Job) -> None:
        good_engine(kind, job)
        nominal = [release | {"guarantee": "nominal"} for release in SUMMARY["privacy"]]
        (job.out / "summary.json").write_text(json.dumps(SUMMARY | {"privacy": nominal}))

    output = invoke(engine=engine).output
    assert "results: " in output
    assert "made of the releases" not in output


@pytest.mark.parametrize(("nodes", "words"), [(0, "10 clients, engine"), (2, "10 clients on 2 nodes, engine")])
def test_the_first_line_says_how_many_nodes_host_the_clients(
    invoke: Callable[..., Result], nodes: int, words: str
) -> None:
    assert words in invoke("--set", f"supernodes={nodes}").output


@pytest.mark.parametrize(
    ("peaks", "line"),
    [
        ([812.4], "peak memory: 1 actor, 812 MiB\n"),
        ([700.0, 812.4], "peak memory: 2 actors, up to 812 MiB each\n"),
        ([], None),
    ],
)
def test_peak_memory_is_printed_from_the_files_of_the_actors(
    invoke: Callable[..., Result], tmp_path: Path, peaks: list[float], line: str | None
) -> None:
    def engine(kind: run_job.Engine, job: run_job.Job) -> None:
        good_engine(kind, job)
        (job.out / "actors").mkdir()
        (job.out / "actors" / "actor-0.json").write_text("{")  # a damaged file is left out
        for pid, peak in enumerate(peaks, 1):
            (job.out / "actors" / f"actor-{pid}.json").write_text(json.dumps({"pid": pid, "peak-mib": peak}))

    output = invoke(engine=engine).output
    assert line in output if line else "peak memory" not in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == SUMMARY
    invoke("--overwrite")
    assert not (tmp_path / "out" / "actors").exists()


def test_every_problem_is_reported_before_anything_starts(invoke: Callable[..., Result], tmp_path: Path) -> None:
    words = [
        "--set",
        "roundz=3",
        "--set",
        "prompt.n-ctx=many",
        "--set",
        "privacy.record.epsilon=-1",
        "--set",
        "nonsense",
    ]
    result = invoke(*words, engine=never)
    assert result.exit_code == 2
    for part in ("roundz", "prompt.n-ctx", "privacy.record.epsilon", "nonsense"):
        assert part in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_config_file_is_a_usage_error(invoke: Callable[..., Result], config: Path) -> None:
    config.unlink()
    result = invoke(engine=never)
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_assignments_override_the_file_which_overrides_the_app(invoke: Callable[..., Result], tmp_path: Path) -> None:
    jobs = []
    result = invoke("--set", "population=3", engine=lambda _, job: (jobs.append(job), good_engine(_, job))[1])
    assert result.exit_code == 0, result.output
    job: run_job.Job = jobs[0]
    assert (job.config.population, job.config.rounds, job.config.prompt.n_ctx) == (3, 2, 4)
    assert job.flat["output.dir"] == job.config.output.dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(RunFailed("ConfigError: no images\n  the whole log: x"), "no images", id="run failed"),
        pytest.param(ConfigError("data.path = /nowhere"), "error: data.path = /nowhere", id="bad input"),
        pytest.param(ZeroDivisionError("oops"), "ZeroDivisionError: oops\n  traceback: ", id="bug"),
    ],
)
def test_a_failing_engine_exits_1_with_one_message_and_2_if_nothing_began(
    error: Exception, expected: str, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    def fail(_engine: run_job.Engine, _job: run_job.Job) -> None:
        raise error

    result = invoke(engine=fail)
    assert result.exit_code == (2 if isinstance(error, ConfigError) else 1)
    assert expected in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "out" / "error.log").exists() is isinstance(error, ZeroDivisionError)


def test_an_engine_that_leaves_no_results_exits_1(invoke: Callable[..., Result]) -> None:
    result = invoke(engine=lambda *_: None)
    assert result.exit_code == 1
    assert "without results" in result.output


def test_ctrl_c_exits_130(invoke: Callable[..., Result]) -> None:
    def interrupted(_engine: run_job.Engine, _job: run_job.Job) -> None:
        raise KeyboardInterrupt

    result = invoke(engine=interrupted)
    assert result.exit_code == 130
    assert "stopped" in result.output


def test_earlier_results_are_kept_unless_overwritten(invoke: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke().exit_code == 0
    (out / "clients" / "0").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    before = (out / "rounds.jsonl").read_text()
    refused = invoke(engine=never)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert (out / "rounds.jsonl").read_text() == before
    assert invoke("--overwrite").exit_code == 0
    assert (out / "rounds.jsonl").read_text() == before  # written anew, not appended to
    assert not (out / "clients").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_a_project_folder_is_never_an_output_folder(invoke: Callable[..., Result], tmp_path: Path) -> None:
    # Its clients/ is source code, and it may hold a summary.json.
    for name in ("pyproject.toml", "summary.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "clients").mkdir()
    result = invoke("--overwrite", engine=never, out=tmp_path)
    assert result.exit_code == 2
    assert (tmp_path / "clients").is_dir()


def test_a_folder_that_holds_no_run_loses_nothing(invoke: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out" / "prompts").mkdir(parents=True)
    (tmp_path / "out" / "prompts" / "mine").write_text("")
    assert invoke("--overwrite").exit_code == 0
    assert (tmp_path / "out" / "prompts" / "mine").exists()


def test_a_run_that_was_cut_off_is_resumed_with_its_own_configuration(
    invoke: Callable[..., Result], config: Path, tmp_path: Path
) -> None:
    out, jobs = tmp_path / "out", []

    def cut_off(_engine: run_job.Engine, job: run_job.Job) -> None:
        (job.out / "checkpoint.bin").write_bytes(b"")
        raise RunFailed("the server was killed")

    failed = invoke("--set", "population=3", "--engine", "local", engine=cut_off)
    assert f"to go on from there: fl-dualpriv run --resume {out}" in failed.output
    config.unlink()
    resume = ["run", "--resume", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_command, "run_engine", lambda engine, job: (jobs.append(job), good_engine(engine, job)))
        patch.setattr(run_command.signal, "signal", lambda *_: None)
        for words in (["--set", "rounds=3"], ["--overwrite"], ["--out", str(out)]):
            assert CliRunner().invoke(cli.app, [*resume, *words]).exit_code == 2
        assert CliRunner().invoke(cli.app, resume).exit_code == 0
        ended = CliRunner().invoke(cli.app, resume)
        nothing = CliRunner().invoke(cli.app, ["run", "--resume", str(tmp_path)])
    (job,) = jobs
    assert (job.engine, job.name, job.config.population, job.config.rounds) == (run_job.Engine.LOCAL, "quick", 3, 2)
    assert (job.flat["output.dir"], job.flat["output.resume"]) == (str(out), True)
    assert (ended.exit_code, nothing.exit_code) == (2, 2)
    assert "its run has ended" in ended.output
    assert "nothing to resume" in nothing.output


def test_a_run_that_ends_while_its_resumption_waits_for_the_folder_is_not_resumed(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a front that was killed live for seconds, and a run needs no more for its last round."""

    def cut_off(_engine: run_job.Engine, _job: run_job.Job) -> None:
        raise RunFailed("the front was killed")

    @contextlib.contextmanager
    def busy(folder: Path, _seconds: float = 0.0) -> Iterator[None]:
        (folder / "summary.json").write_text("{}")
        yield

    invoke("--engine", "local", engine=cut_off)
    monkeypatch.setattr(run_job, "held_alone", busy)
    with pytest.raises(ConfigError, match="its run has ended"):
        run_job.resumed(tmp_path / "out", None, None)


def test_default_folder_is_named_after_the_config(config: Path, tmp_path: Path) -> None:
    job = run_job.prepare(config, [], None, ROOT, overwrite=False)
    assert re.fullmatch(re.escape(str(tmp_path)) + r"/runs/quick-\d{8}-\d{6}", str(job.out))


def test_the_app_is_the_nearest_one_around_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, inner = tmp_path / "app", tmp_path / "app" / "package"
    inner.mkdir(parents=True)
    (app / "pyproject.toml").write_text("[tool.flwr.app]\npublisher = 'x'\n")
    (inner / "pyproject.toml").write_text("[tool.other]\n")  # no Flower app
    assert run_job.find_app(inner / "c.toml") == app
    monkeypatch.chdir(inner)
    assert run_job.find_app(Path("/nowhere/c.toml")) == app
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--app"):
        run_job.find_app(tmp_path / "c.toml")


def test_paths_become_absolute_and_tags_stay() -> None:
    flat = {"data.path": "images", "data.classes": "", "backbone.name": "local-dir:m", "backbone.pretrained": "openai"}
    assert run_job.absolute_paths(flat, Path("/base")) == {
        "data.path": "/base/images",
        "data.classes": "",
        "backbone.name": "local-dir:/base/m",
        "backbone.pretrained": "openai",
    }
    assert run_job.absolute_paths({"backbone.pretrained": "w/x.pt"}, Path("/b")) == {"backbone.pretrained": "/b/w/x.pt"}


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    file = tmp_path / "rounds.jsonl"
    follower = Follower(file)
    assert follower.new() == []
    line = json.dumps(ROUND | {"note": "ä"}, ensure_ascii=False).encode() + b"\n"
    file.write_bytes(line + line[:-5])
    assert [entry["round"] for entry in follower.new()] == [1]
    assert follower.new() == []
    with file.open("ab") as stream:
        stream.write(line[-5:])
    assert len(follower.new()) == 1


def test_a_round_without_scores_and_privacy_is_empty() -> None:
    nothing = {"accuracy": None, "epsilon": {"record_level": None, "client_level": None}}
    assert round_text(ROUND | nothing) == ""


def test_a_run_without_noise_prints_no_table_of_releases(invoke: Callable[..., Result]) -> None:
    def engine(chosen: run_job.Engine, job: run_job.Job) -> None:
        good_engine(chosen, job)
        bare = {"randomness": "seeded", "privacy": [], "notes": ["no differential privacy"]}
        (job.out / "summary.json").write_text(json.dumps(SUMMARY | bare))

    result = invoke(engine=engine)
    assert result.exit_code == 0, result.output
    assert "note: no differential privacy" in result.output
    for word in ("guarantee", "release", "reproducible"):
        assert word not in result.output


def test_help_is_light() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fl_dualpriv.cli.main import app; "
        "r = CliRunner().invoke(app, ['run', '--help']); "
        "sys.exit(r.exit_code or str(sorted({'torch', 'flwr', 'ray', 'matplotlib', 'numpy'} & set(sys.modules))))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert time.monotonic() - start < 20


def test_env_prints_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.flower_env, "installed", lambda: {"FLWR_HOME": "/a b"})
    assert CliRunner().invoke(cli.app, ["env"]).output == "export FLWR_HOME='/a b'\n"


def test_without_the_hook_all_shells_of_a_user_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict[str, str]:
        raise FileNotFoundError

    monkeypatch.setattr(cli.flower_env, "installed", missing)
    monkeypatch.setenv("HOME", str(tmp_path))
    output = [CliRunner().invoke(cli.app, ["env"]).output for _ in range(2)]
    assert output[0] == output[1]
    assert f"FLWR_HOME={tmp_path}/.fl-dualpriv/flower\n" in output[0]
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in output[0]

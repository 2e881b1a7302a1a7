"""kill -9 at random moments, then --resume: 20 of 20 end as if nothing had happened; local processes, and Ray's."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_dualpriv.flower import supervisor
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.run.recorder import RunRecorder
from tests.app.run_folders import (
    BOTH,
    NO_DP,
    Start,
    command,
    ending,
    find_below,
    lines,
    set_words,
    starter,
    write_config,
)

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def start(images: Path, tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setattr(RunRecorder, "write_curve", lambda self, caption: None)  # three quarters of a small run's time
    return starter(images, tiny_clip_dir, tmp_path)


def in_a_process(play: Callable[[], object], kill_after: float | None = None) -> bool:
    """Play in a process of its own; whether it got to the end before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            play()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_twenty_of_twenty_end_bit_by_bit_as_if_nothing_had_happened(start: Start, tmp_path: Path):
    changes = BOTH | {"rounds": 6, "evaluation.every": 1}
    expected = ending(start("whole", changes))  # and this process has all it needs, for those it forks
    began = time.monotonic()
    assert in_a_process(lambda: start("timed", changes))
    seconds, rng, cut_off = time.monotonic() - began, random.Random(0), 0
    for number in range(20):
        out = tmp_path / f"killed-{number}"
        ended = in_a_process(lambda out=out: start(out.name, changes), rng.uniform(0.05, 0.95) * seconds)
        cut_off += not ended
        if number % 2 and not (out / "summary.json").exists():  # killed once more
            in_a_process(lambda out=out: start(out.name, changes, resume=True), rng.uniform(0.0, 0.5) * seconds)
        if not (out / "summary.json").exists():
            assert in_a_process(lambda out=out: start(out.name, changes, resume=True))
        assert ending(out) == expected, number
    assert cut_off >= 15


def test_with_randomness_of_the_system_no_ledger_says_too_little(start: Start, tmp_path: Path):
    """A lost round at the server is a further event, and its ε stands in the table; clients release each round once."""
    changes = BOTH | {"privacy.randomness": "os", "rounds": 6, "evaluation.every": 1, "privacy.client.max-epsilon": 1e3}
    start("whole", changes)
    began = time.monotonic()
    assert in_a_process(lambda: start("timed", changes))
    seconds, rng, lost = time.monotonic() - began, random.Random(1), 0
    for number in range(8):
        out = tmp_path / f"killed-{number}"
        for resume in (False, True, True):
            if not (out / "summary.json").exists():
                in_a_process(
                    lambda out=out, resume=resume: start(out.name, changes, resume=resume),
                    rng.uniform(0.1, 0.8) * seconds,
                )
        if not (out / "summary.json").exists():
            assert in_a_process(lambda out=out: start(out.name, changes, resume=True))
        server = Ledger(out / "ledger.jsonl").read()
        assert {event.server_round for event in server.events} == {1, 2, 3, 4, 5, 6}
        lost += len(server.events) - 6
        (row,) = [r for r in json.loads((out / "summary.json").read_text())["privacy"] if r["unit"] == "client"][:1]
        assert row["epsilon"] >= server.epsilon(row["delta"]) * (1 - 1e-9)
        for path in out.glob("clients/*/ledger.jsonl"):
            rounds = [event.server_round for event in Ledger(path).read().events]
            assert len(set(rounds)) == len(rounds)
    assert lost >= 0


# --- the command, on both engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("own"), tiny_clip_dir, rounds=12)


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    out = tmp_path_factory.mktemp("whole") / "out"
    finished(command(str(config), "--app", str(ROOT), "--engine", "local", "--out", str(out)))
    return ending(out)


def after_round(out: Path, number: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    file = out / "rounds.jsonl"
    while not file.exists() or len(lines(file)) <= number:  # round 0 has a line too
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_goes_on_after_its_process_was_killed(config: Path, expected: object, tmp_path: Path):
    out = tmp_path / "out"
    process = command(str(config), "--app", str(ROOT), "--engine", "local", "--out", str(out))
    after_round(out, 3, process)
    process.kill()
    process.wait()
    output = finished(command("--resume", str(out)))
    assert "own: dpfpl, 4 clients on 2 nodes, engine local" in output
    assert ending(out) == expected


@pytest.mark.parametrize("victim", ["server", "both, and the front"])
def test_on_ray_a_run_goes_on_after_its_processes_were_killed(
    config: Path, expected: object, tmp_path: Path, victim: str
):
    out = tmp_path / "out"
    process = command(str(config), "--app", str(ROOT), "--engine", "ray", "--out", str(out))
    after_round(out, 2, process)
    servers, workers = find_below(process.pid, "flwr-simulation"), find_below(process.pid, "ray::")
    assert servers
    assert workers
    supervisor.kill(servers)
    if victim == "server":
        ended_and_says_how_to_go_on(process, out)
    else:
        supervisor.kill(workers)
        process.kill()
        process.communicate(timeout=60)
    finished(command("--resume", str(out)))
    assert ending(out) == expected


@pytest.mark.parametrize("level", [{"dead-actors": "stop"}, NO_DP], ids=["DP", "no DP"])
def test_on_ray_a_run_ends_when_its_workers_are_killed_and_goes_on(config: Path, tmp_path: Path, level: dict[str, str]):
    """Where nothing else is asked for under DP their clients are counted zeros: tests/app/test_dead_actors.py."""
    words = set_words(level)
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(command(str(config), "--app", str(ROOT), "--engine", "local", "--out", str(whole), *words))
    process = command(str(config), "--app", str(ROOT), "--engine", "ray", "--out", str(out), *words)
    after_round(out, 2, process)
    supervisor.kill(find_below(process.pid, "ray::"))
    ended_and_says_how_to_go_on(process, out)
    finished(command("--resume", str(out)))
    assert ending(out) == ending(whole)


def ended_and_says_how_to_go_on(process: "subprocess.Popen[str]", out: Path) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error:" in output
    assert f"--resume {out}" in output

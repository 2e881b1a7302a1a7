"""An actor of the simulation that died and fails all that it is given, or that hangs: zeros, one clear word, an end."""

import json
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fl_dualpriv import messages
from fl_dualpriv.flower import supervisor
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.run.file_kinds import PROGRESS, read_totals
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.strategy import ClientFailure
from tests.app.run_folders import (
    APP_DIR,
    LEVELS,
    Start,
    command,
    ending,
    find_below,
    lines,
    set_words,
    starter,
    write_config,
)

pytestmark = pytest.mark.timeout(600)

# As Flower 1.41 and Ray 2.55.1 give it when a worker ends by os._exit, in that call and in all later ones.
DIED = """<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly before finishing this task.
\tclass_name: ClientAppActor
\tactor_id: d8abd32cacdd9bae921a6aee01000000
\tpid: 9021
\tnamespace: 9dcc7937-1294-46a1-809e-af5f057a5707
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly \
due to SIGSEGV or another unexpected error.'>"""
RAISED = DIED.replace("ray.exceptions.ActorDiedError", "ray.exceptions.RayTaskError(ClientAppException)")
TOLD = "actor 9021 of the simulation has died"


def failed(reason: str, code: int = 0) -> Message:
    return Message(Error(code, reason), reply_to=Message(RecordDict(), 1, "train"))


def test_a_dead_actor_is_told_from_a_client_that_raises(flower_task: None):
    assert messages.dead_actor(failed(DIED)) == "9021"
    assert messages.failure_reason(failed(DIED)).startswith(TOLD)
    assert "--resume" in messages.failure_reason(failed(DIED))
    assert messages.dead_actor(failed(DIED.split("\n")[0])) == "?"
    assert messages.dead_actor(failed(RAISED)) is None  # a client that quotes it
    assert messages.dead_actor(Message(RecordDict(), reply_to=Message(RecordDict(), 1, "train"))) is None


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second message of training on, the actor that computes for the first node is dead."""
    whole, seen = LocalGrid.send_and_receive, []

    def dying(self: LocalGrid, requests: Iterable[Message], **named: Any) -> list[Message]:
        asked = list(requests)
        dead = asked[:1] if seen else []
        seen.extend(m for m in asked if m.metadata.message_type == "train")
        fine = whole(self, asked[len(dead) :], **named)
        return [Message(Error(0, DIED), reply_to=message) for message in dead] + list(fine)

    monkeypatch.setattr(LocalGrid, "send_and_receive", dying)
    monkeypatch.setattr(RunRecorder, "write_curve", lambda self, caption: None)


@pytest.fixture
def start(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Start:
    return starter(images, tiny_clip_dir, tmp_path)


def test_under_dp_its_clients_are_zeros_that_are_counted_and_it_is_said_once(
    start: Start, dies: None, caplog: pytest.LogCaptureFixture
):
    out = start("dp", {"evaluation.every": 3})
    # Two clients of four: in rounds 2 and 3, and their scores in round 3.
    assert read_totals(out)["failures"] == 6
    assert [line["failures"] for line in lines(out / PROGRESS)] == [0, 0, 2, 4]
    assert sum("a dead actor stays" in r.getMessage() for r in caplog.records) == 1
    assert sum(TOLD in r.getMessage() for r in caplog.records) == 3


def test_under_dp_it_ends_the_run_where_that_is_asked_for_and_nothing_is_lost(
    start: Start, dies: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ClientFailure, match=rf'^dead-actors = "stop": {TOLD}.*--resume'):
        start("stopped", {"dead-actors": "stop"})
    assert len(lines(tmp_path / "stopped" / "rounds.jsonl")) == 2  # rounds 0 and 1: the second did not count
    monkeypatch.undo()
    assert ending(start("stopped", {"dead-actors": "stop"}, resume=True)) == ending(
        start("whole", {"dead-actors": "stop"})
    )


def test_without_dp_it_ends_the_run(start: Start, dies: None, tmp_path: Path):
    with pytest.raises(ClientFailure, match=rf"^client 0 failed in round 2: {TOLD}.*--resume"):
        start("plain", LEVELS["none"] | {"evaluation.every": 3})
    assert (tmp_path / "plain" / "checkpoint.bin").exists()


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("own"), tiny_clip_dir, rounds=6)


def limit(number: signal.Signals) -> dict[str, str]:
    """A hung actor is waited for; the limit is that of the first question too, while actors start."""
    return {"reply-timeout": "60.0"} if number == signal.SIGSTOP else {}


def lose_an_actor(config: Path, out: Path, number: signal.Signals, changes: dict[str, str]) -> tuple[int, str]:
    """Send a signal to one actor when round 1 is done: how the run ends, and all that it said."""
    words = set_words(changes)
    process = command(str(config), "--app", str(APP_DIR), "--engine", "ray", "--out", str(out), *words)
    deadline, rounds = time.monotonic() + 300, out / "rounds.jsonl"
    while not rounds.exists() or len(lines(rounds)) <= 1:  # round 0 has a line too
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = supervisor.descendants(process.pid)
    actors = [int(file.stem.removeprefix("actor-")) for file in out.glob("actors/actor-*.json")]
    assert set(actors) <= set(find_below(process.pid, "ray::"))
    os.kill(actors[0], number)
    output, _ = process.communicate(timeout=400)
    assert [pid for pid in family if supervisor.alive(pid)] == []
    return process.returncode, output + (out / "flower.log").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "of the simulation has died"), (signal.SIGSTOP, "no reply in time")],
    ids=["dead", "hung"],
)
def test_under_dp_a_run_ends_well_without_one_of_its_actors(
    config: Path, tmp_path: Path, number: signal.Signals, reason: str
):
    status, said = lose_an_actor(config, tmp_path / "out", number, limit(number))
    assert status == 0, said
    assert reason in said
    assert said.count("a dead actor stays") == (number == signal.SIGKILL)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    failures = read_totals(tmp_path / "out")["failures"]
    assert (summary["rounds"], failures > 0) == (6, True)
    assert failures == sum(line["failures"] for line in lines(tmp_path / "out" / PROGRESS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (
            signal.SIGKILL,
            r"error: ClientFailure: client \d failed in round \d: (evaluation: )?actor \d+ of the simulation",
        ),
        (signal.SIGSTOP, r"error: ClientFailure: client \d failed in round \d: (evaluation: )?no reply in time"),
    ],
    ids=["dead", "hung"],
)
def test_without_dp_a_run_ends_when_it_loses_an_actor_and_goes_on_with_resume(
    config: Path, tmp_path: Path, number: signal.Signals, reason: str
):
    plain = {"privacy.record.mechanism": "none", "strategy.ref": "strategies.fedavg:FedAvg"} | limit(number)
    out = tmp_path / "out"
    status, said = lose_an_actor(config, out, number, plain)
    assert status == 1, said
    assert re.search(reason, said), said
    assert f"--resume {out}" in said
    if number == signal.SIGKILL:
        again = command("--resume", str(out))
        said, _ = again.communicate(timeout=400)
        assert again.returncode == 0, said
        assert read_totals(out)["failures"] == 0

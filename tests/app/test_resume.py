"""A run that was cut off goes on, and ends as it would have: at every boundary of its rounds, on every level."""

from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.run.checkpoint import CheckpointFolder
from fl_dualpriv.run.recorder import RunRecorder
from tests.app.run_folders import BOTH, CLIENT, LEVELS, Start, ending, starter


class CutOff(BaseException):
    """Stands for the end of the process: no `except Exception` of ours sees it."""


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of a small run's time."""
    monkeypatch.setattr(RunRecorder, "write_curve", lambda self, caption: None)


@pytest.fixture
def start(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Start:
    return starter(images, tiny_clip_dir, tmp_path)


def cut_off(patch: pytest.MonkeyPatch, owner: type, name: str, number: int, *, before: bool = False) -> None:
    """End the process at the n-th call of a method, before or after it."""
    method, calls = getattr(owner, name), iter(range(1, 1000))

    def cutting(*arguments: Any, **named: Any) -> Any:
        fatal = next(calls) == number
        if fatal and before:
            raise CutOff
        result = method(*arguments, **named)
        if fatal:
            raise CutOff
        return result

    patch.setattr(owner, name, cutting)


def run_until(start: Start, name: str, changes: dict[str, Any], *where: Any, before: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, *where, before=before)
        with pytest.raises(CutOff):
            start(name, changes)


# The n-th checkpoint is that of round n - 1, and so is the n-th line of rounds.jsonl.
CALLS = [(CheckpointFolder, "write"), (RunRecorder, "add_round")]
BOUNDARIES = [(owner, call, n) for n in (1, 2, 3) for owner, call in CALLS]


def test_a_run_goes_on_from_every_boundary_of_its_rounds(start: Start):
    two_rounds = BOTH | {"rounds": 2}
    expected = ending(start("whole", two_rounds))
    for number, boundary in enumerate(BOUNDARIES):
        run_until(start, f"cut-{number}", two_rounds, *boundary)
        assert ending(start(f"cut-{number}", two_rounds, resume=True)) == expected, boundary


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_goes_on_from_the_middle_of_a_round_on_every_level(start: Start, level: str):
    """Round 2 is cut off when one of its two nodes has answered, and once more after the ledger was written."""
    expected = ending(start("whole", LEVELS[level]))
    # Two questions who is there, and two messages each for zero-shot and round 1, whose scores are not asked for.
    run_until(start, "cut", LEVELS[level], LocalGrid, "_push", 7)
    if level in ("client", "both", "trusting"):
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, CheckpointFolder, "write", 1, before=True)
            with pytest.raises(CutOff):
                start("cut", LEVELS[level], resume=True)
    assert ending(start("cut", LEVELS[level], resume=True)) == expected


COLLECTIVE: dict[str, Any] = {
    "privacy.client.mechanism": "none",
    "privacy.record.mechanism": "gaussian",
    "privacy.record.noise-multiplier": 0.3,
    "prompt.personalisation": "collective",
}
MEMORIES = {  # what the server's noise, steps and personal parts remember from round to round
    "tree": {"privacy.client.mechanism": "tree", "privacy.client.expected-cohort": 2.0},
    "banded": {"privacy.client.mechanism": "banded", "privacy.client.expected-cohort": 2.0},
    "adaptive": {
        "privacy.client.clipping": "adaptive",
        "privacy.client.bit-noise-share": 0.5,
        "strategy.ref": "strategies.fedadam:FedAdam",
    },
    "collective": COLLECTIVE,
    "collective beside a Flower strategy": COLLECTIVE
    | {"strategy.ref": "flwr.serverapp.strategy:FedAvgM", "plugin.flower.server-momentum": 0.9},
}


@pytest.mark.parametrize(
    "memory",
    [
        *("banded", "adaptive", "collective", "collective beside a Flower strategy"),
        pytest.param("tree", marks=pytest.mark.slow),
    ],
)
def test_what_the_server_remembers_is_as_if_its_rounds_had_never_been_cut_off(start: Start, memory: str):
    """Cut off after the noise of a round was drawn and before that is kept, and after it is kept."""
    changes = CLIENT | MEMORIES[memory] | {"evaluation.every": 3}
    expected = ending(start("whole", changes))
    run_until(start, "cut", changes, CheckpointFolder, "write", 2, before=True)  # the first is the start's
    for before in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, CheckpointFolder, "write", 1, before=before)
            with pytest.raises(CutOff):
                start("cut", changes, resume=True)
    assert ending(start("cut", changes, resume=True)) == expected

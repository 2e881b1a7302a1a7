"""Small whole runs, in this process or by the command, and what must be equal at the end of two of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower import supervisor
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.run.file_kinds import PROGRESS, ROUNDS, read_totals

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
SMALL: dict[str, Any] = {
    "rounds": 3,
    "population": 4,
    "supernodes": 2,  # the clients of a node step together
    "join-timeout": 1.0,
    "train.local-steps": 1,
    "privacy.randomness": "seeded",
    "privacy.record.calibrate-to": "noise-multiplier",
    "privacy.record.delta": 1e-3,
    "evaluation.held-out-data": "public",
    "evaluation.every": 2,
    "data.ref": "folder",
    "resources.device": "cpu",
}
BOTH: dict[str, Any] = {
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.expected-cohort": 2.0,
}
CLIENT: dict[str, Any] = BOTH | {"privacy.record.mechanism": "none"}
TRUSTING: dict[str, Any] = {"privacy.record.trusts-server": True}
NO_DP: dict[str, Any] = {"privacy.record.mechanism": "none", "strategy.ref": "strategies.fedavg:FedAvg"}
LEVELS = {"record": {}, "client": CLIENT, "both": BOTH, "trusting": TRUSTING, "none": NO_DP}

Start = Callable[..., Path]


def starter(images: Path, clip: Path, root: Path) -> Start:
    """``start("name", {"rounds": 2}, resume=True)``: a run in a folder of that name."""

    def start(name: str, changes: dict[str, Any] | None = None, *, resume: bool = False) -> Path:
        place = {"data.path": str(images), "backbone.name": f"local-dir:{clip}", "output.dir": str(root / name)}
        run_local(APP_DIR, DEFAULTS | SMALL | place | (changes or {}) | {"output.resume": resume})
        return root / name

    return start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events_of(ledger: Path) -> list[dict[str, Any]]:
    """The events of a ledger, without its header and the plans that are reserved in it."""
    return [line for line in lines(ledger) if "server_round" in line] if ledger.exists() else []


def ledgers(out: Path) -> dict[str, list[dict[str, Any]]]:
    """All events and headers but for their times; the token only says whether they are of one run."""
    found = {str(p.relative_to(out)): lines(p) for p in sorted(out.rglob("ledger.jsonl"))}
    assert len({event["run"] for events in found.values() for event in events if "header" not in event}) <= 1
    return {name: [{k: e[k] for k in e if k not in ("run", "time")} for e in found[name]] for name in found}


def prompts(out: Path) -> dict[str, Any]:
    files = [out / "prompts" / "global.safetensors"]
    for name in ("prompt", "part"):
        files += sorted(out.glob(f"clients/*/{name}.safetensors"))
    return {f"{f.parent.name} {f.stem} {n}": t.numpy().tobytes() for f in files for n, t in read_tensors(f)[0].items()}


def results(out: Path) -> Any:
    summary = json.loads((out / "summary.json").read_text())
    failures = [line["failures"] for line in lines(out / PROGRESS)]
    del summary["config"]["output.dir"], summary["engine"]
    return summary, lines(out / ROUNDS), failures, read_totals(out)["failures"]


def ending(out: Path) -> tuple[Any, ...]:
    """All that must be the same, bit by bit, however often the run was cut off."""
    assert not (out / "error.json").exists()
    return prompts(out), ledgers(out), results(out)


# --- the command ------------------------------------------------------------------------------------------------------


def write_images(root: Path) -> None:
    """Noise of four classes with its own held-out folders, in ``root/images``."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2), ("test", 4)):
        for name in ("cat", "dog", "bus", "tree"):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / name / f"{i}.png")


def write_config(root: Path, clip: Path, *, rounds: int) -> Path:
    """A configuration of four clients on two nodes, seeded, beside its images."""
    write_images(root)
    file = root / "own.toml"
    file.write_text(
        f"""
rounds = {rounds}
population = 4
supernodes = 2
reply-timeout = 120.0
evaluation.every = 1
privacy.randomness = "seeded"
privacy.record.delta = 1e-3
data.path = "{root / "images"}"
backbone.name = "local-dir:{clip}"
resources.device = "cpu"
"""
    )
    return file


def command(*arguments: str) -> "subprocess.Popen[str]":
    """``fl-dualpriv run``; it is running when this returns."""
    return subprocess.Popen(
        [sys.executable, "-m", "fl_dualpriv.cli.main", "run", *arguments],
        cwd=APP_DIR,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def set_words(changes: Mapping[str, str]) -> list[str]:
    """``--set KEY=VALUE`` of each."""
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def find_below(front: int, words: str) -> list[int]:
    """Processes below ``front`` whose command has these words."""
    return [pid for pid in supervisor.descendants(front) if words in supervisor.command_line(pid)]

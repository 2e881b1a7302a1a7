"""Sweep files and summaries of made-up runs, without a single run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_dualpriv.cli.sweeping import OpenSweep, open_sweep
from fl_dualpriv.run.file_kinds import SUMMARY, TOTALS
from fl_dualpriv.sweep.cells import Cell

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "simulations" / "configs"


def opened(folder: Path, text: str, base: str = "by-class.toml") -> OpenSweep:
    """Write a sweep file beside a copy of a shipped configuration, and read it."""
    (folder / base).write_bytes((CONFIGS / base).read_bytes())
    file = folder / "sweep.toml"
    file.write_text(text, encoding="utf-8")
    return open_sweep(file, folder / "runs", ROOT)


def summary(local: float, free: float = 0.2, general: float | None = 0.3, **more: Any) -> dict[str, Any]:
    score = {"local": local, "neighbour": local / 2, "harmonic_mean": 0.15, "general": general, "new_client": general}
    accuracy = {"final": score, "zero_shot": {**score, "local": 0.1}, "free": {**score, "local": free, "rival": "a {}"}}
    release = {"epsilon": 3.9, "unit": "record", "delta": 1e-4, "guarantee": "theorem"}
    return {"accuracy": accuracy, "privacy": [release], **more}


def pretend(cell: Cell, runs: Path, content: Mapping[str, Any], failures: int = 0) -> None:
    """Write the files of a finished run."""
    out = runs / cell.folder
    (out / "operator").mkdir(parents=True)
    (out / SUMMARY).write_text(json.dumps(content))
    (out / TOTALS).write_text(json.dumps({"failures": failures, "seconds": 2.0}))

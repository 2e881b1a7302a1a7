"""Our app as a contestant: its configuration, the command that runs it, and its task for the peers."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from benchmarks.harness import CHECKOUT, RoundsRun
from benchmarks.peer_task import Kind, PeerTask
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.engine import to_toml
from fl_dualpriv.run.file_kinds import SUMMARY, read_totals

Engine = Literal["local", "ray"]

HEAD_CLIP = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
"""Tiny towers with the feature width of ViT-B/16; a head does not run them once features are cached."""


def random_clip(folder: Path) -> Path:
    """Make a small CLIP with seeded random weights in ``folder``, if it is not there, and return the folder."""
    weights = folder / "open_clip_model.safetensors"
    if not weights.exists():
        from fl_dualpriv.models.open_clip import open_clip

        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": HEAD_CLIP, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        torch.manual_seed(0)
        unfinished = folder / f".weights.{os.getpid()}"
        save_file(open_clip.CLIP(**HEAD_CLIP).state_dict(), unfinished)
        unfinished.replace(weights)
    return folder


def run_command(config: Path, out: Path, engine: Engine) -> list[str]:
    """Return the command that a user would type, with this interpreter."""
    command = [sys.executable, "-m", "fl_dualpriv.cli.main", "run", str(config), "--engine", engine]
    return [*command, "--out", str(out), "--app", str(CHECKOUT)]


def our_run(folder: Path, changes: Mapping[str, ConfigValue], engine: Engine, first: int, last: int) -> RoundsRun:
    """Prepare a run of our app in ``folder``, to be measured between two lines of its ``rounds.jsonl``."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(to_toml(changes), encoding="utf-8")
    out = folder / "out"
    return RoundsRun(
        command=run_command(config, out, engine),
        rounds_file=out / "rounds.jsonl",
        first=first,
        last=last,
        log=folder / "log.txt",
        environment={"OMP_NUM_THREADS": "1"},
    )


def summary(folder: Path) -> dict:
    """Return the run's summary, after a check of its failures, which the summary does not hold.

    Raises:
        AssertionError: If any call of a client failed.
    """
    if failures := read_totals(folder / "out")["failures"]:
        raise AssertionError(f"{folder}: {failures} failures; a run with failures cannot be a measurement")
    return json.loads((folder / "out" / SUMMARY).read_text(encoding="utf-8"))


def global_prompt(folder: Path) -> torch.Tensor:
    """Read the global prompt after the last round."""
    return read_tensors(folder / "out" / "prompts" / "global.safetensors")[0]["global"]


def full_config(changes: Mapping[str, ConfigValue]) -> RunConfig:
    """Return the app's default configuration with changes."""
    return RunConfig.from_run_config(merge(app_defaults(CHECKOUT), dict(changes), {}))


def export_task(kind: Kind, changes: Mapping[str, ConfigValue]) -> PeerTask:
    """Export the federation of our run for the peers: data, initial prompt and frozen parts.

    Raises:
        ValueError: If the clients do not hold equally many records, because the peers take the plain mean.
    """
    from fl_dualpriv.tasks.build import image_task

    config = full_config(changes)
    task = image_task(config)
    clients = [task.client_data(partition, 1) for partition in range(config.population)]
    if len({client.num_examples for client in clients}) != 1:
        raise ValueError("the clients hold different numbers of records; the peers take the plain mean over clients")
    backbone, start = task.backbone, task.initial_prompt(config)
    if kind == "head":
        frozen = {"zero-shot": task.text.zero_shot_features()}
    else:
        names, (before, after) = task.data.class_names, task.data.template.split("{}")
        assert before.strip()
        rows = [[*backbone.words((name + after).strip()), backbone.rows.end] for name in names]
        padded = torch.full((len(rows), max(map(len, rows))), backbone.rows.pad)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        frozen = {
            "sos": backbone.embed_tokens(torch.tensor(backbone.rows.start)),
            "suffix": backbone.embed_tokens(padded),
            "ends": torch.tensor([len(start) + len(row) for row in rows]),
        }
    return PeerTask(
        kind=kind,
        features=torch.stack([client.features for client in clients]),
        labels=torch.stack([client.labels for client in clients]),
        start=start,
        frozen={name: value.detach() for name, value in frozen.items()},
        backbone=config.backbone.name,
        scale=backbone.logit_scale,
        local_steps=config.train.local_steps,
        learning_rate=config.train.global_learning_rate,
    )

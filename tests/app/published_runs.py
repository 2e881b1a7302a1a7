"""Small runs whose prompts are published, and how well what was published does on the test images of the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fl_dualpriv import load_prompt
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.metrics import ScoreTable, mean
from fl_dualpriv.publish.file import write_published
from fl_dualpriv.publish.rules import publish
from fl_dualpriv.publish.use import LoadedPrompt
from fl_dualpriv.tasks.base import held_groups
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.images import ImageTask

APP_DIR = Path(__file__).parents[2]
CLIENTS = 3


def settings_for(images: Path, tiny_clip_dir: Path) -> dict[str, Any]:
    return app_defaults(APP_DIR) | {
        "rounds": 2,
        "population": CLIENTS,
        "join-timeout": 1.0,
        "train.local-steps": 1,
        "train.class-prior": "none",  # a published prompt has no prior, and its scores are compared with the run's
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.delta": 1e-3,
        "evaluation.held-out-data": "public",
        "data.ref": "folder",
        "data.path": str(images),
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
    }


def exported(folder: Path, client: int | None, out: Path, model: Path, **options: Any) -> LoadedPrompt:
    write_published(out, publish(folder, client, **options))
    return load_prompt(out, backbone=f"local-dir:{model}", device="cpu")


def scores(prompts: Sequence[LoadedPrompt], summary: dict[str, Any]) -> tuple[float | None, float | None]:
    """What the run reports, counted anew from the labels that published prompts give to the test images' files."""
    config = RunConfig.from_run_config(summary["config"])
    task = build_task(config)
    assert isinstance(task, ImageTask)
    test, held = task.data.test, held_groups(task)
    labels, found = torch.tensor(test.labels), []
    for client, prompt in enumerate(prompts):
        said = [prompt.classes.index(p.label) for p in prompt.predict(test.paths)]  # type: ignore[attr-defined]
        right = labels[torch.tensor(said) == labels]
        counts = [torch.bincount(of, minlength=len(test.class_names)) for of in (right, labels)]
        found.append(ScoreTable.of(counts[0], counts[1], held[client : client + 1]))
    return mean([table.local()[0] for table in found]), mean([table.neighbour()[0] for table in found])

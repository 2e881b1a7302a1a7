"""Published prompts that answer questions: what comes out is what a run counts as right, question by question. Slow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_dualpriv import load_prompt
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.learners.answers import answer_records
from fl_dualpriv.publish.file import read_published, write_published
from fl_dualpriv.publish.rules import publish
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.questions import QuestionTask
from tests.app.published_runs import APP_DIR

pytestmark = pytest.mark.slow

RECORDS = 40
PRUNED = {"pruning.visual-keep-ratio": 0.25, "pruning.visual-fused": 4, "pruning.visual-merge": "average"}
RUNS: dict[str, dict[str, Any]] = {
    "soft-prompt": PRUNED,
    "lora": {"prompt.learner": "lora", "method": "promptfl"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_answer_is_what_the_run_counts_as_right(kind: str, tmp_path: Path):
    config = app_defaults(APP_DIR) | {
        "rounds": 1,
        "population": 2,
        "join-timeout": 1.0,
        "train.local-steps": 1,
        "train.sampling-rate": 0.01,
        "privacy.record.calibrate-to": "noise-multiplier",
        "data.ref": "demo-vqa",
        "data.max-tokens": 14,
        "backbone.name": "demo-vqa",
        "prompt.words": "some picture panel here",
        "evaluation.held-out-data": "private",
        "resources.device": "cpu",
        "output.dir": str(tmp_path / "run"),
    }
    run_local(APP_DIR, config | RUNS[kind])
    file, client = tmp_path / "p.safetensors", None if kind == "lora" else 1
    write_published(file, publish(tmp_path / "run", client))
    prompt = load_prompt(file)
    assert (prompt.facts.use.kind, prompt.facts.use.classes) == (kind, ())
    assert "ε = " in prompt.guarantee

    checked = RunConfig.from_run_config(config | RUNS[kind])
    task = build_task(checked)
    assert isinstance(task, QuestionTask)
    questions = task.data.test
    some = np.linspace(0, len(questions) - 1, RECORDS).astype(int).tolist()
    said = []
    for place, record in enumerate(some):
        image = tmp_path / f"{place}.png"
        questions.images.image(int(questions.image_of[record])).save(image)
        (found,) = prompt.predict([image], questions.questions[record])
        assert found.error == ""
        said.append(found.label == questions.answers[record])
    features = task.backbone.image_features(
        torch.stack([task.backbone.preprocess(questions.images.image(int(questions.image_of[r]))) for r in some])
    )
    records = answer_records(
        task.backbone,
        [questions.questions[r] for r in some],
        [questions.answers[r] for r in some],
        np.arange(RECORDS),
        questions.labels[some],
        features,
        14,
        "raise",
    )
    right = task.objective(checked).correct(read_published(file).prompt, records).tolist()
    assert said == right
    assert 0 < sum(right) < RECORDS  # an equality of some and some

    (bad,) = prompt.predict([tmp_path / "none.png"], questions.questions[0])
    assert "No such file" in bad.error
    with pytest.raises(ConfigError, match="answers questions: give one"):
        prompt.predict([tmp_path / "0.png"])
    with pytest.raises(ConfigError, match="not in its vocabulary"):
        prompt.predict([tmp_path / "0.png"], "xylophone?")

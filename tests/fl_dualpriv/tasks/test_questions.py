"""A task of questions: partition, records in a model's tokens, scores by type, and what is refused before a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.data.load import load_questions
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.tasks.base import held_groups
from fl_dualpriv.tasks.build import build_task
from fl_dualpriv.tasks.questions import QuestionTask
from tests.tiny_llava import ANSWERS, QUESTIONS

DEFAULTS = app_defaults(Path(__file__).parents[3])
Configure = Callable[..., RunConfig]


def write_questions(folder: Path, images: int = 12) -> Path:
    """Five questions about each image, of a type each; the answers are any."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(images):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for kind, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
            lines.append({"image": f"{i}.png", "question": question, "answer": answer, "type": f"type {kind}"})
    file = folder / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def configure(questions: Path, llava_dir: Path) -> Configure:
    def make(**changes: Any) -> RunConfig:
        given = {
            "data.ref": "questions",
            "data.path": str(questions),
            "data.max-tokens": 24,
            "backbone.name": f"hf:{llava_dir}",
            "prompt.init": "random",
            "prompt.words": "look at this red",
            "population": 5,
            "privacy.client.expected-cohort": 5.0,
            "resources.feature-cache": "off",
            "privacy.record.mechanism": "none",
        }
        return RunConfig.from_run_config(DEFAULTS | given | {k.replace("__", "."): v for k, v in changes.items()})

    return make


def build(config: RunConfig) -> QuestionTask:
    task = build_task(config)
    assert isinstance(task, QuestionTask)
    return task


def test_clients_hold_question_types(configure: Configure):
    task = build(configure())
    # 12 images: 1 for val, 2 for test, 9 to train on, a question of each type about each.
    assert [task.num_examples(p) for p in range(5)] == [9] * 5
    assert torch.equal(held_groups(task), torch.eye(5, dtype=torch.bool))
    assert task.group_names == tuple(f"type {i}" for i in range(5))
    data = task.client_data(3)
    assert data.labels.tolist() == [3] * 9
    assert data.visual.shape == (9, 16 * 32)
    assert bool(data.usable.all())


def test_clients_hold_images(configure: Configure):
    task = build(configure(**{"data.partition": "by-image", "population": 3, "privacy.client.expected-cohort": 3.0}))
    images = [set(task.data.train.image_of[part].tolist()) for part in task.partitions]
    assert [len(own) for own in images] == [3, 3, 3]
    assert len(set().union(*images)) == 9


def test_scores_are_exact_matches_by_type(configure: Configure):
    config = configure()
    task = build(config)
    ((right, total),) = task.counts(task.initial_prompt(config)[None], config)
    assert total.tolist() == [2] * 5
    held_out = task.held_out("test")
    found = task.objective(config).correct(task.initial_prompt(config), held_out)
    assert right.tolist() == [int((found & (held_out.labels == t)).sum()) for t in range(5)]


def test_a_prompt_can_start_from_the_templates_words(configure: Configure):
    config = configure(**{"prompt.init": "template"})
    task = build(config)
    start = task.initial_prompt(config)
    assert torch.equal(start, task.backbone.embed_tokens(torch.tensor(task.backbone.words("look at this red"))))
    (learnt,) = task.counts(start[None], config)
    assert torch.equal(task.zero_shot_counts(config)[0], learnt[0])
    with pytest.raises(ConfigError, match=r"prompt.n-ctx = 4, but 'look at', .* is 2 tokens"):
        build(configure(**{"prompt.init": "template", "prompt.words": "look at"}))
    with pytest.raises(ConfigError, match="Answer the question"):
        build(configure(**{"prompt.words": ""}))  # the usual words are not in the tiny vocabulary


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data.max-tokens": 60}, "set data.max-tokens <= 41"),
        ({"data.max-tokens": 6}, "data.max-tokens = 6"),
        ({"prompt.n-ctx": 60}, "a shorter prompt"),
        ({"pruning.visual-keep-ratio": 0.9, "pruning.visual-fused": 5, "pruning.visual-merge": "average"}, "5"),
        ({"pruning.visual-keep-ratio": 0.5, "pruning.visual-layer": 9}, "visual-layer = 9"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(configure: Configure, changes: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        build(configure(**changes)).client_data(0)


def test_unknown_words_are_an_error_without_dp_and_a_zero_under_dp(configure: Configure, tmp_path: Path):
    file = write_questions(tmp_path)
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({"image": "0.png", "question": "what is a zebra ?", "answer": "red", "type": "type 0"})
    file.write_text("\n".join([*lines, "no json"]))
    with pytest.raises(ConfigError, match="not a JSON object"):
        build(configure(**{"data.path": str(file)}))
    file.write_text("\n".join(lines))
    load_questions.cache_clear()
    task = build(configure(**{"data.path": str(file)}))
    with pytest.raises(ConfigError, match="zebra"):
        _ = [*map(task.client_data, range(5)), *map(task.held_out, ("val", "test"))]
    task = build(
        configure(**{"data.path": str(file), "privacy.record.mechanism": "gaussian", "privacy.record.delta": 1e-3})
    )
    counted = [task.client_data(p) for p in range(5)] + [task.held_out("test"), task.held_out("val")]
    assert sum(data.num_examples for data in counted) == 60
    assert sum(int((~data.usable).sum()) for data in counted) == 1


def test_lora_starts_from_the_untuned_model(configure: Configure):
    lora = {"prompt.learner": "lora", "prompt.rank": 3, "method": "full", "prompt.n-ctx": 60}  # n-ctx is not read
    config, context = configure(**lora), configure(**{"prompt.init": "template"})
    task = build(config)
    # q and v of two layers: A of 32 inputs, B of 32 and 16 outputs.
    assert task.prompt_segments(config.prompt) == (32, 32, 32, 16) * 2
    assert task.prompt_shape(config) == (3, 224)
    assert task.prompt_segments(context.prompt) == ()
    start = task.initial_prompt(config)
    ((right, total),) = task.counts(start[None], config)
    assert torch.equal(right, task.zero_shot_counts(config)[0])
    assert total.tolist() == [2] * 5
    # The model that answers is the one that a soft prompt of the same words asks.
    data = task.held_out("test")
    objectives = task.objective(config), task.objective(context)
    ((block, _), *_) = objectives[0].blocks(data, np.arange(8))
    found, soft = (o.losses(task.initial_prompt(c), block) for o, c in zip(objectives, (config, context), strict=True))
    torch.testing.assert_close(found, soft, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"a prompt of 4 tokens and data\.max-tokens = 60"):
        build(configure(**lora, **{"data.max-tokens": 60}))


def test_questions_none_of_which_fits_are_refused_in_a_simulation(configure: Configure):
    changes = {"privacy__record__mechanism": "gaussian", "method": "promptfl"}
    build(configure(**changes)).check_any_fits()
    with pytest.raises(ConfigError, match=r"none of the 45 training questions can be used.*data.max-tokens = 2; raise"):
        build(configure(**changes, **{"data__max-tokens": 2})).check_any_fits()


def test_pruned_visual_tokens_reach_the_records(configure: Configure):
    plain = build(configure())
    pruned = build(
        configure(**{"pruning.visual-keep-ratio": 0.25, "pruning.visual-fused": 2, "pruning.visual-merge": "average"})
    )
    assert plain.backbone.n_visual == 16
    assert pruned.backbone.n_visual == 4 + 2
    assert pruned.client_data(0).visual.shape == (9, 6 * 32)

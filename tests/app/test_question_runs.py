"""Whole runs on questions, with a tiny LLaVA: every method, both levels, pruning, ledgers, and bad records under DP."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.data.load import load_questions
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.lora import load_lora
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.run.file_kinds import read_totals
from tests.tiny_llava import ANSWERS, QUESTIONS

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
Run = Callable[..., Path]
PRUNED = {
    "pruning.visual-keep-ratio": 0.25,
    "pruning.visual-fused": 2,
    "pruning.visual-merge": "average",
    "pruning.update-keep-ratio": 0.5,
}
LORA = {"prompt.learner": "lora", "prompt.rank": 3, "method": "promptfl"}
FACTORS = (32, 32, 32, 16) * 2
"""Of q and v of two layers: A of 32 inputs, B of 32 and 16 outputs."""
BY_MATRIX = {"pruning.update-keep-ratio": 0.5, "pruning.update-block": "matrix"}
PAST = {"pruning.update-rule": "past", "pruning.update-warm-up": 1}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images to train on and two to test on; a question of each of three types about each."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(0)
    for split, images in (("train", 6), ("val", 1), ("test", 2)):
        lines = []
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{split}{i}.png")
            for kind in range(3):
                line = {"question": QUESTIONS[kind], "answer": ANSWERS[kind], "type": f"type {kind}"}
                lines.append(json.dumps({"image": f"{split}{i}.png"} | line))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(questions: Path, llava_dir: Path, tmp_path: Path) -> Run:
    def start(changes: dict[str, Any] | None = None, name: str = "out") -> Path:
        base: dict[str, Any] = {
            "rounds": 2,
            "population": 3,
            "join-timeout": 1.0,
            "train.local-steps": 2,
            "train.sampling-rate": 0.5,
            "prompt.words": "look at this red",
            "privacy.randomness": "seeded",
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-2,
            "data.ref": "questions",
            "data.path": str(questions),
            "data.max-tokens": 24,
            "backbone.name": f"hf:{llava_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
            "output.dir": str(tmp_path / name),
        }
        run_local(APP_DIR, DEFAULTS | base | (changes or {}))
        return tmp_path / name

    return start


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def prompts(out: Path) -> list[Tensor]:
    files = [out / "prompts" / "global.safetensors", *sorted((out / "clients").glob("*/prompt.safetensors"))]
    return [tensor for file in files for tensor in read_tensors(file)[0].values()]


@pytest.mark.parametrize(
    ("method", "changes"),
    [("dpfpl", {}), *((m, PRUNED) for m in ("dpfpl", "promptfl", "local-only", "lowrank", "full", "zero-shot"))],
)
def test_every_method_ends_with_scores_by_type(run: Run, method: str, changes: dict[str, Any]):
    out = run({"method": method} | changes)
    found = summary(out)
    assert read_totals(out)["failures"] == 0
    assert found["groups"] == ["type 0", "type 1", "type 2"]
    assert len(found["accuracy"]["final"]["by_group"]) == 3
    # Each client holds one type: its local accuracy is that type's, and the mean over clients is the mean over types.
    assert found["accuracy"]["final"]["local"] == pytest.approx(np.mean(found["accuracy"]["final"]["by_group"]))
    assert all(bool(torch.isfinite(p).all()) for p in prompts(out))


@pytest.mark.parametrize("changes", [{}, PRUNED, PRUNED | PAST, LORA | BY_MATRIX | PAST])
def test_epsilon_and_ledgers_are_the_same_with_pruning_and_without(run: Run, changes: dict[str, Any]):
    out = run(changes)
    (release,) = [r for r in summary(out)["privacy"] if "personal" in r["release"]] or summary(out)["privacy"][:1]
    # q = 0.5, z = 1, two rounds of two steps.
    assert release["epsilon"] == pytest.approx(epsilon(0.5, 1.0, 4, 1e-2), rel=1e-6)
    for client in range(3):
        lines = [json.loads(line) for line in (out / "clients" / f"client-{client:03d}" / "ledger.jsonl").open()]
        assert [(line["server_round"], line["releases"]) for line in lines] == [(1, 2), (2, 2)]


@pytest.mark.parametrize("method", ["promptfl", "zero-shot"])
def test_lora_runs_as_a_prompt_does(run: Run, method: str):
    out = run(LORA | {"method": method})
    found = summary(out)
    assert read_totals(out)["failures"] == 0
    assert len(found["accuracy"]["final"]["by_group"]) == 3
    learnt = prompts(out)
    assert {tuple(p.shape[-2:]) for p in learnt} == {(3, sum(FACTORS))}
    assert all(bool(torch.isfinite(p).all()) for p in learnt)
    # B starts at zero, and the noise moves every factor.
    moved = [bool(part.any()) for part in learnt[0].split(FACTORS, dim=1)[1::2]]
    assert moved == [method != "zero-shot"] * 4


@pytest.mark.parametrize(
    ("changes", "moving"), [({}, 8), (BY_MATRIX, 4), (BY_MATRIX | {"pruning.update-rule": "random-past"}, 4)]
)
def test_factors_of_lora_are_pruned_as_a_whole(run: Run, llava_dir: Path, changes: dict[str, Any], moving: int):
    """One step of one client: so many of the 8 matrices move, the others stay as they started."""
    (found, *_) = prompts(run(LORA | {"rounds": 1, "population": 1, "train.local-steps": 1} | changes))
    start = load_lora(load_answering_model(f"hf:{llava_dir}", "cpu", None), 3).initial(0)
    pairs = zip(found.split(FACTORS, dim=1), start.split(FACTORS, dim=1), strict=True)
    assert sum(not torch.equal(one, other) for one, other in pairs) == moving


def test_client_level_and_integers_and_few_nodes(run: Run):
    client_level = {
        "method": "promptfl",
        "privacy.record.mechanism": "none",
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.expected-cohort": 2.0,
        "privacy.client.delta": 1e-2,
    }
    assert read_totals(run(client_level, "client"))["failures"] == 0
    whole, parts = (run({"privacy.arithmetic": "integer", "supernodes": n}, f"integer{n}") for n in (0, 1))
    for one, other in zip(prompts(whole), prompts(parts), strict=True):
        assert torch.equal(one, other)


def test_a_bad_image_and_a_bad_question_add_zero_and_stay_counted(run: Run, questions: Path, tmp_path: Path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in questions.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (bad / "train0.png").write_bytes(b"no image")
    lines = (bad / "train.jsonl").read_text().splitlines()
    # The last image's questions: unknown words, too long, no JSON. Each client loses two of its six records.
    broken = [json.loads(line) for line in lines[-3:]]
    broken[0]["question"], broken[1]["question"] = "what is a zebra ?", "what is this " * 20
    lines[-3:] = [json.dumps(broken[0]), json.dumps(broken[1]), '{"image": "train5.png", "type": "type 2"}']
    (bad / "train.jsonl").write_text("\n".join(lines))
    load_questions.cache_clear()
    out = run({"data.path": str(bad)})
    assert read_totals(out)["failures"] == 0
    assert all(bool(torch.isfinite(p).all()) for p in prompts(out))


def test_a_run_repeats_itself(run: Run):
    one, other = run(PRUNED, "one"), run(PRUNED, "other")
    assert all(torch.equal(a, b) for a, b in zip(prompts(one), prompts(other), strict=True))

"""Every family of dual encoders through the commands: a run of two private steps, export, predict; and its table."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.load import load_backbone
from tests.fl_dualpriv.models import test_families, test_open_clip_others
from tests.fl_dualpriv.models.conftest import _save, hf_clip_dir, make_hf_clip

__all__ = ["hf_clip_dir", "make_hf_clip"]

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "models.md"
CLASSES = ("cat", "dog", "tree")

ROWS = {
    "CLIP (open_clip)": "OpenAI, LAION, DataComp, DFN, MetaCLIP 1",
    "SigLIP (open_clip)": "SigLIP as open_clip distributes it",
    "text encoder of transformers (open_clip)": "BiomedCLIP, RoBERTa and XLM-R CLIPs",
    "CoCa (open_clip)": "CoCa",
    "clip": "CLIP as transformers distributes it",
    "metaclip_2": "MetaCLIP 2",
    "siglip": "SigLIP",
    "siglip2_fixed": "SigLIP 2, images of a fixed size",
    "siglip2": "SigLIP 2 NaFlex, images of any shape",
    "altclip": "AltCLIP",
    "chinese_clip": "ChineseCLIP",
}
FOUND: dict[str, str] = {}
"""The rows of the table, as the tests below find them."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, make_clip_dir: Callable[..., Path], request: pytest.FixtureRequest
) -> Callable[[str], str]:
    def made(family: str) -> str:
        if family == "CLIP (open_clip)":
            return f"local-dir:{make_clip_dir()}"
        if family == "SigLIP (open_clip)":
            text = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
            vision = {"attentional_pool": True, "attn_pooler_heads": 2}
            return f"local-dir:{make_clip_dir({'custom_text': True, 'text_cfg': text, 'vision_cfg': vision})}"
        if family == "CoCa (open_clip)":
            return f"local-dir:{make_clip_dir(test_open_clip_others.COCA)}"
        if family == "clip":
            return f"hf:{request.getfixturevalue('hf_clip_dir')}"
        place, parts = tmp_path_factory.mktemp(family.split()[0]), tmp_path_factory.mktemp("parts")
        if family.startswith("text encoder"):
            write, settings = test_open_clip_others.ENCODERS["BERT, CLS"]
            write(parts)
            text = settings | {
                "hf_model_name": str(parts), "hf_tokenizer_name": str(parts), "hf_model_pretrained": False
            }  # fmt: skip
            folder = make_clip_dir({"custom_text": True, "text_cfg": text})
            for file in parts.iterdir():
                if not (folder / file.name).exists():
                    shutil.copy(file, folder / file.name)
            return f"local-dir:{folder}"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, tokenizer, processor = test_families.MAKE[family](parts)
            if hasattr(model, "logit_bias"):
                torch.nn.init.constant_(model.logit_scale, 2.0)
        return f"hf:{_save(place, model, tokenizer, processor)}"

    return made


def call(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("family", list(ROWS))
def test_run_export_and_predict(family: str, make: Callable[[str], str], images: Path, tmp_path: Path):
    name, out = make(family), tmp_path / "run"
    config = str(ROOT / "simulations" / "configs" / "your-data.toml")
    settings: dict[str, Any] = {
        **{"data.path": images, "backbone.name": name, "backbone.pretrained": "", "prompt.init": "random"},
        **{"prompt.n-ctx": 2, "rounds": 1, "train.local-steps": 2, "population": 2, "data.partition": "iid"},
        **{"evaluation.held-out-data": "public", "privacy.record.calibrate-to": "noise-multiplier"},
    }
    said = call("run", config, "--engine", "local", "--out", str(out), *(f"--set={k}={v}" for k, v in settings.items()))
    assert "0 failed" in said
    summary = json.loads((out / "summary.json").read_text())
    assert {release["guarantee"] for release in summary["privacy"]} == {"theorem"}
    assert {release["releases"] for release in summary["privacy"]} == {2}
    prompt = tmp_path / "prompt.safetensors"
    call("export", str(out), "--client", "1", "--out", str(prompt))
    photo = str(next(iter((images / "cat").iterdir())))
    said = call("predict", str(prompt), photo, "--backbone", name)
    assert any(label in said for label in CLASSES)
    backbone = load_backbone(name, "", "cpu")
    text = "shared prefix" if backbone.text_stack is not None else "one row per class"
    try:
        tower = backbone.image_tower()  # type: ignore[attr-defined]
        prunes, patches = "yes", "yes" if tower.reads_cls else "no"
    except ConfigError:
        prunes, patches = "no", "no"
    spelling = "hf:NAME" if name.startswith("hf:") else "open_clip name, local-dir:PATH, hf-hub:NAME"
    FOUND[family] = f"| {ROWS[family]} | `{spelling}` | {text} | {prunes} | {patches} |"


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_fedotp_without_patches_is_refused_before_the_start(
    family: str, make: Callable[[str], str], images: Path, tmp_path: Path
):
    config = str(ROOT / "simulations" / "configs" / "your-data.toml")
    settings = {"data.path": images, "backbone.name": make(family), "method": "fedotp", "population": 2}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    more = ["--set=prompt.init=random", "--set=backbone.pretrained=", "--set=data.partition=iid"]
    result = CliRunner().invoke(
        cli.app, ["run", config, "--engine", "local", "--out", str(tmp_path / "run"), *words, *more]
    )
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "name a model that reads CLS" in said or "it gives no features of patches" in said
    assert "Traceback" not in said


def test_the_table_of_the_docs_is_what_was_found():
    if set(FOUND) != set(ROWS):
        pytest.skip("the tests of the families did not all run in this process")
    lines = [FOUND[family] for family in ROWS]
    content = TABLE.read_text(encoding="utf-8")
    start = content.index("| models |")
    end = content.index("\n\n", start)
    head = content[start:end].split("\n")[:2]
    table = "\n".join([*head, *lines])
    if os.environ.get("FL_DUALPRIV_WRITE_TABLES") == "1":
        TABLE.write_text(content[:start] + table + content[end:], encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8")[start:].startswith(table), "set FL_DUALPRIV_WRITE_TABLES=1 to write it"

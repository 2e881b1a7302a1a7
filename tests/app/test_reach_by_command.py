"""Models and words of users through the command: archives, activations, EVA and PE, unknown words, packages."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.models import transformers as hugging_face
from fl_dualpriv.models.open_clip import open_clip
from tests.fl_dualpriv.models import test_families, test_open_clip_others
from tests.fl_dualpriv.models.conftest import _save

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def run(images: Path, out: Path, **settings: Any) -> Result:
    given = {
        **{"data.path": images, "data.partition": "iid", "population": 2, "rounds": 1, "train.local-steps": 1},
        **{"prompt.init": "random", "prompt.n-ctx": 2, "privacy.record.calibrate-to": "noise-multiplier"},
        **{key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()},
    }
    config = str(ROOT / "simulations" / "configs" / "your-data.toml")
    words = [f"--set={key}={value}" for key, value in given.items()]
    return CliRunner().invoke(cli.app, ["run", config, "--engine", "local", "--out", str(out), *words])


def test_openais_archive(images: Path, tiny_clip_dir: Path, tiny_clip_name: str, tmp_path: Path):
    weights = load_file(tiny_clip_dir / "open_clip_model.safetensors")
    file = test_open_clip_others.archive_of(weights, tmp_path / "ViT-Tiny.pt")
    done = run(images, tmp_path / "run", backbone__name=tiny_clip_name, backbone__pretrained=file)
    assert done.exit_code == 0, done.output
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(file.read_bytes()[:-200])
    done = run(images, tmp_path / "again", backbone__name=tiny_clip_name, backbone__pretrained=damaged)
    assert done.exit_code == 2, done.output
    assert f"{damaged} cannot be read as a checkpoint" in " ".join(done.output.split())


def test_the_activation_of_a_file_is_told(
    images: Path, tiny_clip_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = json.loads((tiny_clip_dir / "open_clip_config.json").read_text())["model_cfg"]
    for name in ("Tiny-Both-8", "Tiny-Both-8-quickgelu"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config | {"quick_gelu": name.endswith("gelu")}))
        open_clip.add_model_config(file)
    weights = tmp_path / "weights.bin"
    torch.save(load_file(tiny_clip_dir / "open_clip_model.safetensors"), weights)
    with caplog.at_level(logging.WARNING, "fl_dualpriv"):
        done = run(images, tmp_path / "run", backbone__name="Tiny-Both-8", backbone__pretrained=weights)
    assert done.exit_code == 0, done.output
    assert "Tiny-Both-8 uses GELU. For weights of OpenAI, MetaCLIP or DFN" in caplog.text


@pytest.mark.parametrize(
    ("tower", "pool", "size"),
    [
        ("eva02_tiny_patch14_224", "token", 224),
        pytest.param("vit_pe_core_tiny_patch16_384", "map", 384, marks=pytest.mark.slow),
    ],
)
def test_eva_and_pe_prune(
    tower: str, pool: str, size: int, images: Path, make_clip_dir: Callable[..., Path], tmp_path: Path
):
    vision = {"timm_model_name": tower, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    folder = make_clip_dir({"custom_text": True, "vision_cfg": vision | {"timm_model_pretrained": False}})
    pruning = {"pruning__visual_keep_ratio": 0.5, "pruning__visual_layer": 6}
    done = run(images, tmp_path / "run", backbone__name=f"local-dir:{folder}", **pruning)
    assert done.exit_code == 0, done.output
    assert "0 failed" in done.output


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = test_families.siglip2_fixed(tmp_path_factory.mktemp("parts"))
        torch.nn.init.constant_(made[0].logit_scale, 2.0)
    return _save(tmp_path_factory.mktemp("siglip"), *made)


def test_class_names_that_become_unknown_are_listed(images: Path, siglip: Path, tmp_path: Path):
    names = tmp_path / "classes.json"
    names.write_text(json.dumps({"class-names": {"cat": "zebra", "dog": "yeti"}}))
    done = run(images, tmp_path / "run", backbone__name=f"hf:{siglip}", data__classes=names)
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert "class 'zebra': " in said
    assert "class 'yeti': " in said
    assert "does not know 'zebra'; use other words, or another model" in said


def test_a_tokenizer_that_needs_a_package_names_it(
    images: Path, siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library but it was not found.\nCheckout …")

    monkeypatch.setattr(hugging_face.transformers.AutoTokenizer, "from_pretrained", lacking)
    hugging_face._load_parts.cache_clear()
    hugging_face.load_backbone.cache_clear()
    done = run(images, tmp_path / "run", backbone__name=f"hf:{siglip}")
    assert done.exit_code == 2, done.output
    assert 'its tokenizer needs the package sentencepiece: pip install "fl-dualpriv[siglip]"' in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize("kind", ["hub", "folder"])
def test_names_without_their_prefix_are_told_it(kind: str, images: Path, siglip: Path, tmp_path: Path):
    name = str(siglip) if kind == "folder" else "google/siglip-base-patch16-224"
    done = run(images, tmp_path / "run", backbone__name=name)
    assert done.exit_code == 2, done.output
    assert (f"write hf:{siglip}" if kind == "folder" else "hf:NAME (transformers)") in " ".join(done.output.split())

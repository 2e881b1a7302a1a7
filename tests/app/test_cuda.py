"""The same seeded run on a CUDA device and on the CPU: the noise is the same, the prompts differ by rounding only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fl_dualpriv.config.schema import app_defaults, merge, read_toml
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local

APP_DIR = Path(__file__).parents[2]
CONFIGS = APP_DIR / "simulations" / "configs"
CLIENT_LEVEL: dict[str, Any] = {
    "privacy.record.mechanism": "none",
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.expected-cohort": 5.0,
}

pytestmark = pytest.mark.gpu


def prompts(config: str, changes: dict[str, Any], device: str, out: Path) -> dict[str, torch.Tensor]:
    """Every prompt that a short run leaves, by file."""
    short = {"rounds": 2, "privacy.randomness": "seeded", "resources.device": device, "output.dir": str(out)}
    run_local(APP_DIR, merge(app_defaults(APP_DIR), read_toml(CONFIGS / config), short, changes))
    (shared,) = read_tensors(out / "prompts" / "global.safetensors")[0].values()
    found = {"global": shared}
    for file in sorted(out.glob("clients/*/prompt.safetensors")):
        found[file.parent.name] = read_tensors(file)[0]["personal"]
    return found


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("by-class.toml", {}),
        ("by-class.toml", {"method": "dpfpl-paper", "pruning.update-keep-ratio": 1.0}),
        ("by-class.toml", CLIENT_LEVEL),
        ("by-class.toml", {"pruning.update-rule": "past", "pruning.update-warm-up": 1, "train.optimizer": "adam"}),
        ("by-class.toml", {"privacy.record.noise-space": "feature"}),
        ("vqa.toml", {}),
    ],
    ids=["record-level", "as-published", "client-level", "past-mask-adam", "feature-noise", "questions"],
)
def test_a_cuda_device_gives_the_prompts_of_the_cpu(config: str, changes: dict[str, Any], tmp_path: Path):
    on_cpu = prompts(config, changes, "cpu", tmp_path / "cpu")
    on_cuda = prompts(config, changes, "cuda", tmp_path / "cuda")
    assert on_cuda.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        # Eight steps, each of whose gradients differs by about 1e-5 of its norm; the DP-FPL paper's new
        # factors after every step made 2.4e-3 of it.
        torch.testing.assert_close(on_cuda[name], expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


def test_bfloat16_on_a_cuda_device_ends_and_is_near(tmp_path: Path):
    changes = {"backbone.precision": "bf16"}
    exact = prompts("by-class.toml", {}, "cpu", tmp_path / "fp32")["global"]
    coarse = prompts("by-class.toml", changes, "cuda", tmp_path / "bf16")["global"]
    assert torch.isfinite(coarse).all()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0) > 0.9

"""Whole runs whose personal prompts the server makes of all uploads, on the local engine; and a client's refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.publish.collect import read_material

APP_DIR = Path(__file__).parents[2]
CLIENTS, ROUNDS, STEPS = 4, 3, 2


def run(images: Path, clip: Path, out: Path, changes: dict[str, Any]) -> Path:
    base: dict[str, Any] = {
        "rounds": ROUNDS,
        "population": CLIENTS,
        "supernodes": 2,
        "join-timeout": 1.0,
        "train.local-steps": STEPS,
        "train.sampling-rate": 1.0,
        "train.global-learning-rate": 2.0,
        "train.local-learning-rate": 1.0,
        "prompt.personalisation": "collective",
        "privacy.randomness": "seeded",
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.delta": 1e-3,
        "evaluation.held-out-data": "public",
        "data.ref": "folder",
        "data.path": str(images),
        "backbone.name": f"local-dir:{clip}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
        "output.dir": str(out),
    }
    run_local(APP_DIR, app_defaults(APP_DIR) | base | changes)
    return out


def of_clients(out: Path, name: str) -> dict[str, Tensor]:
    """Tensors of all clients' files of this name, stacked."""
    files = [read_tensors(f)[0] for f in sorted(out.glob(f"clients/*/{name}.safetensors"))]
    return {key: torch.stack([tensors[key] for tensors in files]) for key in files[0]}


def sent(out: Path) -> Tensor:
    """The uploads of the last two rounds, (round, client, n_ctx, ctx_dim)."""
    kept = of_clients(out, "sent")
    return torch.stack([kept[name] for name in sorted(kept)]).double()


def test_without_noise_the_parts_are_half_of_the_summed_deviations(images: Path, tiny_clip_dir: Path, tmp_path: Path):
    """Two rounds, all of whose uploads are kept. Half, because the local rate is half of the global one."""
    out = run(images, tiny_clip_dir, tmp_path / "run", {"privacy.record.mechanism": "none", "rounds": 2})
    uploads = sent(out)
    deviations = uploads - uploads.mean(dim=1, keepdim=True)
    trained_with, part = of_clients(out, "prompt"), of_clients(out, "part")
    torch.testing.assert_close(trained_with["personal"].double(), deviations[0] / 2, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(part["personal"].double(), deviations.sum(dim=0) / 2, atol=1e-7, rtol=1e-5)
    last, _ = read_tensors(out / "prompts" / "global.safetensors")
    assert torch.equal(part["global"][0], last["global"])
    assert bool(part["personal"].flatten(1).any(dim=1).all())


def test_under_much_noise_every_client_has_the_shared_prompt(images: Path, tiny_clip_dir: Path, tmp_path: Path):
    out = run(images, tiny_clip_dir, tmp_path / "run", {"privacy.record.noise-multiplier": 100.0})
    assert not of_clients(out, "part")["personal"].any()
    assert bool(sent(out).any())


@pytest.mark.parametrize("strategy", ["strategies.krum:Krum", "strategies.fedavg:FedAvg"])
def test_any_strategy_goes_with_it(strategy: str, images: Path, tiny_clip_dir: Path, tmp_path: Path):
    changes = {"strategy.ref": strategy, "privacy.record.mechanism": "none", "rounds": 2}
    out = run(images, tiny_clip_dir, tmp_path / "run", changes)
    uploads = sent(out)
    expected = (uploads - uploads.mean(dim=1, keepdim=True)).sum(dim=0) / 2
    torch.testing.assert_close(of_clients(out, "part")["personal"].double(), expected, atol=1e-7, rtol=1e-5)


def test_where_nothing_is_scored_the_export_has_the_part_of_the_last_training_and_says_so(
    images: Path, tiny_clip_dir: Path, tmp_path: Path
):
    changes = {"privacy.record.noise-multiplier": 0.3, "evaluation.held-out-data": "private", "rounds": 2}
    out = run(images, tiny_clip_dir, tmp_path / "run", changes)
    assert not list(out.glob("clients/*/part.safetensors"))
    material = read_material(out, 0)
    last = read_tensors(out / "prompts" / "global.safetensors")[0]["global"]
    trained_with = of_clients(out, "prompt")["personal"][0]
    assert bool(trained_with.any())
    assert torch.equal(material.prompt, last + trained_with)
    assert any("the final one was not sent" in note for note in material.notes)

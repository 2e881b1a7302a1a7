"""Gradient inversion: the server's linear algebra, that it has power, and that noise takes the power away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attacks.federation import Federation
from attacks.inversion import audit_inversion
from attacks.reconstruction import jacobian, prior_of
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge, read_toml
from fl_dualpriv.errors import ConfigError

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
HEAD: dict[str, Any] = {"prompt.learner": "head", "method": "promptfl", "prompt.rank": 4}
NO_DP: dict[str, Any] = {"privacy.record.mechanism": "none"}
TRUSTING: dict[str, Any] = {"privacy.record.trusts-server": True, "train.local-steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> dict[str, Any]:
    """Two clients with two classes of 20 blocky images each, and 40 public images more."""
    root, rng = tmp_path_factory.mktemp("blocks"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 20), ("test", 1)):
        for name in ("cat", "dog", "bus", "tree"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
                Image.fromarray(blocks).resize((32, 32)).save(root / split / name / f"{i:02d}.png")
    return DEFAULTS | {
        "population": 2,
        "privacy.record.calibrate-to": "noise-multiplier",  # to calibrate takes seconds
        "privacy.record.delta": 1e-3,
        "data.ref": "folder",
        "data.path": str(root),
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "resources.device": "cpu",
        "resources.feature-cache": "off",
    }


@pytest.mark.parametrize("learner", [{}, HEAD], ids=["context", "head"])
def test_the_jacobian_is_the_towers(base: dict[str, Any], learner: dict[str, Any]):
    """W(P + h·D) − W(P − h·D) over 2h is the Jacobian times D, up to h² and float32 rounding over h."""
    federation = Federation(RunConfig.from_run_config(base | learner | NO_DP))
    size = float(federation.start.std())
    prompt = federation.start + size * torch.randn(federation.start.shape, generator=torch.Generator().manual_seed(0))
    direction = size * torch.randn(prompt.shape, generator=torch.Generator().manual_seed(1))
    h = 1e-2
    ahead, behind = federation.tower.values(torch.stack([prompt + h * direction, prompt - h * direction]))
    found = jacobian(federation.tower(prompt[None])) @ direction.flatten()
    wanted = (ahead - behind) / (2 * h)
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_the_prior_gives_back_its_images():
    features = torch.nn.functional.normalize(torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) + 2)
    prior = prior_of(features)
    drawn = prior.features(torch.randn(4000, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(drawn.mean(dim=0), features.mean(dim=0), atol=0.02)
    # No constant is closer on average than the normalised mean: their sum's direction.
    assert float((features @ prior.guess).mean()) == pytest.approx(float(features.mean(dim=0).norm()), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        pytest.param(NO_DP, 0.9, id="context"),
        pytest.param(NO_DP | HEAD, 0.9, id="head"),
        pytest.param({"method": "dpfpl-paper"}, 0.9, id="dpfpl-paper: the server sees clean gradients"),
        pytest.param(TRUSTING | HEAD, 0.8, id="trusted server: clipped, not noised"),
        pytest.param(NO_DP | {"pruning.update-keep-ratio": 0.75}, 0.4, id="a pruned update", marks=pytest.mark.slow),
    ],
)
def test_a_clean_upload_gives_the_image_away(base: dict[str, Any], changes: dict[str, Any], least: float):
    found = audit_inversion(RunConfig.from_run_config(base | changes), 0, uploads=2)
    assert found.recovered > least
    assert min(found.score_by_upload) > 0.99
    assert found.label_accuracy == 1.0
    assert (found.records, found.uploads, found.label_chance) == (1, 2, 0.25)


@pytest.mark.parametrize(
    "learner", [pytest.param({}, id="context", marks=pytest.mark.slow), pytest.param(HEAD, id="head")]
)
def test_a_noised_upload_gives_the_average_image(base: dict[str, Any], learner: dict[str, Any]):
    # 50 releases at q = 0.15 with z = 4 are of ε < 1 at δ = 1e-3.
    config = RunConfig.from_run_config(base | learner | {"privacy.record.noise-multiplier": 4.0})
    found = audit_inversion(config, 0, uploads=4)
    assert isinstance(found.epsilon_claimed, float)
    assert found.epsilon_claimed < 1.0
    assert found.recovered < 0.1


@pytest.mark.slow
def test_two_records_are_matched(base: dict[str, Any]):
    found = audit_inversion(RunConfig.from_run_config(base | HEAD | NO_DP), 0, records=2, uploads=2)
    assert found.recovered > 0.3
    assert len(found.score_by_upload) == 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"records": 0}, "records = 0"),
        ({}, {"records": 99}, "has 40 only"),
        ({"method": "local-only"}, {}, "uploads nothing"),
        ({"privacy.record.noise-space": "feature"}, {}, "noise-space"),
        ({"train.top-m": 2}, {}, "top-m"),
    ],
)
def test_what_cannot_be_inverted_is_said(
    base: dict[str, Any], changes: dict[str, Any], options: dict[str, int], message: str
):
    with pytest.raises(ConfigError, match=message):
        audit_inversion(RunConfig.from_run_config(base | changes), 0, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("privacy", "low", "high"), [(NO_DP, 0.7, 1.0), ({}, -0.3, 0.1)], ids=["none", "epsilon 4"])
def test_the_demo(privacy: dict[str, Any], low: float, high: float):
    file = read_toml(APP_DIR / "simulations" / "configs" / "by-class.toml")
    found = audit_inversion(RunConfig.from_run_config(merge(DEFAULTS, file, privacy)), 0, uploads=4)
    assert low < found.recovered <= high

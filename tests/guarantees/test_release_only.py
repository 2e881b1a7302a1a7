"""Data enter a client's state and upload through the noised release alone: fix the release, and they cannot be seen.

This is the proof that masks, carriers, factors and residual are post-processing, run as a test: any use of the clean
sum (a mask ranked on it, carriers taken from it) makes two unrelated data sets give different results.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clients.dualpriv
from clients.dualpriv import LocalTraining, Participant, cohort_update
from fl_dualpriv.client import ClientData, fresh_state
from fl_dualpriv.config import app_defaults
from fl_dualpriv.local_engine import run_local
from fl_dualpriv.methods import METHODS
from fl_dualpriv.privacy import noise
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.prompts.plain_tower import FunctionTower

N_CTX, CTX_DIM, N_CLS, EMBED = 4, 16, 5, 8
WEIGHT = torch.randn(N_CLS * EMBED, N_CTX * CTX_DIM, generator=torch.Generator().manual_seed(0))
START = 0.1 * torch.randn(N_CTX, CTX_DIM, generator=torch.Generator().manual_seed(1))


def class_features(prompt: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize((WEIGHT @ prompt.flatten()).reshape(N_CLS, EMBED), dim=1)


def records(seed: int) -> ClientData:
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(40, EMBED, generator=g), dim=1)
    labels = torch.randint(0, N_CLS, (40,), generator=g)
    return ClientData(features=features, labels=labels)


@pytest.mark.parametrize("noise_space", ["prompt", "feature"])
@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@pytest.mark.parametrize("method", ["dpfpl", "lowrank", "full", "local-only", "promptfl"])
def test_with_the_release_fixed_two_data_sets_cannot_be_told_apart(
    monkeypatch: pytest.MonkeyPatch, method: str, keep_ratio: float, noise_space: Any
) -> None:
    parts = METHODS[method]
    plan = RecordLevelPlan(
        clip_norm=0.5,
        noise_multiplier=1.0,
        sampling_rate=0.3,
        releases=4,
        delta=1e-4,
        trusts_server=False,
        personal=parts.personal,
    )
    training = LocalTraining(
        local_steps=4,
        sampling_rate=0.3,
        global_learning_rate=0.7,
        local_learning_rate=0.9,
        update_keep_ratio=keep_ratio,
        top_m=0,
        noise_space=noise_space,
        workspace_bytes=2**20,
    )

    def run(seed: int) -> list[torch.Tensor]:
        shape = (4, N_CTX, CTX_DIM) if noise_space == "prompt" else (4, N_CLS, EMBED)
        released = iter(torch.randn(*shape, generator=torch.Generator().manual_seed(9)).double().unbind())
        monkeypatch.setattr(clients.dualpriv, "_release", lambda clean, plan, source: next(released))
        participant = Participant(
            partition=0,
            state=fresh_state(N_CTX, CTX_DIM, 2),
            data=records(seed),
            random=lambda purpose, step: KeyedRandom(StreamKey(seed=0, purpose=purpose, step=step)),
        )
        ((upload, state),) = cohort_update(
            global_prompt=START,
            participants=[participant],
            tower=FunctionTower(class_features),
            logit_scale=20.0,
            parts=parts,
            training=training,
            plan=plan,
        )
        return [upload, state.personal, state.carrier]

    first, second = run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(bool(tensor.any()) for tensor in first[:2])  # and something did move


def test_a_run_never_asks_for_the_same_stream_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_clip_dir: Path
) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    asked: Counter[StreamKey] = Counter()
    make = KeyedRandom.__init__

    def counted(self: KeyedRandom, key: StreamKey) -> None:
        asked[key] += 1
        make(self, key)

    monkeypatch.setattr(noise.KeyedRandom, "__init__", counted)
    app = Path(__file__).parents[2]
    changes: dict[str, Any] = {
        "population": 2,
        "rounds": 2,
        "train.local-steps": 2,
        "privacy.randomness": "seeded",
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.delta": 1e-3,
        "privacy.client.mechanism": "gaussian",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.expected-cohort": 2.0,
        "data.path": str(tmp_path / "images"),
        "backbone.name": f"local-dir:{tiny_clip_dir}",
        "output.dir": str(tmp_path / "out"),
    }
    run_local(app, app_defaults(app) | changes)
    # 2 clients x 2 rounds x 2 steps, a batch and a noise each; a cohort and a server noise for each round
    assert sum(key.purpose in ("batch", "noise") for key in asked) == 16
    assert sum(key.purpose in ("cohort", "server-noise") for key in asked) == 4
    assert max(asked.values()) == 1

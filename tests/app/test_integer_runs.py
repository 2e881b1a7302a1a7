"""Whole runs in integer arithmetic: the prompts of the float run up to the grid, exact uploads, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import run_local
from fl_dualpriv.server.strategy import RoundStrategy
from tests.app.run_folders import events_of

APP_DIR = Path(__file__).parents[2]
CLIENT_LEVEL: dict[str, Any] = {
    "method": "promptfl",
    "privacy.record.mechanism": "none",
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.clip-norm": 0.01,
    "privacy.client.expected-cohort": 3.0,
}
TRUSTING: dict[str, Any] = {"privacy.record.trusts-server": True, "train.local-steps": 1}
FEATURE: dict[str, Any] = {"privacy.record.noise-space": "feature"}


def run(out: Path, images: Path, clip: Path, changes: dict[str, Any]) -> dict[str, Tensor]:
    base: dict[str, Any] = {
        "rounds": 2,
        "population": 4,
        "join-timeout": 1.0,
        "train.local-steps": 2,
        "train.sampling-rate": 0.5,
        "privacy.randomness": "seeded",
        "privacy.record.calibrate-to": "noise-multiplier",
        "privacy.record.delta": 1e-3,
        "evaluation.held-out-data": "public",
        "data.path": str(images),
        "backbone.name": f"local-dir:{clip}",
        "resources.device": "cpu",
        "output.dir": str(out),
    }
    run_local(APP_DIR, app_defaults(APP_DIR) | base | changes)
    personal = {p.parent.name: read_tensors(p)[0]["personal"] for p in (out / "clients").glob("*/prompt.safetensors")}
    return {"global": read_tensors(out / "prompts" / "global.safetensors")[0]["global"], **personal}


@pytest.mark.parametrize(
    "changes",
    [{}, FEATURE, TRUSTING, CLIENT_LEVEL],
    ids=["record", "feature", "trusting", "client"],
)
def test_an_integer_run_is_the_float_run_up_to_the_grid(
    tmp_path: Path, images: Path, tiny_clip_dir: Path, changes: dict[str, Any]
) -> None:
    """The same streams give the same noise, rounded; the rest is a unit of 2**-20 C a record and step."""
    floats = run(tmp_path / "float", images, tiny_clip_dir, changes)
    integers = run(tmp_path / "integer", images, tiny_clip_dir, changes | {"privacy.arithmetic": "integer"})
    assert floats.keys() == integers.keys()
    for name, prompt in floats.items():
        # Noise alone moves a prompt by C z / (q n) = 0.1 of the clip norm and more, 10**5 units.
        assert not torch.equal(integers[name], prompt) or not prompt.any()
        assert (integers[name] - prompt).abs().max() <= 1e-4 * prompt.abs().max()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("float", "integer"))
    assert one["privacy"] == two["privacy"] != []  # the same ε
    assert sum("arithmetic = integer" in note for note in two["notes"]) == 1
    assert not any("integer" in note for note in one["notes"])
    assert ledgers(tmp_path / "float") == ledgers(tmp_path / "integer") != {}


def ledgers(out: Path) -> dict[str, list[dict[str, Any]]]:
    """All events of all ledgers, without what tells runs apart."""
    found = {}
    for path in sorted(out.glob("**/ledger.jsonl")):
        found[str(path.relative_to(out))] = [
            {key: event[key] for key in ("unit", "server_round", "sampling_rate", "noise_multiplier")}
            for event in events_of(path)
        ]
    return found


def test_trusting_clients_upload_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Path, tiny_clip_dir: Path
) -> None:
    seen: list[Tensor] = []
    read = RoundStrategy._read_uploads

    def looking(self: RoundStrategy, server_round: int, replies: Any) -> Any:
        partitions, values = read(self, server_round, replies)
        seen.append(values)
        return partitions, values

    monkeypatch.setattr(RoundStrategy, "_read_uploads", looking)
    run(tmp_path, images, tiny_clip_dir, TRUSTING | {"privacy.arithmetic": "integer"})
    assert [len(values) for values in seen] == [4, 4]
    for values in seen:
        assert values.dtype == torch.float64
        assert torch.equal(values, values.round())
        assert values.abs().max() > 2**10  # in units, not in gradients


def test_the_wire_keeps_integers_up_to_the_exact_range() -> None:
    whole = torch.tensor([[2.0**52 - 1, -(2.0**52) + 1, 1.0]], dtype=torch.float64)
    content = messages.uploads_content(messages.Uploads(partitions=(0,), values=whole))
    array = content.array_records["arrays"]["upload"].numpy()
    assert array.dtype == "float64"
    assert torch.equal(torch.from_numpy(array.copy()), whole)


REFUSALS = {
    "weights": (TRUSTING | {"strategy.ref": "strategies.fedavg:FedAvg"}, PrivacyError, "FedAvg weighs clients"),
    "published": ({"method": "dpfpl-paper"}, ConfigError, "as in the DP-FPL paper"),
    "no noise": ({"privacy.record.mechanism": "none"}, ConfigError, "needs noise at one level"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_exact_is_refused_at_the_start(
    tmp_path: Path, images: Path, tiny_clip_dir: Path, name: str
) -> None:
    changes, error, message = REFUSALS[name]
    # Unequal clients, so that FedAvg's weights are no whole numbers.
    unequal = {"data.partition": "dirichlet", "privacy.arithmetic": "integer"}
    with pytest.raises(error, match=message):
        run(tmp_path, images, tiny_clip_dir, unequal | changes)
    assert not list((tmp_path / "clients").glob("*/ledger.jsonl"))

"""What the owner of a deployed node publishes from its state folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.flower.local import LocalGrid, load_apps
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.publish.file import read_published, write_published
from fl_dualpriv.publish.rules import publish
from fl_dualpriv.run.file_kinds import kinds_in
from tests.app.published_runs import APP_DIR, CLIENTS, exported, scores, settings_for


@pytest.fixture
def deployed(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """State folders after a run whose nodes have folders of their own, as deployed ones do."""

    def start(changes: dict[str, Any] | None = None) -> list[Path]:
        config = settings_for(images, tiny_clip_dir) | {"output.dir": str(tmp_path / "run")} | (changes or {})
        server, client = load_apps(APP_DIR)
        grid = LocalGrid(client, CLIENTS, config)
        folders = [tmp_path / f"state-{i}" for i in range(CLIENTS)]
        for context, folder in zip(grid.contexts.values(), folders, strict=True):
            context.node_config["state-dir"] = str(folder)
        server(grid, Context(run_id=grid.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=config))
        return folders

    return start


def test_the_owner_of_a_node_publishes_what_it_scored(
    deployed: Callable[..., list[Path]], tiny_clip_dir: Path, tmp_path: Path
):
    folders = deployed()
    for folder in folders:  # nothing in a node's own folder is a result: its owner exports
        assert set(kinds_in(folder, "client").values()) == {"operator"}
        assert {"node-run.json", "scored.safetensors"} <= kinds_in(folder, "client").keys()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    prompts = [exported(f, i, tmp_path / f"{i}.safetensors", tiny_clip_dir) for i, f in enumerate(folders)]
    final = summary["accuracy"]["final"]
    assert scores(prompts, summary) == (final["local"], final["neighbour"])
    own = [p.facts.source.scores for p in prompts]
    assert sum(s.local for s in own if s and s.local is not None) / CLIENTS == pytest.approx(final["local"])
    assert {g.epsilon for p in prompts for g in p.facts.guarantees} == {epsilon(0.15, 1.0, 2, 1e-3)}
    assert str(folders[0]).encode() not in (tmp_path / "0.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="client 0 of its last run"):
        publish(folders[0], 1)
    with pytest.raises(ConfigError, match="from the server's results"):
        publish(folders[0], None)
    (folders[0] / "ledger.jsonl").unlink()
    with pytest.raises(PrivacyError, match="no line of this run"):
        publish(folders[0], 0)


@pytest.mark.slow
def test_a_node_that_is_never_scored_publishes_what_it_trained_on(deployed: Callable[..., list[Path]], tmp_path: Path):
    folder = deployed({"evaluation.held-out-data": "private"})[1]
    found = publish(folder, 1)
    kept, _ = read_tensors(folder / "prompt.safetensors")
    assert torch.equal(found.prompt, kept["global"] + kept["personal"])
    assert found.facts.source.scores is None
    assert any("did not receive the final one" in note for note in found.facts.notes)
    write_published(tmp_path / "p.safetensors", found)
    assert read_published(tmp_path / "p.safetensors").facts == found.facts
    tensors, metadata = read_tensors(folder / "prompt.safetensors")
    write_tensors(folder / "prompt.safetensors", tensors, metadata | {"server-round": "1"})
    with pytest.raises(ConfigError, match="the last round was 1 of 2"):
        publish(folder, 1)

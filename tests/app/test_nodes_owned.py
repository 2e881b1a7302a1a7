"""On a deployed node its owner's file decides where data, features, model and device are, whatever a run names."""

import stat
from pathlib import Path

import pytest
from flwr.app import Context, MessageType, RecordDict

from fl_dualpriv import messages
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.data.partition import partition
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.server.join import join
from simulations.server_app import app as server_app
from tests.app.client_node import Nodes, ask, tiny_nodes, train, uploads


@pytest.fixture
def nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    return tiny_nodes(tiny_clip_dir, tmp_path)


def own(grid: LocalGrid, tmp_path: Path, text: str) -> None:
    """Give the first node a file of its owner."""
    file = tmp_path / "node.toml"
    file.write_text(f'state-dir = "{tmp_path / "state"}"\ndata-path = "{tmp_path / "images"}"\n{text}')
    grid.contexts[1].node_config["node-file"] = str(file)


def test_all_images_of_the_owners_folder_are_its_clients_own(nodes: Nodes, tmp_path: Path):
    # 16 images; 2 of them cut out for validation and 4 for tests, 1 and 2 of each class (shares 0.1 and 0.2 of 8).
    grid = nodes({"data.path": "/srv/of/the/server", "data.ref": "folder"})
    own(grid, tmp_path, "")
    (card,) = messages.read_cards(ask(grid, RecordDict(), MessageType.QUERY))
    assert (card.partition, card.num_examples) == (0, 10)
    simulated = nodes()
    (half,) = messages.read_cards(ask(simulated, RecordDict(), MessageType.QUERY))
    assert half.num_examples == 5  # one of two clients of one folder


def test_features_of_the_data_are_kept_where_the_owner_says(nodes: Nodes, tmp_path: Path):
    named = tmp_path / "named-by-the-server"
    grid = nodes({"resources.feature-cache": str(named)})
    own(grid, tmp_path, "")
    uploads(train(grid))
    assert list((tmp_path / "state" / "features").rglob("*.npy"))
    assert (tmp_path / "state" / "ledger.jsonl").exists()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700  # made by the run: for its owner only
    assert not named.exists()


def test_the_owners_model_and_device_are_taken_and_a_missing_gpu_is_said_once(
    nodes: Nodes, tiny_clip_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    grid = nodes({"backbone.name": "local-dir:/nowhere", "resources.device": "cuda:98"})
    own(grid, tmp_path, f'device = "cuda:99"\n[model]\nname = "local-dir:{tiny_clip_dir}"\n')
    uploads(train(grid))
    uploads(train(grid, server_round=2))
    said = [record.getMessage() for record in caplog.records if "going on with the CPU" in record.getMessage()]
    assert len(said) == 1
    assert 'device = "cuda:99" cannot be used' in said[0]


def test_one_folder_is_one_client(nodes: Nodes, tmp_path: Path):
    grid = nodes({"supernodes": 1}, num_supernodes=1)
    own(grid, tmp_path, "")
    reply = ask(grid, RecordDict(), MessageType.QUERY)
    assert reply.has_error()
    assert "the run would give it 2 clients; set supernodes = 0" in str(reply.error.reason)


def test_a_simulation_has_one_folder_for_all_and_refuses_to_give_it_to_everybody(nodes: Nodes, tmp_path: Path):
    grid = nodes({"data.partition": "by-node"})
    context = Context(
        run_id=grid.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=grid.contexts[1].run_config
    )
    with pytest.raises(ConfigError, match=r"by-node. is for deployed nodes"):
        server_app(grid, context)


def test_by_node_gives_all_records_even_if_clients_outnumber_them():
    parts = partition([0, 1, 1], "by-node", 5, 0.3, 0)  # type: ignore[arg-type]
    assert [part.tolist() for part in parts] == [[0, 1, 2]] * 5
    with pytest.raises(ConfigError, match="no training image"):
        partition([], "by-node", 5, 0.3, 0)  # type: ignore[arg-type]


def test_a_node_that_does_not_say_whom_it_hosts_is_named_as_that(nodes: Nodes, monkeypatch: pytest.MonkeyPatch):
    grid = nodes()
    answer = LocalGrid.pull_messages
    monkeypatch.setattr(LocalGrid, "pull_messages", lambda self, ids: list(answer(self, ids))[1:])  # one is late
    with pytest.raises(ConfigError, match="1 of 2 nodes did not report their clients within 3600 s"):
        join(grid, RunConfig.from_run_config(grid.contexts[1].run_config))


@pytest.mark.parametrize(("key", "path_key"), [("method", "method-path"), ("prompt.learner", "prompt.learner-path")])
def test_a_node_imports_no_code_from_a_folder_that_a_run_names(nodes: Nodes, tmp_path: Path, key: str, path_key: str):
    folder = tmp_path / "uploaded"
    folder.mkdir()
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    grid = nodes({key: "planted:Class", path_key: str(folder)})
    limits = "max-sampling-rate = 0.5\nmin-noise-multiplier = 1.0\nmax-clip-norm = 1.0\n"
    own(grid, tmp_path, f"[budget]\nepsilon = 80.0\ndelta = 1e-3\n{limits}")
    reply = ask(grid, RecordDict(), MessageType.QUERY)
    assert reply.has_error()
    assert "imports no code from a folder that a run names; put the file into the app" in reply.error.reason
    assert not (tmp_path / "it-ran").exists()
    assert path_key in (tmp_path / "state" / "refusals.jsonl").read_text()

"""Many clients of one node at once: the same numbers, within the memory that a node was given."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fl_dualpriv.client.node
import fl_dualpriv.client.round
from fl_dualpriv import messages
from tests.app.client_node import KINDS, Nodes, evaluate, tiny_nodes, train, uploads


@pytest.fixture
def nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    return tiny_nodes(tiny_clip_dir, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_many_clients_at_once_are_those_of_each_alone(nodes: Nodes, kind: messages.PromptKind):
    grid = nodes({"population": 4, "data.partition": "iid"}, num_supernodes=1)
    train(grid, partitions=(0, 1, 3))  # client 2 has no personal prompt yet
    together = messages.read_scores(evaluate(grid, kind, (0, 1, 2, 3)))
    alone = [messages.read_scores(evaluate(grid, kind, (p,))).values for p in range(4)]
    assert together.partitions == (0, 1, 2, 3)
    for name in ("correct", "held"):
        assert np.array_equal(getattr(together.values, name), np.concatenate([getattr(own, name) for own in alone]))
    assert all(np.array_equal(together.values.total, own.total) for own in alone)


def test_the_workspace_splits_the_work_and_changes_no_result(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    everyone, found = (0, 1, 2, 3), []
    for at_once in (4, 3):
        for module in (fl_dualpriv.client.round, fl_dualpriv.client.node):
            monkeypatch.setattr(module, "prompts_at_once", lambda *_, n=at_once: n)
        changes = {"population": 4, "privacy.randomness": "seeded", "output.dir": str(tmp_path / f"out-{at_once}")}
        grid = nodes(changes, num_supernodes=1)
        done = uploads(train(grid, partitions=everyone))
        assert done.partitions == everyone
        found.append((done.values, messages.read_scores(evaluate(grid, partitions=everyone)).values))
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1].correct, found[1][1].correct)


@pytest.mark.parametrize(("at_once", "prompts"), [(0, 1), (1, 1), (10, 1), (19, 1), (20, 2), (205, 20)])
def test_at_least_one_prompt_goes_through_the_tower(at_once: int, prompts: int):
    class Tower:
        bytes_per_prompt = 10

    assert fl_dualpriv.client.node.prompts_at_once(Tower(), at_once, torch.device("cpu")) == prompts  # type: ignore[arg-type]


def test_no_more_prompts_than_the_caches_hold_go_together_on_a_cpu():
    class Tower:
        def __init__(self, size: int) -> None:
            self.bytes_per_prompt = size

    def at_once(size: int, device: str = "cpu") -> int:
        return fl_dualpriv.client.node.prompts_at_once(Tower(size), 2**30, torch.device(device))  # type: ignore[arg-type]

    assert at_once(2**14) == 512  # 8 MiB
    assert at_once(2**24) == 8  # a text tower's products want eight
    assert at_once(2**24, "cuda") == 64  # the workspace alone
    assert at_once(2**29) == 2


def test_memory_is_noted_beside_the_results_and_never_sent(nodes: Nodes, tmp_path: Path):
    reply = train(nodes())
    (file,) = (tmp_path / "out" / "actors").iterdir()
    assert file.name == f"actor-{os.getpid()}.json"
    assert json.loads(file.read_text())["peak-mib"] > 50
    assert list(reply.content) == ["arrays", "clients"]

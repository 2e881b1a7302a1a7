"""A public class prior leaves a row a function of one record, for every way to learn; without one nothing changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.client.node import Node, RunContext
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.config.schema import RunConfig
from fl_dualpriv.files import read_tensors
from fl_dualpriv.privacy.step import client_rows
from fl_dualpriv.publish.collect import read_material
from tests.guarantees import prior_checks, run_checks
from tests.guarantees.run_checks import Federation

TRAINED = [
    name
    for name, parts in METHODS.items()
    if parts.trains and not parts.published_procedure and parts.learns != "prototypes"
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Federation:
    images = run_checks.write_images(tmp_path_factory.mktemp("images"))
    return Federation(folder=tmp_path_factory.mktemp("runs"), images=images, clip=tiny_clip_dir)


@pytest.mark.parametrize(
    "check",
    [
        prior_checks.every_closed_form_is_autograds_with_the_prior,
        prior_checks.a_record_takes_only_its_own_row,
        prior_checks.a_client_has_its_own_prior,
    ],
    ids=lambda check: check.__name__,
)
def test_holds(check: Callable[[], None]) -> None:
    check()


def test_a_prior_of_a_list_knows_no_count(federation: Federation) -> None:
    prior_checks.a_prior_of_a_list_knows_no_count(federation)


def run_context(federation: Federation, **changes: Any) -> RunContext:
    """Each of two clients has one class of two on its list."""
    config = {"supernodes": 1, "data.partition": "by-class", "train.class-prior": "list"} | changes
    return RunContext(RunConfig.from_run_config(federation.config(config)))


@pytest.mark.parametrize("learner", [*TRAINED, "head", "top-m", "feature"])
def test_no_record_moves_another_ones_row_in_any_way_to_learn(federation: Federation, learner: str) -> None:
    """With the objective that a run has, bit by bit; and the prior is in the loss."""
    special: dict[str, dict[str, Any]] = {
        "head": {"method": "promptfl", "prompt.learner": "head"},
        "top-m": {"train.top-m": 2},
        "feature": {"privacy.record.noise-space": "feature"},
    }
    found = run_context(federation, **(special.get(learner) or {"method": learner}))
    data = found.task.client_data(0)
    shared = found.task.initial_prompt(found.config)
    prompt = found.method.effective(
        shared, 0.05 * torch.randn(shared.shape, generator=torch.Generator().manual_seed(3))
    )

    def rows(picked: np.ndarray, own: Any = data) -> Tensor:
        return torch.cat(list(client_rows(found.objective.bind([own]).gradients(prompt[None], [picked]), 0)))[
            : len(picked)
        ]

    everybody = np.arange(data.num_examples)
    whole = rows(everybody)
    assert bool(whole.any())
    for gone in everybody:
        kept = np.delete(everybody, gone)
        assert torch.equal(rows(kept), whole[kept])
    assert not torch.allclose(rows(everybody, replace(data, log_prior=None)), whole)  # type: ignore[type-var]


@pytest.mark.parametrize("sums", ["rows", "sums"])
def test_a_client_that_holds_all_classes_has_the_bits_of_a_run_without_priors(sums: str) -> None:
    """Alone, where its prior is None, and beside a client that has one."""
    first, uniform, _ = prior_checks.clients()
    assert uniform.log_prior is None
    for learner in prior_checks.learners():
        prompts = learner.prompts[:2]
        picked = [np.arange(own.num_examples) for own in (first, uniform)]

        def of_uniform(own: Any, learner: Any = learner, prompts: Tensor = prompts, picked: Any = picked) -> Tensor:
            gradients = learner.objective.bind([own, uniform]).gradients(prompts, picked)
            return gradients.sums()[1] if sums == "sums" else torch.cat(list(client_rows(gradients, 1)))

        assert torch.equal(of_uniform(first), of_uniform(replace(first, log_prior=None))), learner.name


def test_a_card_says_no_more_with_a_prior_than_without(federation: Federation) -> None:
    """Neither counts of classes nor the list: a server learns the number of records and the way of computing rows."""
    cards = []
    for prior in ("none", "list"):
        node = Node(
            run_context=run_context(federation, **{"train.class-prior": prior}),
            index=0,
            run_folder=federation.folder,
            state_dir=None,
        )
        content = messages.cards_content(node.cards())
        assert {name: set(record) for name, record in content.items()} == {  # type: ignore[arg-type]
            "card": {"partition-id", "num-examples"},
            "machine": {"rows"},
        }
        cards.append([(card.partition, card.num_examples) for card in node.cards()])
    assert cards[0] == cards[1]


def test_a_run_with_a_prior_costs_the_same_and_says_that_it_has_one(federation: Federation) -> None:
    """The privacy table is that of a run without; the prompts are not; results and published prompts name the prior."""
    summaries, prompts = {}, {}
    for prior in ("none", "list"):
        changes = {
            "rounds": 1,
            "train.class-prior": prior,
            "train.sampling-rate": 1.0,
            "privacy.randomness": "seeded",
            "evaluation.held-out-data": "public",
        }
        folder = federation.run(f"whole-{prior}", changes)
        summaries[prior] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        prompts[prior] = read_tensors(folder / "prompts" / "global.safetensors")[0]["global"]
        names = [note for note in summaries[prior]["notes"] if "class-prior = list" in note]
        assert len(names) == (prior == "list")
        assert [n for n in read_material(folder, 0).notes if "class-prior = list" in n] == names
    assert summaries["none"]["privacy"] == summaries["list"]["privacy"]
    assert not torch.equal(prompts["none"], prompts["list"])

"""The free rival is chosen on validation records, scored once, and never below the un-tuned model at home."""

import pytest
import torch
from torch import Tensor

from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.metrics import ScoreTable, mean
from fl_dualpriv.tasks.disclosure import may_choose_on_val
from fl_dualpriv.tasks.free_rival import FreeForm, PublicModel, choose_free_form
from tests.app.test_config_keys import APP_DIR

# Two classes, two records of each; both clients hold one of them.
LABELS = torch.tensor([0, 0, 1, 1])
HELD = torch.tensor([[True, False], [False, True]])
ALL = torch.ones(2, 2, dtype=torch.bool)
RIGHT, WRONG = torch.eye(2)[LABELS], 1 - torch.eye(2)[LABELS]
HALF = torch.tensor([[1.0, 0.0]] * 4)


def model(name: str, val: Tensor, test: Tensor = HALF, asked: list[str] | None = None) -> PublicModel:
    def logits(split: str) -> Tensor:
        if asked is not None:
            asked.append(f"{name} {split}")
        return val if split == "val" else test

    return PublicModel(name=name, logits=logits)


def choose(
    models: list[PublicModel],
    held: Tensor = ALL,
    validate: bool = True,
    prior: Tensor | None = None,
) -> FreeForm:
    validation = (lambda: (LABELS, LABELS)) if validate else None
    return choose_free_form(models, validation, held, 2, len(held), prior)


def test_a_single_form_reads_no_validation_record():
    asked: list[str] = []
    assert choose([model("un-tuned", RIGHT, asked=asked)], HELD).name == "un-tuned, own class list"
    assert choose([model("un-tuned", RIGHT, asked=asked)], ALL).name == "un-tuned"  # every list is complete
    assert asked == []


def test_the_best_on_validation_records_is_chosen_whatever_the_test_records_say():
    models = [model("un-tuned", HALF, test=RIGHT), model("ensemble", RIGHT, test=WRONG), model("third", WRONG)]
    assert choose(models).name == "ensemble"


def test_a_tie_goes_to_the_first():
    assert choose([model("un-tuned", RIGHT), model("ensemble", RIGHT)]).name == "un-tuned"


def test_private_validation_records_decide_nothing():
    """The choice would be a release that no ledger counts."""
    asked: list[str] = []
    models = [model("mean of templates", WRONG, asked=asked), model("un-tuned", RIGHT, asked=asked)]
    assert choose(models, validate=False).name == "mean of templates"
    assert asked == []


def test_a_prior_is_one_of_the_uses():
    second = torch.tensor([[0.0, 5.0]] * 2)
    # All answers of the plain model are wrong. With the prior they are class 1, which is right for one class of two.
    assert choose([model("un-tuned", WRONG)], ALL, prior=second).name == "un-tuned, own class prior"
    assert choose([model("un-tuned", RIGHT)], ALL, prior=second).name == "un-tuned"
    # Within its list of one class each client is right, and with the prior only the second one is.
    assert choose([model("un-tuned", WRONG)], HELD, prior=second).name == "un-tuned, own class list"


@pytest.mark.parametrize("held", [HELD, ALL])
def test_the_rival_is_never_below_the_un_tuned_model_at_home(held: Tensor):
    form = choose([model("un-tuned", HALF)], held)
    total = torch.tensor([2, 2])
    free = ScoreTable.of(form.counts(HALF, LABELS, LABELS, held), total, held)
    plain = ScoreTable.of(torch.tensor([2, 0]), total, held)
    assert (mean(free.local()) or 0) >= (mean(plain.local()) or 0)
    assert free.neighbour() == plain.neighbour()


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),  # the demo's validation images are public
        ({"evaluation.held-out-data": "private"}, False),
        ({"evaluation.held-out-data": "private", "privacy.record.mechanism": "none"}, True),
        ({"evaluation.held-out-data": "public", "data.path": "/nowhere"}, True),
    ],
)
def test_validation_records_decide_only_where_their_scores_may_leave(changes: dict[str, str], may: bool):
    assert may_choose_on_val(RunConfig.from_run_config(app_defaults(APP_DIR) | changes)) is may

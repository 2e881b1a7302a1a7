"""Rows are their records' own bit by bit on this machine's kernels, and the self-check notices kernels that mix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.node import RunContext
from fl_dualpriv.config.methods import METHODS
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.row_check import RowPath, checked_objective
from fl_dualpriv.learners.rows import Batches
from fl_dualpriv.privacy.step import client_rows
from fl_dualpriv.towers.products import prompt_products
from fl_dualpriv.towers.shared_prefix_vjp import SharedPrefixFeatures
from tests.guarantees import row_checks, run_checks
from tests.guarantees.row_mutations import by_number, by_place, unpadded_blocks

DEFAULTS = app_defaults(Path(__file__).parents[2])
TRAINED = [name for name, parts in METHODS.items() if parts.trains and not parts.published_procedure]


@pytest.mark.parametrize(
    "check",
    [
        row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit,
        row_checks.clients_get_what_each_gets_alone,
        row_checks.feature_rows_do_not_depend_on_their_number,
    ],
    ids=lambda check: check.__name__,
)
def test_holds(check: Callable[[], None]) -> None:
    check()


def check(width: int = 64, n_cls: int = 10, *, private: bool = True, **kind: int) -> RowPath:
    _, path = checked_objective(
        row_checks.objective(width, n_cls, **kind),
        lambda: row_checks.records(width, n_cls, 0, 25),
        row_checks.prompts(width),
        private=private,
    )
    return path


def test_a_kernel_whose_rows_follow_their_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they fail; apart they hold, and that is the form that a run gets."""
    monkeypatch.setattr(SharedPrefixFeatures, "vjp", by_place(SharedPrefixFeatures.vjp))
    assert check() == "records apart"
    row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit()


def test_a_kernel_whose_rows_follow_their_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as long as what is left of a batch, and last bits by how many rows a block has."""
    monkeypatch.setattr(Batches, "blocks", unpadded_blocks)
    monkeypatch.setattr(SharedPrefixFeatures, "vjp", by_number(SharedPrefixFeatures.vjp))
    assert check() == "records apart"
    row_checks.a_record_that_goes_leaves_the_other_rows_bit_by_bit()


@pytest.mark.parametrize("private", [True, False])
def test_clients_that_would_mix_step_one_by_one(monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    for name in ("vjp", "vjp_apart"):
        own = getattr(SharedPrefixFeatures, name)

        def by_company(self: SharedPrefixFeatures, cotangents: Tensor, own: Any = own) -> Tensor:
            return own(self, cotangents) * (1 + 2.0**-22 * (len(cotangents) > 1))

        monkeypatch.setattr(SharedPrefixFeatures, name, by_company)
    assert check(private=private) in ("clients apart", "records and clients apart")


def test_without_a_form_whose_rows_hold_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vjp", "vjp_apart"):
        monkeypatch.setattr(SharedPrefixFeatures, name, by_place(getattr(SharedPrefixFeatures, name)))
    with pytest.raises(PrivacyError, match="nothing is released"):
        check()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_rows_of_nothing_pass_no_check(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """A gradient that is zero, or not finite, would be the same for whoever is in a batch."""
    for name in ("vjp", "vjp_apart"):
        monkeypatch.setattr(SharedPrefixFeatures, name, lambda self, c: c.new_full((*c.shape[:2], 4, 64), value))
    with pytest.raises(PrivacyError):
        check()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks.write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("learner", [*TRAINED, "head", "top-m", "feature"])
def test_every_way_to_learn_is_checked_and_holds_on_the_clients_records(
    images: Path, tiny_clip_dir: Path, tmp_path: Path, learner: str
) -> None:
    """With the objective that a run has: each of a client's records leaves the others' rows as they are, bit by bit."""
    special: dict[str, dict[str, Any]] = {
        "head": {"method": "promptfl", "prompt.learner": "head"},
        "top-m": {"train.top-m": 2},
        "feature": {"privacy.record.noise-space": "feature"},
    }
    config = RunConfig.from_run_config(
        DEFAULTS
        | {
            "population": 2,
            "supernodes": 1,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-3,
            "data.ref": "folder",
            "data.path": str(images),
            "data.partition": "iid",
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
            "output.dir": str(tmp_path / "out"),
        }
        | (special.get(learner) or {"method": learner})
    )
    run_context = RunContext(config)
    assert run_context.row_path in get_args(RowPath)
    data = run_context.task.client_data(0)
    shared = run_context.task.initial_prompt(config)
    prompt = run_context.method.effective(
        shared, 0.05 * torch.randn(shared.shape, generator=torch.Generator().manual_seed(3))
    )
    everybody = np.arange(data.num_examples)

    def rows(picked: np.ndarray) -> Tensor:
        gradients = run_context.objective.bind([data]).gradients(prompt[None], [picked])
        return torch.cat(list(client_rows(gradients, 0)))[: len(picked)]

    whole = rows(everybody)
    assert bool(whole.any())
    for gone in everybody:
        kept = np.delete(everybody, gone)
        assert torch.equal(rows(kept), whole[kept])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("prompts", "rows", "k", "n"), [(5, 4, 32, 96), (8, 31, 128, 512), (3, 1, 512, 64), (2, 600, 64, 64)]
)
def test_a_prompts_products_are_those_of_it_alone(
    prompts: int, rows: int, k: int, n: int, transposed: bool, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(prompts, rows, k, generator=generator)
    weight = torch.randn(n, k, generator=generator).T if transposed else torch.randn(k, n, generator=generator)
    bias = torch.randn(n, generator=generator) if biased else None
    together = prompt_products(x, weight, bias)
    for place in range(prompts):
        assert torch.equal(prompt_products(x[place : place + 1].clone(), weight, bias)[0], together[place])
    exact = x.double() @ weight.double() + (0.0 if bias is None else bias.double())
    # A sum of k products in float32, in any order: k·u of the sum of absolute values, u = 2⁻²⁴; and the bias.
    bound = (k + 1) * 2.0**-24 * (x.abs().double() @ weight.abs().double() + (0.0 if bias is None else bias.abs()))
    assert bool(((together.double() - exact).abs() <= bound).all())

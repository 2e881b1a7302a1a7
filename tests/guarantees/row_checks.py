"""What must hold of rows bit by bit, on whatever machine this runs; called by tests here and on broken code.

The records here are not those that `row_check` makes up, so that what it decides is tried on others.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.learners import row_check
from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.learners.base import ClientData, Objective
from fl_dualpriv.learners.classification import Classification
from fl_dualpriv.learners.row_check import COMPANY, RowPath
from fl_dualpriv.models.text.text_stack import Linear, Norm, TextBlock, TextStack
from fl_dualpriv.privacy.clipping import GRID_STEPS
from fl_dualpriv.privacy.step import client_rows, clipped_sums
from fl_dualpriv.towers.shared_prefix import SharedPrefixTower
from tests.guarantees.objective_checks import clipped_feature_sum

N_CTX = 4


@functools.cache
def tower(width: int, n_cls: int) -> SharedPrefixTower:
    """A text tower of random weights: two blocks, names of two to five tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * width**-0.5

    def linear(out: int, into: int) -> Linear:
        return Linear(weight=random(out, into), bias=random(out))

    norm = Norm(weight=torch.ones(width), bias=torch.zeros(width), eps=1e-5)
    blocks = tuple(
        TextBlock(
            ln_1=norm,
            qkv=linear(3 * width, width),
            out=linear(width, width),
            ln_2=norm,
            up=linear(4 * width, width),
            down=linear(width, 4 * width),
        )
        for _ in range(2)
    )
    stack = TextStack(
        blocks=blocks,
        heads=2,
        activation="quick_gelu",
        positions=random(20, width),
        final=norm,
        projection=linear(width, width),
    )
    lengths = 2 + torch.arange(n_cls) % 4
    return SharedPrefixTower(stack, random(1, width), random(n_cls, 5, width), lengths)


def objective(width: int, n_cls: int, *, top_m: int = 0, feature: bool = False) -> Classification:
    return Classification(
        tower=tower(width, n_cls),
        logit_scale=20.0,
        top_m=top_m,
        noise_space="feature" if feature else "prompt",
        workspace_bytes=2**26,
    )


def records(width: int, n_cls: int, seed: int, count: int) -> ClientData:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    return ClientData(features=features, labels=torch.randint(0, n_cls, (count,), generator=generator))


def prompts(width: int) -> Tensor:
    return torch.randn(COMPANY, N_CTX, width, generator=torch.Generator().manual_seed(7)) * width**-0.5


def chosen(width: int, n_cls: int, **kind: int) -> tuple[Objective[ClientData], RowPath]:
    """What a run of this kind would use here."""
    return row_check.checked_objective(
        objective(width, n_cls, **kind), lambda: records(width, n_cls, 0, 25), prompts(width), private=True
    )


def cases() -> Iterator[tuple[int, int, dict[str, int]]]:
    """Widths, numbers of classes, kinds of rows: shapes for which kernels differ."""
    for width, n_cls in ((32, 2), (32, 5), (64, 10), (128, 3)):
        for kind in ({}, {"top_m": 2}, {"feature": True}):
            yield width, n_cls, kind


def rows_of(form: Objective[ClientData], data: ClientData, prompt: Tensor, picked: np.ndarray) -> Tensor:
    return torch.cat(list(client_rows(form.bind([data]).gradients(prompt[None], [picked]), 0)))[: len(picked)]


def a_record_that_goes_leaves_the_other_rows_bit_by_bit() -> None:
    """With the form that a run uses, at several places of a block; so clipped integer sums move exactly, too."""
    for width, n_cls, kind in cases():
        form, path = chosen(width, n_cls, **kind)
        data, prompt, everybody = records(width, n_cls, 3, 20), prompts(width)[0], np.arange(20)
        whole = rows_of(form, data, prompt, everybody)
        clip = 0.5 * float(whole.flatten(1).norm(dim=1).median())
        total = clipped_sums(form.bind([data]).gradients(prompt[None], [everybody]), clip, "integer")[0].value
        for gone in (0, 1, 7, 8, 12, 19):
            kept = np.delete(everybody, gone)
            where = f"width {width}, {n_cls} classes, {kind}, {path}"
            assert torch.equal(rows_of(form, data, prompt, kept), whole[kept]), f"a record moves others' rows: {where}"
            rest, own = (
                clipped_sums(form.bind([data]).gradients(prompt[None], [picked]), clip, "integer")[0].value
                for picked in (kept, np.array([gone]))
            )
            assert torch.equal(total - rest, own), f"a record moves the sum by more than its own row: {where}"


def feature_rows_do_not_depend_on_their_number() -> None:
    """One record moves a sum in noise space ``feature`` by exactly its own integer row, however few there are."""
    for width, n_cls in ((512, 10), (64, 3), (33, 100)):
        generator = torch.Generator().manual_seed(1)
        classes = torch.nn.functional.normalize(torch.randn(n_cls, width, generator=generator), dim=1)
        data = records(width, n_cls, 4, 300)
        whole = feature_factors(classes, data, list(range(300)))
        alone = {i: feature_sum(classes, data, [i]) for i in (0, 1, 2, 3, 128, 255, 256, 299)}
        assert all(int((row.to(torch.int64) ** 2).sum()) <= GRID_STEPS**2 for row in alone.values())
        for count in (1, 2, 3, 4, 5, 8, 255, 256, 257, 300):
            everybody = list(range(count))
            total = feature_sum(classes, data, everybody)
            assert torch.equal(feature_factors(classes, data, everybody), whole[:count]), "rows follow their number"
            for gone in [i for i in alone if i < count]:
                rest = [i for i in everybody if i != gone]
                assert torch.equal(feature_factors(classes, data, rest), whole[rest]), "rows follow their place"
                assert torch.equal(total - feature_sum(classes, data, rest), alone[gone]), "a record moves others' rows"


def feature_sum(classes: Tensor, data: ClientData, picked: list[int]) -> Tensor:
    """In grid units; clip norm 1 clips most of these."""
    index = torch.tensor(picked, dtype=torch.long)
    x, y = data.features[index], data.labels[index]
    return clipped_feature_sum(classes, x, y, 100.0, 1.0, "integer").value


def feature_factors(classes: Tensor, data: ClientData, picked: list[int]) -> Tensor:
    index = torch.tensor(picked, dtype=torch.long)
    blocks = per_example.feature_blocks(classes, data.features[index], data.labels[index], 100.0)
    return torch.cat([classes.new_zeros(0, len(classes)), *(left for left, _ in blocks)])[: len(picked)]


def clients_get_what_each_gets_alone() -> None:
    """Bit by bit, with batches of several sizes, whoever steps along: sums, clipped sums, class features."""
    for width, n_cls, kind in cases():
        form, path = chosen(width, n_cls, **kind)
        if path in ("clients apart", "records and clients apart"):
            continue  # they never step together
        sizes = (17, 3, 20)
        data = [records(width, n_cls, 5 + place, size) for place, size in enumerate(sizes)]
        picked = [np.arange(size) for size in sizes]
        together = form.bind(data).gradients(prompts(width), picked)
        clipped = clipped_sums(together, 0.1, "integer")
        for place in range(COMPANY):
            alone = form.bind(data[place : place + 1]).gradients(
                prompts(width)[place : place + 1], picked[place : place + 1]
            )
            where = f"width {width}, {n_cls} classes, {kind}, {path}"
            assert torch.equal(together.sums()[place], alone.sums()[0]), f"clients mix in sums: {where}"
            assert torch.equal(clipped[place].value, clipped_sums(alone, 0.1, "integer")[0].value), f"they mix: {where}"

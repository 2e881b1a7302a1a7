"""Blocks are orthogonal, complete and as large as they say."""

import pytest
import torch
from torch import Tensor

from fl_dualpriv.client.blocks import Blocks, ComponentBlocks, CoordinateBlocks
from fl_dualpriv.methods.lowrank import subspace_bases, tangent_projection

CLIENTS, ROWS, COLS, RANK = 3, 5, 8, 2
GENERATOR = torch.Generator().manual_seed(0)
G = torch.randn(CLIENTS, ROWS, COLS, generator=GENERATOR)
U, V = subspace_bases(
    torch.randn(CLIENTS, ROWS, COLS, generator=GENERATOR), torch.randn(CLIENTS, RANK, COLS, generator=GENERATOR)
)
CUTS: dict[str, Blocks] = {
    "token": CoordinateBlocks(kind="token", rows=ROWS, cols=COLS),
    "coordinate": CoordinateBlocks(kind="coordinate", rows=ROWS, cols=COLS),
    "matrix": CoordinateBlocks(kind="matrix", rows=ROWS, cols=COLS, segments=(1, 4, 3)),
    "one matrix": CoordinateBlocks(kind="matrix", rows=ROWS, cols=COLS),
    "component": ComponentBlocks(U, V),
}


def alone(blocks: Blocks, number: int) -> Tensor:
    """One block of G, everything else dropped."""
    weights = torch.zeros(CLIENTS, len(blocks.sizes))
    weights[:, number] = 1
    return blocks.weighted(G, weights)


@pytest.mark.parametrize("name", CUTS)
def test_blocks_add_up_to_the_gradient(name: str):
    blocks = CUTS[name]
    total = torch.stack([alone(blocks, b) for b in range(len(blocks.sizes))]).sum(dim=0)
    torch.testing.assert_close(total, G, atol=1e-5, rtol=1e-5)
    assert float(blocks.sizes.sum()) == ROWS * COLS


@pytest.mark.parametrize("name", CUTS)
def test_energies_are_squared_norms_of_orthogonal_parts(name: str):
    blocks = CUTS[name]
    parts = torch.stack([alone(blocks, b).flatten(1) for b in range(len(blocks.sizes))], dim=1)  # client, block, …
    products = parts @ parts.mT
    expected = torch.diag_embed(blocks.energies(G).float())
    torch.testing.assert_close(products, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CUTS)
def test_a_block_holds_noise_in_proportion_to_its_size(name: str):
    """Which makes scores of unequal blocks comparable."""
    blocks = CUTS[name]
    noise = torch.randn(CLIENTS, 2000, ROWS, COLS, generator=torch.Generator().manual_seed(1))
    energies = torch.stack([blocks.energies(noise[:, i]) for i in range(2000)]).mean(dim=(0, 1))
    # mean of 6000 chi-square variables of p dimensions: relative standard error sqrt(2 / (6000 p)); 5 of them
    assert bool(((energies / blocks.sizes - 1).abs() < 5 * (2 / (6000 * blocks.sizes)).sqrt()).all())


@pytest.mark.parametrize("name", ["token", "coordinate", "matrix"])
def test_a_weight_of_one_changes_no_bit(name: str):
    blocks = CUTS[name]
    assert torch.equal(blocks.weighted(G, torch.ones(CLIENTS, len(blocks.sizes))), G)


def test_rows_entries_and_columns_are_what_is_cut():
    assert torch.equal(alone(CUTS["token"], 2)[:, 2], G[:, 2])
    assert torch.equal(alone(CUTS["coordinate"], 11)[:, 1, 3], G[:, 1, 3])
    assert torch.equal(alone(CUTS["matrix"], 1)[:, :, 1:5], G[:, :, 1:5])


def test_components_add_up_to_the_tangent_projection():
    components = sum(alone(CUTS["component"], j) for j in range(RANK))
    torch.testing.assert_close(components, tangent_projection(G, U, V), atol=1e-5, rtol=1e-5)


def test_a_component_is_tangent_and_the_rest_is_not_seen_by_the_personal_move():
    for j in range(RANK):
        part = alone(CUTS["component"], j)
        torch.testing.assert_close(tangent_projection(part, U, V), part, atol=1e-5, rtol=1e-5)
    assert float(tangent_projection(alone(CUTS["component"], RANK), U, V).abs().max()) < 1e-5


def test_components_that_fill_everything_have_no_rest():
    u, v = torch.eye(2).expand(1, 2, 2), torch.eye(2, 4).expand(1, 2, 4)
    blocks = ComponentBlocks(u, v)
    gradient = torch.arange(8.0).reshape(1, 2, 4)
    assert blocks.sizes.tolist() == [4, 4]
    assert blocks.energies(gradient).shape == (1, 2)
    torch.testing.assert_close(blocks.weighted(gradient, torch.ones(1, 2)), gradient)


@pytest.mark.parametrize("segments", [(3, 4), (8, 0), (9, -1), (4, 4, 4)])
def test_segments_must_cover_the_columns(segments: tuple[int, ...]):
    with pytest.raises(ValueError, match="add up to 8"):
        CoordinateBlocks(kind="matrix", rows=ROWS, cols=COLS, segments=segments)

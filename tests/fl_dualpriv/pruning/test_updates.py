"""Update pruning looks at the noised gradient and nothing else."""

import inspect

import pytest
import torch

from fl_dualpriv.pruning.updates import prune_update

G = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.1, 0.1]])  # norms 3, 1, 2.83, 0.14


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, [0]), (0.5, [0, 2]), (0.51, [0, 1, 2]), (1.0, [0, 1, 2, 3])])
def test_keeps_the_largest_rows(ratio: float, kept: list[int]) -> None:
    pruned = prune_update(G, ratio)
    assert torch.nonzero(pruned.any(dim=1)).flatten().tolist() == kept
    assert torch.equal(pruned[kept], G[kept])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_other_ratios(ratio: float) -> None:
    with pytest.raises(ValueError, match="keep_ratio"):
        prune_update(G, ratio)


def test_is_a_function_of_the_noised_gradient_alone() -> None:
    # Post-processing by construction: no other data can reach it.
    assert list(inspect.signature(prune_update).parameters) == ["noised_gradient", "keep_ratio"]
    assert torch.equal(prune_update(G, 0.5), prune_update(G.clone(), 0.5))

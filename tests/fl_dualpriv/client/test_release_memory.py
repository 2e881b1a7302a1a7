"""Moving averages whose bias and noise are known."""

import pytest
import torch

from fl_dualpriv.client.release_memory import empty_release_memory, noise_left, stack_release_memories, unbiased


def test_unbiased_takes_the_start_at_zero_out():
    # constant 3, decay 0.9: the average after n values is 3 (1 - 0.9^n)
    counts = torch.tensor([1, 2, 50])
    average = torch.stack([torch.tensor(3 * (1 - 0.9**n)) for n in counts.tolist()])
    torch.testing.assert_close(unbiased(average, 0.9, counts), torch.full((3,), 3.0), atol=1e-6, rtol=1e-6)


def test_nothing_seen_stays_zero():
    assert float(unbiased(torch.zeros(()), 0.9, torch.tensor(0))) == 0


@pytest.mark.parametrize("count", [1, 2, 7, 400])
def test_noise_left_is_the_variance_of_the_average(count: int):
    # The weights of an unbiased average are (1 - b) b^i / (1 - b^n); independent noise keeps the sum of their squares.
    weights = 0.1 * 0.9 ** torch.arange(count, dtype=torch.float64) / (1 - 0.9**count)
    assert float(noise_left(0.9, torch.tensor(count))) == pytest.approx(float(weights.square().sum()), rel=1e-12)


def test_noise_left_of_one_value_is_all_and_of_none_infinite():
    one, none = noise_left(0.9, torch.tensor([1, 0])).tolist()
    assert one == pytest.approx(1, rel=1e-12)
    assert none == float("inf")


def test_histories_stack_by_name():
    shapes = {"a": ((2, 3), torch.float32), "n": ((2,), torch.int64)}
    stacked = stack_release_memories([empty_release_memory(shapes), empty_release_memory(shapes)])
    assert {name: (tuple(t.shape), t.dtype) for name, t in stacked.items()} == {
        "a": ((2, 2, 3), torch.float32),
        "n": ((2, 2), torch.int64),
    }

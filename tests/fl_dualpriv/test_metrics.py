"""Scores by hand: three classes on the axes of the plane and its diagonal, and two domains of two classes."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl_dualpriv.metrics import (
    Accuracy,
    ScoreTable,
    count_logits,
    counts_at_home,
    harmonic_mean,
    mean,
    spread,
    summarise,
)

CLASSES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
# nearest classes: 0, 1, 2, 0, 1
IMAGES = torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, 0.2], [0.9, 0.3], [0.2, 0.8]])
LABELS = torch.tensor([0, 1, 1, 2, 1])


def table(correct: list[list[int]], total: list[int], held: list[list[int]]) -> ScoreTable:
    return ScoreTable(correct=np.array(correct), total=np.array(total), held=np.array(held, dtype=bool))


def score(classes: Tensor, images: Tensor, labels: Tensor, held: list[int]) -> ScoreTable:
    counts = count_logits(images @ classes.T, labels, labels, len(classes))
    row = torch.zeros(1, len(classes), dtype=torch.bool)
    row[0, held] = True
    return ScoreTable.of(*counts, row)


@pytest.mark.parametrize(
    ("held", "local", "neighbour"),
    [
        # labels 0 1 1 2 1, predictions 0 1 2 0 1: right are one of one of class 0, two of three of 1, none of one of 2
        ([1], 2 / 3, 1 / 2),
        ([0, 2], 1 / 2, 2 / 3),
        ([0, 1], (1 + 2 / 3) / 2, 0.0),  # three of four images, but each class weighs the same
        ([0, 1, 2], (1 + 2 / 3 + 0) / 3, None),
        ([], None, (1 + 2 / 3 + 0) / 3),
    ],
    ids=["one class", "even", "uneven", "all classes", "none"],
)
def test_each_group_weighs_the_same(held: list[int], local: float | None, neighbour: float | None):
    found = score(CLASSES, IMAGES, LABELS, held)
    assert found.local() == [pytest.approx(local) if local is not None else None]
    assert found.neighbour() == [pytest.approx(neighbour) if neighbour is not None else None]


def test_local_images_compete_with_all_class_names():
    # Among the held class alone, the image of class 1 would be right by default.
    assert score(CLASSES, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), [1]).local() == [0.0]


def test_no_images():
    nothing = score(CLASSES, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), [1])
    assert (nothing.local(), nothing.neighbour()) == ([None], [None])


def test_an_unreadable_held_out_image_is_never_right():
    assert score(CLASSES, torch.full((1, 2), math.nan), torch.tensor([0]), [0]).local() == [0.0]


def test_class_features_that_are_not_finite_are_never_right():
    assert score(torch.full((3, 2), math.nan), IMAGES, LABELS, [0]).local() == [0.0]


def test_a_domain_is_not_another_one():
    """Groups (domain 0, class 0), (0, 1), (1, 0), (1, 1): each client's records are the other one's neighbours."""
    found = table([[3, 1, 0, 2]] * 2, [4, 4, 4, 4], [[1, 1, 0, 0], [0, 0, 1, 1]])
    assert found.local() == [4 / 8, 2 / 8]
    assert found.neighbour() == [2 / 8, 4 / 8]


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_accuracies_are_the_means_over_groups_and_depend_on_no_other_client(seed: int, even: bool):
    rng = np.random.default_rng(seed)
    total = np.full(7, 5) if even else rng.integers(0, 6, 7)
    correct, held = rng.integers(0, total + 1, (9, 7)), rng.random((9, 7)) < 0.5
    together = ScoreTable(correct=correct, total=total, held=held)
    for client, (local, neighbour) in enumerate(zip(together.local(), together.neighbour(), strict=True)):
        for value, groups in ((local, held[client]), (neighbour, ~held[client])):
            chosen = np.flatnonzero(groups & (total > 0))
            by_hand = np.mean(correct[client, chosen] / total[chosen]) if len(chosen) else None
            assert value == (None if by_hand is None else pytest.approx(by_hand))
        one = slice(client, client + 1)
        apart = ScoreTable(correct=correct[one], total=total, held=held[one])
        assert (apart.local(), apart.neighbour()) == ([local], [neighbour])  # bit by bit


@pytest.mark.parametrize("broken", [None, "image", "class"])
def test_one_count_for_many_clients_is_each_clients_own_score(broken: str | None):
    generator = torch.Generator().manual_seed(0)
    classes, images = (torch.randn(n, 8, generator=generator) for n in (7, 200))
    labels = torch.randint(0, 6, (200,), generator=generator)  # no client has an image of the last class
    if broken == "image":
        images[::3] = math.nan
    elif broken == "class":
        classes[2] = math.nan
    held = torch.rand(50, 7, generator=generator) < 0.3
    held[0], held[1] = False, True
    together = ScoreTable.of(*count_logits(images @ classes.T, labels, labels, 7), held)
    apart = [score(classes, images, labels, row.nonzero().flatten().tolist()) for row in held]
    assert together.local() == [one.local()[0] for one in apart]
    assert together.neighbour() == [one.neighbour()[0] for one in apart]
    # Without one class name's feature nothing can be classified.
    assert any(together.local()) is (broken != "class")


def test_clients_weigh_the_same_at_any_size():
    found = summarise([((0, 1), table([[1, 0], [1, 100]], [2, 200], [[1, 0], [0, 1]]))], 2)
    # (1/2 + 100/200)/2 and (0/200 + 1/2)/2; pooled counts would give 101/202 and 1/202
    assert found is not None
    assert found.accuracy == Accuracy(local=0.5, neighbour=0.25)
    assert found.clients.local == (0.5, 0.5)


def test_answers_of_many_nodes_are_ordered_by_client_and_new_ones_are_apart():
    first = ((3, 0), table([[1], [2]], [4], [[1], [1]]))
    second = ((1, 2), table([[3, 0], [4, 0]], [4, 4], [[1, 0], [1, 0]]))
    found = summarise([second, first], 3, 2)
    assert found is not None
    assert found.clients.local == (0.5, 0.75, 1.0)
    assert found.clients.new_client == (0.25, None)  # client 4 did not answer
    assert found.accuracy == Accuracy(local=0.75, neighbour=0.0, new_client=0.25)
    assert summarise([], 3) is None


def test_groups_are_means_over_the_clients_that_hold_them():
    one = ((0, 1), table([[1, 0], [2, 2]], [2, 2], [[1, 0], [1, 1]]))
    found = summarise([one], 2, by_group=True)
    assert found is not None
    assert found.accuracy.by_group == (0.75, 1.0)


def test_clients_of_other_groups_are_counted_without_them():
    """A node whose questions have other types, or that sends what it likes, ends no other client's scores."""
    one, other = ((0,), table([[1, 0]], [2, 0], [[1, 1]])), ((1,), table([[1]], [2], [[1]]))
    alike, mixed = (summarise(answers, 2, by_group=True) for answers in ([one], [one, other]))
    assert alike is not None
    assert mixed is not None
    assert alike.accuracy == Accuracy(local=0.5, neighbour=None, by_group=(0.5, None))
    assert mixed.accuracy == Accuracy(local=0.5, neighbour=None)


def test_a_client_without_such_images_is_left_out():
    assert mean([0.25, None, 0.75]) == 0.5
    assert mean([None]) is None
    assert spread([None]) is None
    assert spread([0.0, None, 1.0]) == {
        **{"minimum": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "maximum": 1.0}
    }


def test_within_its_list_a_client_answers_the_largest_logit_of_its_classes():
    # Labels 0, 1, 2, 2. Unrestricted answers: 0 (right), 2 (wrong), 2 (right), 1 (wrong).
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2, 2])
    held = torch.tensor([[True, True, False], [False, False, True], [True, True, True]])
    found = counts_at_home(logits, labels, labels, held, "class-list")
    # Client 0, list {0, 1}: the image of class 1 has 1.0 against 0.0 and becomes right. Abroad: of class 2 one of two.
    # Client 1, list {2}: both images of class 2 are right, because no other answer is left. Client 2: as unrestricted.
    assert found.tolist() == [[1, 1, 1], [1, 0, 2], [1, 0, 1]]
    assert counts_at_home(logits, labels, labels, held, "plain").tolist() == [[1, 0, 1]] * 3


def test_within_a_domain_the_list_is_of_classes_and_says_nothing_abroad():
    # Two domains of two classes; both clients hold class 1 only, each in its own domain. Every answer is class 0.
    logits, labels = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 0, 1])
    groups = torch.tensor([0, 1, 2, 3])
    held = torch.tensor([[False, True, False, False], [False, False, False, True]])
    found = counts_at_home(logits, labels, groups, held, "class-list")
    assert found.tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]


def test_a_log_prior_is_added_at_home_only():
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    held = torch.tensor([[False, True]])
    weak, strong = (
        counts_at_home(logits, labels, labels, held, "class-prior", torch.tensor([[0.0, c]])) for c in (0.5, 2)
    )
    assert weak.tolist() == [[1, 0]]
    assert strong.tolist() == [[1, 1]]  # the image of class 0 is abroad and stays right


def test_an_image_with_a_logit_that_is_not_finite_is_wrong_within_a_list_too():
    logits = torch.tensor([[1.0, float("nan")], [1.0, float("-inf")], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    found = counts_at_home(logits, labels, labels, torch.tensor([[True, False]]), "class-list")
    assert found.tolist() == [[1, 0]]


@given(st.integers(0, 2**32 - 1))
def test_a_list_loses_no_right_answer_at_home(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    groups = labels + 3 * torch.randint(2, (40,), generator=generator)
    held = torch.rand(5, 6, generator=generator) < 0.5
    plain, free = (counts_at_home(logits, labels, groups, held, use) for use in ("plain", "class-list"))
    assert bool((free >= plain).all())
    assert torch.equal(free[~held], plain[~held])


def test_a_prior_shifts_the_answers_at_home_only():
    # Labels 0, 1, 2, 2. Answers without a prior: 0 (right), 2 (wrong), 2 (right), 1 (wrong).
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2, 2])
    held = torch.tensor([[True, True, False], [False, False, True], [True, True, False], [True, True, True]])
    log_prior = torch.tensor([[0.0, 0.0, -1.5], [-0.5, -1.5, 0.0], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0]])
    found = counts_at_home(logits, labels, labels, held, "class-prior", log_prior)
    # Client 0: class 2 falls from 2.0 to 0.5, so the image of class 1 becomes right.
    # Client 1: class 1 falls from 2.0 to 0.5, so both images of class 2 are right.
    # Client 2: class 2 falls to 1.5 only, above 1.0. Client 3: nothing moves.
    assert found.tolist() == [[1, 1, 1], [1, 0, 2], [1, 0, 1], [1, 0, 1]]
    _, total = count_logits(logits, labels, labels, 3)
    of_prior, plain = (
        ScoreTable.of(counts, total, held) for counts in (found, counts_at_home(logits, labels, labels, held, "plain"))
    )
    assert of_prior.neighbour() == plain.neighbour()
    assert of_prior.local() == [1.0, 1.0, 1 / 2, (1 + 0 + 1 / 2) / 3]


def test_within_a_domain_a_prior_is_of_classes_and_says_nothing_abroad():
    # Two domains of two classes. One list and two priors; another domain and the first prior.
    logits, labels = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 0, 1])
    groups = torch.tensor([0, 1, 2, 3])
    held = torch.tensor([[True, True, False, False], [True, True, False, False], [False, False, True, True]])
    log_prior = torch.tensor([[-2.0, 0.0], [-0.5, 0.0], [-2.0, 0.0]])
    found = counts_at_home(logits, labels, groups, held, "class-prior", log_prior)
    assert found.tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert found.dtype == torch.int64


def test_an_image_with_a_logit_that_is_not_finite_is_wrong_with_a_prior_too():
    logits = torch.tensor([[1.0, float("nan")], [1.0, float("-inf")], [1.0, 0.0]])
    labels, held, log_prior = torch.tensor([0, 0, 0]), torch.tensor([[True, False]]), torch.tensor([[0.0, -1.0]])
    found = counts_at_home(logits, labels, labels, held, "class-prior", log_prior)
    assert found.tolist() == [[1, 0]]


@given(st.integers(0, 2**32 - 1))
def test_priors_from_none_to_sure_lead_from_plain_scores_to_scores_within_the_list(seed: int):
    """Of the un-tuned model and of a prompt: a uniform prior changes nothing, and a very strong one restricts."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    groups = labels + 3 * torch.randint(2, (40,), generator=generator)
    held = torch.rand(5, 6, generator=generator) < 0.5
    plain, within = (counts_at_home(logits, labels, groups, held, use) for use in ("plain", "class-list"))
    of_prior = functools.partial(counts_at_home, logits, labels, groups, held, "class-prior")
    assert torch.equal(of_prior(torch.zeros(5, 3)), plain)
    lists = held.unflatten(1, (2, 3)).any(dim=1)
    assert torch.equal(of_prior(torch.where(lists, 0.0, -1e3)), within)
    # A prior that is even on the list, of any strength, gains no more than the list.
    outside = 3 * torch.randn(5, 1, generator=generator)
    assert bool((of_prior(torch.where(lists, 0.0, outside)) <= within).all())


@pytest.mark.parametrize(
    ("local", "neighbour", "expected"),
    [(0.572, 0.306, 0.3987), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (0.4, 0.0, 0.0), (None, 0.5, None), (0.5, None, None)],
)
def test_harmonic_mean(local: float | None, neighbour: float | None, expected: float | None):
    assert harmonic_mean(local, neighbour) == (None if expected is None else pytest.approx(expected, abs=1e-4))

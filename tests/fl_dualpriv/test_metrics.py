"""Scores by hand: three classes on the axes of the plane and its diagonal."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_dualpriv.metrics import (
    Accuracy,
    Score,
    count_by_class,
    count_logits,
    harmonic_mean,
    mean_accuracy,
    score,
    scores_with_priors,
    scores_within_lists,
    split_counts,
)

CLASSES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
# nearest classes: 0, 1, 2, 0, 1
IMAGES = torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, 0.2], [0.9, 0.3], [0.2, 0.8]])
LABELS = torch.tensor([0, 1, 1, 2, 1])


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        # labels 0 1 1 2 1, predictions 0 1 2 0 1: right are images 0, 1, 4
        ([1], Score(local_correct=2, local_total=3, neighbour_correct=1, neighbour_total=2)),
        ([0, 2], Score(local_correct=1, local_total=2, neighbour_correct=2, neighbour_total=3)),
        ([0, 1, 2], Score(local_correct=3, local_total=5, neighbour_correct=0, neighbour_total=0)),
        ([], Score(local_correct=0, local_total=0, neighbour_correct=3, neighbour_total=5)),
    ],
    ids=["one class", "two classes", "all classes", "none"],
)
def test_counts(held: list[int], expected: Score):
    assert score(CLASSES, IMAGES, LABELS, torch.tensor(held, dtype=torch.long)) == expected


def test_local_images_compete_with_all_class_names():
    # Among the held class alone, the image of class 1 would be right by default.
    found = score(CLASSES, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([1]))
    assert (found.local_correct, found.local_total) == (0, 1)


def test_no_images():
    nothing = score(CLASSES, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), torch.tensor([1]))
    assert nothing == Score(local_correct=0, local_total=0, neighbour_correct=0, neighbour_total=0)


def test_an_unreadable_held_out_image_is_never_right():
    found = score(CLASSES, torch.full((1, 2), math.nan), torch.tensor([0]), torch.tensor([0]))
    assert found.local_correct == 0


def test_class_features_that_are_not_finite_are_never_right():
    found = score(torch.full((3, 2), math.nan), IMAGES, LABELS, torch.tensor([0]))
    assert found.local_correct == 0


@pytest.mark.parametrize("broken", [None, "image", "class"])
def test_one_count_for_many_clients_is_each_clients_own_score(broken: str | None):
    generator = torch.Generator().manual_seed(0)
    classes, images = (torch.randn(n, 8, generator=generator) for n in (7, 200))
    labels = torch.randint(0, 6, (200,), generator=generator)  # nobody has an image of the last class
    if broken == "image":
        images[::3] = math.nan
    elif broken == "class":
        classes[2] = math.nan
    held = torch.rand(50, 7, generator=generator) < 0.3
    held[0], held[1] = False, True
    together = split_counts(*count_by_class(classes, images, labels, 7), held)
    assert together == [score(classes, images, labels, row.nonzero().flatten()) for row in held]
    # Without one class name's feature nothing can be classified.
    assert any(s.local_correct for s in together) is (broken != "class")


def test_many_clients_without_any_image():
    nothing = split_counts(
        *count_by_class(CLASSES, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 3), torch.ones(2, 3).bool()
    )
    assert nothing == [Score(local_correct=0, local_total=0, neighbour_correct=0, neighbour_total=0)] * 2


def test_clients_weigh_the_same_whatever_their_size():
    scores = [
        Score(local_correct=1, local_total=2, neighbour_correct=0, neighbour_total=8),
        Score(local_correct=100, local_total=100, neighbour_correct=1, neighbour_total=2),
    ]
    # (1/2 + 1)/2 and (0 + 1/2)/2; pooled counts would give 101/102 and 1/10
    assert mean_accuracy(scores) == Accuracy(local=0.75, neighbour=0.25)


def test_clients_of_other_groups_are_counted_without_them():
    """A node whose questions have other types, or that sends what it likes, ends nobody's scores."""
    one = Score(local_correct=1, local_total=2, neighbour_correct=0, neighbour_total=0, by_group=((1, 2), (0, 0)))
    other = replace(one, by_group=((1, 2),))
    assert mean_accuracy([one, one]) == Accuracy(local=0.5, neighbour=None, by_group=(0.5, None))
    assert mean_accuracy([one, other]) == Accuracy(local=0.5, neighbour=None)
    assert mean_accuracy([one, replace(one, by_group=())]) == Accuracy(local=0.5, neighbour=None)


def test_a_client_without_such_images_is_left_out():
    scores = [
        Score(local_correct=1, local_total=4, neighbour_correct=0, neighbour_total=0),
        Score(local_correct=3, local_total=4, neighbour_correct=1, neighbour_total=4),
    ]
    assert mean_accuracy(scores) == Accuracy(local=0.5, neighbour=0.25)
    assert mean_accuracy(scores[:1]) == Accuracy(local=0.25, neighbour=None)
    assert mean_accuracy([]) == Accuracy(local=None, neighbour=None)


def test_within_its_list_a_client_answers_the_largest_logit_of_its_classes():
    # Labels 0, 1, 2, 2. Unrestricted answers: 0 (right), 2 (wrong), 2 (right), 1 (wrong).
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2, 2])
    held = torch.tensor([[True, True, False], [False, False, True], [True, True, True]])
    found = scores_within_lists(logits, labels, held)
    # Client 0, list {0, 1}: the image of class 1 has 1.0 against 0.0 and becomes right.
    assert (found[0].local_correct, found[0].local_total) == (2, 2)
    # Client 1, list {2}: both images of class 2 are right, because no other answer is left.
    assert (found[1].local_correct, found[1].local_total) == (2, 2)
    # Client 2 holds all classes: as unrestricted.
    assert (found[2].local_correct, found[2].local_total) == (2, 4)
    # Other clients' images are answered among all classes: of class 2 one of two, of classes 0 and 1 one of two.
    assert [(s.neighbour_correct, s.neighbour_total) for s in found] == [(1, 2), (1, 2), (0, 0)]


def test_an_image_with_a_logit_that_is_not_finite_is_wrong_within_a_list_too():
    logits = torch.tensor([[1.0, float("nan")], [1.0, float("-inf")], [1.0, 0.0]])
    (found,) = scores_within_lists(logits, torch.tensor([0, 0, 0]), torch.tensor([[True, False]]))
    assert (found.local_correct, found.local_total) == (1, 3)


@given(st.integers(0, 2**32 - 1))
def test_a_list_loses_no_right_answer_at_home(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 6, generator=generator), torch.randint(6, (40,), generator=generator)
    held = torch.rand(5, 6, generator=generator) < 0.5
    plain = split_counts(*count_logits(logits, labels, 6), held)
    for free, before in zip(scores_within_lists(logits, labels, held), plain, strict=True):
        assert free.local_correct >= before.local_correct
        assert (free.local_total, free.neighbour_correct) == (before.local_total, before.neighbour_correct)


def test_a_prior_shifts_the_answers_at_home_only():
    # Labels 0, 1, 2, 2. Answers without a prior: 0 (right), 2 (wrong), 2 (right), 1 (wrong).
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2, 2])
    held = torch.tensor([[True, True, False], [False, False, True], [True, True, False], [True, True, True]])
    log_prior = torch.tensor([[0.0, 0.0, -1.5], [-0.5, -1.5, 0.0], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0]])
    found = scores_with_priors(logits, labels, held, log_prior)
    # Client 0: class 2 falls from 2.0 to 0.5, so the image of class 1 becomes right.
    # Client 1: class 1 falls from 2.0 to 0.5, so both images of class 2 are right.
    # Client 2: class 2 falls to 1.5 only, above 1.0. Client 3: nothing moves.
    assert [(s.local_correct, s.local_total) for s in found] == [(2, 2), (2, 2), (1, 2), (2, 4)]
    plain = split_counts(*count_logits(logits, labels, 3), held)
    assert [(s.neighbour_correct, s.neighbour_total) for s in found] == [
        (s.neighbour_correct, s.neighbour_total) for s in plain
    ]


def test_an_image_with_a_logit_that_is_not_finite_is_wrong_with_a_prior_too():
    logits = torch.tensor([[1.0, float("nan")], [1.0, float("-inf")], [1.0, 0.0]])
    (found,) = scores_with_priors(
        logits, torch.tensor([0, 0, 0]), torch.tensor([[True, False]]), torch.tensor([[0.0, -1.0]])
    )
    assert (found.local_correct, found.local_total) == (1, 3)


@given(st.integers(0, 2**32 - 1))
def test_priors_from_none_to_sure_lead_from_plain_scores_to_scores_within_the_list(seed: int):
    """Of the un-tuned model and of a prompt: a uniform prior changes nothing, and a very strong one restricts."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 6, generator=generator), torch.randint(6, (40,), generator=generator)
    held = torch.rand(5, 6, generator=generator) < 0.5
    plain = split_counts(*count_logits(logits, labels, 6), held)
    assert scores_with_priors(logits, labels, held, torch.zeros(5, 6)) == plain
    sure = torch.where(held, 0.0, -1e3)
    assert scores_with_priors(logits, labels, held, sure) == scores_within_lists(logits, labels, held)


@pytest.mark.parametrize(
    ("local", "neighbour", "expected"),
    [(0.572, 0.306, 0.3987), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (0.4, 0.0, 0.0), (None, 0.5, None), (0.5, None, None)],
)
def test_harmonic_mean(local: float | None, neighbour: float | None, expected: float | None):
    assert harmonic_mean(local, neighbour) == (None if expected is None else pytest.approx(expected, abs=1e-4))

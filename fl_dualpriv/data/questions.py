"""Questions about images, in the form that the rest of the library uses."""

from dataclasses import dataclass

import numpy as np

from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.errors import ConfigError

DEFAULT_TEMPLATE = "Answer the question with a single word or phrase."
"""Initial text of a prompt if the data set names none: LLaVA-1.5's own request for short answers."""


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions with their answers. A record is one question, and several records may ask about one image.

    Attributes:
        images: The images, decoded one at a time; their labels are not read.
        image_of: Index of each record's image, (record,) int64.
        questions: Question of each record; an empty text marks a record that cannot be used.
        answers: Answer of each record.
        labels: Question type of each record, (record,) int64, indices into ``class_names``; public metadata.
        class_names: Names of the question types.
        faults: Reason why the words of each record cannot be used, or an empty text. Only the owner of the data may
            read the reasons. () means that there is no fault.
        domains: Domain of each record, (record,) int64, indices into ``domain_names``; None without domains. Public
            metadata.
        domain_names: Names of the domains, the same for all splits; empty without domains.
    """

    images: ImageDataset
    image_of: np.ndarray
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    faults: tuple[str, ...] = ()
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.questions)


@dataclass(frozen=True, eq=False)
class QuestionSplits:
    """Three sets of questions over disjoint images, with the same question types, and the initial text of a prompt."""

    train: QuestionSet
    val: QuestionSet
    test: QuestionSet
    class_names: tuple[str, ...]
    template: str


def cut_by_image(images: int, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Divide images among sets, so that no held-out question is about a training image.

    Args:
        images: Number of images.
        fractions: Share of the images for each missing set, without ``train``. Each set gets at least one image.
        seed: Seed of the shuffle. For a given number of images, only the seed decides the order.

    Returns:
        Sorted image numbers of ``train`` and of each missing set.

    Raises:
        ConfigError: If no image is left to train on.
    """
    order, start = np.random.default_rng([seed, images]).permutation(images), 0
    cut: dict[str, np.ndarray] = {}
    for name, fraction in fractions.items():
        size = max(1, round(fraction * images))
        cut[name] = np.sort(order[start : start + size])
        start += size
    cut["train"] = np.sort(order[start:])
    if not len(cut["train"]):
        raise ConfigError(
            f"data.path: {images} images are too few to cut {' and '.join(fractions)} from them and train on the rest; "
            "add images, or provide these sets separately"
        )
    return cut


def subset(questions: QuestionSet, images: np.ndarray, chosen: ImageDataset) -> QuestionSet:
    """Return the questions about some of the images.

    Args:
        questions: All questions.
        images: Sorted numbers of the chosen images.
        chosen: The chosen images, as a data set.
    """
    place = np.full(len(questions.images), -1, dtype=np.int64)
    place[images] = np.arange(len(images))
    records = np.flatnonzero(place[questions.image_of] >= 0)
    return QuestionSet(
        images=chosen,
        image_of=place[questions.image_of[records]],
        questions=tuple(questions.questions[i] for i in records),
        answers=tuple(questions.answers[i] for i in records),
        labels=questions.labels[records],
        class_names=questions.class_names,
        faults=tuple(questions.faults[i] for i in records) if questions.faults else (),
        domains=None if questions.domains is None else questions.domains[records],
        domain_names=questions.domain_names,
    )

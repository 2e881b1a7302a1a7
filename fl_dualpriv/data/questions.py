"""Questions about images, in the one form in which they reach the rest of the library."""

from dataclasses import dataclass

import numpy as np

from fl_dualpriv.data.images import ImageDataset
from fl_dualpriv.errors import ConfigError

DEFAULT_TEMPLATE = "Answer the question with a single word or phrase."
"""What a prompt starts from unless a data set says otherwise: LLaVA-1.5's own request for short answers."""


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions with their answers; a record is one of them, and several may ask about one image.

    Attributes:
        images: Decoded one at a time; their labels are not read.
        image_of: Each record's image, (record,) int64.
        questions: One per record; empty: the record cannot be used.
        answers: One per record.
        labels: Question type of each record, (record,) int64, indices into ``class_names``; public metadata.
        class_names: Of the question types.
        faults: Why the words of each record cannot be used, or empty, for the owner of the data; (): nothing is wrong.
    """

    images: ImageDataset
    image_of: np.ndarray
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.questions)


@dataclass(frozen=True, eq=False)
class QuestionSplits:
    """Three sets of questions over disjoint images, of the same types, and the words that a prompt starts from."""

    train: QuestionSet
    val: QuestionSet
    test: QuestionSet
    class_names: tuple[str, ...]
    template: str


def cut_by_image(images: int, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Deal images out, so that no held-out question is about a training image.

    Args:
        images: How many there are.
        fractions: Share of each set that is missing, besides ``train``; each gets one image at least.
        seed: Of the shuffle; nothing else decides.

    Returns:
        Sorted image numbers of ``train`` and of each missing set.

    Raises:
        ConfigError: If none is left to train on.
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
            "add images, or sets of their own"
        )
    return cut


def subset(questions: QuestionSet, images: np.ndarray, chosen: ImageDataset) -> QuestionSet:
    """The questions about some of the images.

    Args:
        questions: All of them.
        images: Sorted numbers of the images.
        chosen: These images, as a data set.
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
    )

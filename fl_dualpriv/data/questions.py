"""Questions about images, in the one form in which they reach the rest of the library, and what loads them."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fl_dualpriv.data.datasets import ImageDataset
from fl_dualpriv.data.hub_names import hub_name
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


@functools.lru_cache(maxsize=4)
def load_questions(
    ref: Literal["demo-vqa", "questions"],
    path: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad: Literal["raise", "keep"],
) -> QuestionSplits:
    """Load questions once per process.

    Args:
        ref: ``demo-vqa``: the embedded ones, no other argument is read. ``questions``: what ``path`` names.
        path: A .jsonl or .csv file; a folder of ``train``, ``val`` and ``test`` files of these kinds; or
            ``datasets:NAME``, a data set of the Hugging Face hub, a folder that its library reads or saved, or a
            .parquet file. A saved folder and a .parquet file may stand without ``datasets:``.
        val_fraction: Share of the training images that become the validation set where there is none.
        test_fraction: The same for the test set.
        seed: Of that cut.
        on_bad: ``raise``: a record that cannot be read is an error. ``keep``: it stays counted and cannot be used.

    Raises:
        ConfigError: If the questions cannot be used; it says all that is wrong.
    """
    if ref == "demo-vqa":
        from fl_dualpriv.data.vqa_demo import load_vqa_demo

        return load_vqa_demo()
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub_questions import load_hub_questions

        return load_hub_questions(name, val_fraction, test_fraction, seed, on_bad)
    from fl_dualpriv.data.question_files import load_question_files

    return load_question_files(path, val_fraction, test_fraction, seed, on_bad)


def given_question_splits(path: str) -> frozenset[str]:
    """Which of train, val and test are sets of their own in what ``data.path`` names."""
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub_questions import given_hub_splits

        return given_hub_splits(name)
    from fl_dualpriv.data.question_files import given_file_splits

    return given_file_splits(Path(path).expanduser())


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

"""Load images or questions by the names of the configuration: folders, lists and Hugging Face data sets."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fl_dualpriv.config.schema import DataConfig
from fl_dualpriv.data.folder import bad_images, given_splits, read_layout, unusable
from fl_dualpriv.data.formats.hub_names import hub_name
from fl_dualpriv.data.formats.text_files import given_file_splits
from fl_dualpriv.data.images import DataSplits, ImageDataset
from fl_dualpriv.data.layout import Columns, Group, Layout, Reading
from fl_dualpriv.data.listed import holds_questions as list_holds_questions
from fl_dualpriv.data.listed import is_list, read_list
from fl_dualpriv.data.questions import QuestionSplits
from fl_dualpriv.errors import ConfigError


def reading_of(data: DataConfig, on_bad: Literal["raise", "keep"]) -> Reading:
    """Return how a run with this configuration reads labelled images."""
    groups: dict[str, Group] = {"by-domain": "domain", "by-client": "client"}
    columns = Columns(
        image=data.image_column, label=data.label_column, domain=data.domain_column, client=data.client_column
    )
    return Reading(
        group=groups.get(data.partition, ""),
        columns=columns,
        needs_declared=data.partition == "by-node",
        on_bad=on_bad,
    )


@functools.lru_cache(maxsize=8)
def load_data(
    ref: Literal["demo", "shelf", "folder"],
    path: str,
    classes: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    reading: Reading,
) -> DataSplits:
    """Load a data set once per process; a directory that changes later is not read again.

    Args:
        ref: ``demo`` and ``shelf``: embedded images; no other argument is read. ``folder``: images at ``path``.
        path: See `read_images`.
        classes: JSON file with the template and class names, or empty.
        val_fraction: Share of the training images that becomes the validation set if there is none.
        test_fraction: Share of the training images that becomes the test set if there is none.
        seed: Seed of that cut.
        reading: How the run reads the images. With ``on_bad`` ``raise`` an unreadable image raises an error now. With
            ``keep`` it stays a record, so that counts stay public under DP, and ``image`` raises ``BadImageError``.

    Raises:
        ConfigError: If the data set cannot be used with these arguments.
    """
    if ref == "demo":
        from fl_dualpriv.data.demo.images import demo_template, load_demo  # heavy, so only the demo imports it

        return _splits(load_demo(), demo_template())
    if ref == "shelf":
        from fl_dualpriv.data.demo.shelf import load_shelf, shelf_template

        return _splits(load_shelf(), shelf_template())
    if ref == "folder":
        layout = read_images(path, classes, val_fraction, test_fraction, seed, reading)
        problems = [*layout.problems, *(bad_images(layout.splits.values()) if reading.on_bad == "raise" else [])]
        if problems:
            raise unusable(path, problems)
        return _splits(layout.splits, layout.template)
    raise ConfigError(f"data.ref = {ref!r}: must be one of demo, shelf, folder")


def read_images(
    path: str, classes: str, val_fraction: float, test_fraction: float, seed: int, reading: Reading
) -> Layout:
    """Find the images at ``data.path``, their classes and splits. Opens no image file.

    Args:
        path: A directory of class folders; a .csv or .jsonl list of images and labels, or a directory with such lists
            called train, val and test; or ``datasets:NAME``, as in `load_questions`. ``~`` is expanded.
        classes: JSON file with the template and class names, or empty.
        val_fraction: Share of the training images that becomes the validation set if there is none.
        test_fraction: Share of the training images that becomes the test set if there is none.
        seed: Seed of that cut.
        reading: How the run reads the images.

    Raises:
        ConfigError: If the images cannot be found.
    """
    if not path.strip():
        raise ConfigError('data.path is empty; give the directory of the images, or set data.ref = "demo"')
    fractions = {"val": val_fraction, "test": test_fraction}
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub import read_hub_images

        return read_hub_images(name, classes, fractions, seed, reading)
    place = Path(path).expanduser()
    if is_list(place):
        return read_list(place, classes, fractions, seed, reading)
    if reading.group == "client":
        raise ConfigError(
            'data.partition = "by-client": folders name no clients; give a .csv or .jsonl list with a column client, '
            "or a data set with one"
        )
    by_domain = reading.group == "domain"
    return read_layout(place, classes, val_fraction, test_fraction, seed, by_domain=by_domain)


def given_image_splits(path: str) -> frozenset[str]:
    """Return the splits among train, val and test that exist as separate sets of images at ``data.path``."""
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub import given_hub_splits

        return given_hub_splits(name)
    place = Path(path).expanduser()
    return given_file_splits(place) if is_list(place) else given_splits(place)


def holds_questions(path: str) -> bool:
    """Return True if the records at ``data.path`` are questions: a list or a data set with a column question."""
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub import hub_columns

        return "question" in hub_columns(name)
    place = Path(path).expanduser()
    return is_list(place) and list_holds_questions(place)


def _splits(splits: Mapping[str, ImageDataset], template: str) -> DataSplits:
    train = splits["train"]
    return DataSplits(train, splits["val"], splits["test"], train.class_names, template)


@functools.lru_cache(maxsize=4)
def load_questions(
    ref: Literal["demo-vqa", "questions"],
    path: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad: Literal["raise", "keep"],
    by_domain: bool = False,
) -> QuestionSplits:
    """Load questions once per process.

    Args:
        ref: ``demo-vqa``: the embedded questions; no other argument is read. ``questions``: the questions at ``path``.
        path: A .jsonl or .csv file; a folder of ``train``, ``val`` and ``test`` files of these kinds; or
            ``datasets:NAME``, where NAME is a data set of the Hugging Face hub, a folder that the package datasets
            reads or saved, or a .parquet file. A saved folder and a .parquet file need no ``datasets:``.
        val_fraction: Share of the training images that becomes the validation set if there is none.
        test_fraction: Share of the training images that becomes the test set if there is none.
        seed: Seed of that cut.
        on_bad: ``raise``: a record that cannot be read raises an error. ``keep``: it stays counted and cannot be used.
        by_domain: True if every record must name its domain. Only files can.

    Raises:
        ConfigError: If the questions cannot be used; the message names every problem.
    """
    if ref == "demo-vqa":
        from fl_dualpriv.data.demo_questions import load_vqa_demo

        return load_vqa_demo()
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub_questions import load_hub_questions

        return load_hub_questions(name, val_fraction, test_fraction, seed, on_bad)
    from fl_dualpriv.data.question_files import load_question_files

    return load_question_files(path, val_fraction, test_fraction, seed, on_bad, by_domain)


def given_question_splits(path: str) -> frozenset[str]:
    """Return the splits among train, val and test that exist as separate sets at ``data.path``."""
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub import given_hub_splits

        return given_hub_splits(name)
    return given_file_splits(Path(path).expanduser())

"""Load images or questions by the names of the configuration."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fl_dualpriv.data.folder import load_folder
from fl_dualpriv.data.hub_names import hub_name
from fl_dualpriv.data.images import DataSplits, ImageDataset
from fl_dualpriv.data.questions import QuestionSplits
from fl_dualpriv.errors import ConfigError


@functools.lru_cache(maxsize=8)
def load_data(
    ref: Literal["demo", "shelf", "folder"],
    path: str,
    classes: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    on_bad_image: Literal["raise", "keep"],
    by_domain: bool = False,
) -> DataSplits:
    """Load a data set once per process; a directory that changes later is not read again.

    Args:
        ref: ``demo`` and ``shelf``: embedded images; no other argument is read. ``folder``: a directory of class
            folders.
        path: Directory of the images; ``~`` is expanded.
        classes: JSON file with the template and class names, or empty.
        val_fraction: Share of train/ that becomes the validation set if there is no val/.
        test_fraction: Share of train/ that becomes the test set if there is no test/.
        seed: Seed of that cut.
        on_bad_image: ``raise``: an unreadable image raises an error now. ``keep``: it stays a record, so that counts
            stay public under DP, and ``image`` raises ``BadImageError`` for it.
        by_domain: True if a directory has one folder per domain above the class folders.

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
        if not path.strip():
            raise ConfigError('data.path is empty; give the directory of the images, or set data.ref = "demo"')
        folder = Path(path).expanduser()
        return _splits(*load_folder(folder, classes, val_fraction, test_fraction, seed, on_bad_image, by_domain))
    raise ConfigError(f"data.ref = {ref!r}: must be one of demo, shelf, folder")


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
        from fl_dualpriv.data.hub import load_hub_questions

        return load_hub_questions(name, val_fraction, test_fraction, seed, on_bad)
    from fl_dualpriv.data.question_files import load_question_files

    return load_question_files(path, val_fraction, test_fraction, seed, on_bad, by_domain)


def given_question_splits(path: str) -> frozenset[str]:
    """Return the splits among train, val and test that exist as separate sets at ``data.path``."""
    if (name := hub_name(path)) is not None:
        from fl_dualpriv.data.hub import given_hub_splits

        return given_hub_splits(name)
    from fl_dualpriv.data.question_files import given_file_splits

    return given_file_splits(Path(path).expanduser())

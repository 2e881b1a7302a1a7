"""Hashes of names and classes of a run's data, so that a resumed run notices other data."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from fl_dualpriv.data.folder import FolderSplit
from fl_dualpriv.data.images import DataSplits, ImageDataset
from fl_dualpriv.data.questions import QuestionSet, QuestionSplits


def data_identity(data: DataSplits | QuestionSplits, partitions: Sequence[np.ndarray]) -> dict[str, str]:
    """Compute a SHA-256 of each part of the data, by the part's name in messages; pixels are not read.

    The hashes are functions of private file names, questions and labels. They may be stored only with the operator's
    files.

    Args:
        data: Images or questions.
        partitions: Record indices of each client.

    Returns:
        Hashes of the class list with the template, the training records in order with their classes, their division
        among clients, and the held-out records.
    """
    words = _hash(json.dumps([data.class_names, data.template]).encode())
    division = _hash(*(part.astype(np.int64).tobytes() for part in partitions))
    return {
        "the class list": words,
        "the training records": _hash(*_of_split(data.train)),
        "the division among clients": division,
        "the held-out records": _hash(*_of_split(data.val), *_of_split(data.test)),
    }


def _of_split(split: ImageDataset | QuestionSet) -> list[bytes]:
    if isinstance(split, QuestionSet):
        texts = json.dumps([split.questions, split.answers]).encode()
        domains = [] if split.domains is None else [split.domains.tobytes()]
        return [texts, split.labels.tobytes(), split.image_of.tobytes(), *domains, *_of_split(split.images)]
    names = [str(path) for path in split.paths] if isinstance(split, FolderSplit) else [str(len(split))]
    return [json.dumps(names).encode(), np.asarray(split.labels, dtype=np.int64).tobytes()]


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:  # the length in front makes different lists of parts give different bytes
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()

"""Check the data folder of a node's owner, as a run would open it. For the owner only: no torch, no network.

A server never gets these counts. They decide only if the node joins.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_dualpriv.data.layout import Columns, Reading
from fl_dualpriv.data.listed import is_list
from fl_dualpriv.data.load import given_image_splits, holds_questions, load_data, load_questions
from fl_dualpriv.data.usable import SECONDS, Usable, look, skipped_files
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.node.file import NodeFile

_CUT = (0.1, 0.2, 0)
"""Fractions and seed of a cut. The run has its own values, but only counts depend on them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeData:
    """Training records of a node.

    Attributes:
        says: Number and kind of the records, in words.
        found: Count of the usable records, and the names of the others.
        note: Further information for the owner.
    """

    says: str
    found: Usable
    note: str

    def lines(self) -> list[str]:
        """Return lines for the owner's log: counts, names of records that cannot be used, and the note."""
        return [f"data: {self.says}, {self.found.says()}", *self.found.lines(), *([self.note] if self.note else [])]


def asks_questions(path: Path) -> bool:
    """Return True if the records are questions about images."""
    return holds_questions(str(path))


def look_at(path: Path, classes: Path | None, columns: Mapping[str, str], seconds: float = SECONDS) -> NodeData:
    """Open the training records.

    Args:
        path: ``data-path`` of the owner's file.
        classes: ``classes`` of the owner's file.
        columns: ``columns`` of the owner's file.
        seconds: Time limit, see `look`.

    Raises:
        ConfigError: If no run could load them.
    """
    if asks_questions(path):
        questions = load_questions("questions", str(path), *_CUT, "keep")
        says = f"{len(questions.train)} training questions of {len(questions.class_names)} types"
        return NodeData(says=says, found=look(questions.train, "training questions", seconds), note="")
    images = load_data("folder", str(path), str(classes or ""), *_CUT, _reading(columns))
    has_test_split = "test" in given_image_splits(str(path))
    says = f"{len(images.train)} training images of {len(images.class_names)} classes, "
    says += "a separate test/" if has_test_split else "test images cut out of them: their scores never leave"
    left_out = skipped_files(path) if path.is_dir() and not is_list(path) else Counter()
    skipped = ", ".join(f"{count} {kind or 'without ending'}" for kind, count in left_out.most_common())
    note = f"skipped because of their ending or place: {skipped}" if skipped else ""
    return NodeData(says=says, found=look(images.train, "training images", seconds), note=note)


def _reading(columns: Mapping[str, str]) -> Reading:
    named = Columns(image=columns.get("image", ""), label=columns.get("label", ""))
    return Reading(columns=named, needs_declared=True)


def before_joining(node: NodeFile) -> list[str]:
    """Return lines for the owner's log, before a node joins.

    Guarantee:
        The node joins or does not join. That is participation, which docs/privacy.md §2 does not protect. The decision
        is made before the server hears of this node. Everything that the server hears afterwards does not depend on
        these counts.

    Raises:
        ConfigError: If no run could use any record of the owner's folder. The message has counts and names.
    """
    if node.data_path is None:
        return []
    data = look_at(node.data_path, node.classes, node.columns)
    if refusal := data.found.refusal():
        raise ConfigError("\n  ".join([f"data-path = {str(node.data_path)!r}: this node does not join:", *refusal]))
    return data.lines()

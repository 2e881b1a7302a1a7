"""A bug to be planted in the real code, and the checks that must notice it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guarantees.run_checks import Federation

Patch = pytest.MonkeyPatch
Check = Callable[[], None] | Callable[[Path], None] | Callable[[Federation], None]
"""Raises AssertionError where the guarantee does not hold. What it asks for is in its one argument's name."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One planted bug.

    Attributes:
        name: What is wrong, in the words of the field.
        where: What is changed in the running code.
        plant: Changes it.
        caught_by: Each of these must fail on the changed code, and hold on ours.
        refused: The code notices by itself and does not start: the checks end in a PrivacyError.
        audited_by: The audit that must refute the claim of the changed code, and not of ours; None: no canary shows it.
    """

    name: str
    where: str
    plant: Callable[[Patch], None]
    caught_by: tuple[Check, ...]
    refused: bool = False
    audited_by: Callable[[], None] | None = None

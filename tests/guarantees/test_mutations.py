"""Break each guarantee on purpose, in the real code: the check that stands for it must notice.

The checks are those of the guarantee tests, called once on our code, where they hold, and once on the broken code. At
the end of the session the list is printed: what was planted, and what caught it. With ``-m ""`` the audit is asked too,
about each bug that planted canaries can show.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.errors import PrivacyError
from tests.conftest import PLANTED
from tests.guarantees import run_checks
from tests.guarantees.book_mutations import BOOK_MUTATIONS
from tests.guarantees.central_mutations import CENTRAL_MUTATIONS
from tests.guarantees.collective_mutations import COLLECTIVE_MUTATIONS
from tests.guarantees.filter_mutations import FILTER_MUTATIONS
from tests.guarantees.mutation import Check, Mutation
from tests.guarantees.noise_mutations import NOISE_MUTATIONS
from tests.guarantees.personalisation_mutations import PERSONALISATION_MUTATIONS
from tests.guarantees.prior_mutations import PRIOR_MUTATIONS
from tests.guarantees.pruning_mutations import PRUNING_MUTATIONS
from tests.guarantees.result_mutations import RESULT_MUTATIONS
from tests.guarantees.row_mutations import ROW_MUTATIONS
from tests.guarantees.run_checks import Federation
from tests.guarantees.score_mutations import SCORE_MUTATIONS
from tests.guarantees.selection_mutations import SELECTION_MUTATIONS
from tests.guarantees.server_mutations import SERVER_MUTATIONS
from tests.guarantees.step_mutations import STEP_MUTATIONS

MUTATIONS = (
    *STEP_MUTATIONS,
    *ROW_MUTATIONS,
    *PRIOR_MUTATIONS,
    *PRUNING_MUTATIONS,
    *PERSONALISATION_MUTATIONS,
    *COLLECTIVE_MUTATIONS,
    *NOISE_MUTATIONS,
    *SERVER_MUTATIONS,
    *CENTRAL_MUTATIONS,
    *BOOK_MUTATIONS,
    *FILTER_MUTATIONS,
    *RESULT_MUTATIONS,
    *SCORE_MUTATIONS,
    *SELECTION_MUTATIONS,
)
Call = Callable[[Check], None]
Noting = Callable[[str, str], None]


@pytest.fixture
def planted(record_property: Callable[[str, object], None]) -> Noting:
    """Note what caught a bug in the test's report, from where ``tests/conftest.py`` prints it."""
    return lambda bug, line: record_property(PLANTED, (bug, line))


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory, tiny_clip_dir: Path) -> Call:
    """Give a check the fresh folder, or the federation in one, that it asks for."""
    images = run_checks.write_images(tmp_path_factory.mktemp("images"))

    def run(check: Check) -> None:
        folder = tmp_path_factory.mktemp("check")
        given: dict[str, Any] = {
            "folder": folder,
            "federation": Federation(folder=folder, images=images, clip=tiny_clip_dir),
        }
        check(*[given[name] for name in inspect.signature(check).parameters])

    return run


@pytest.fixture(scope="module")
def holds(call: Call) -> Call:
    """Show that a check passes on our code, once."""
    shown: set[Check] = set()

    def show(check: Check) -> None:
        if check not in shown:
            call(check)
            shown.add(check)

    return show


def what_notices(mutation: Mutation, check: Check, call: Call) -> str:
    """The check fails on the broken code: by what it asserts itself, or because the code refuses to start."""
    with pytest.MonkeyPatch.context() as patch:
        mutation.plant(patch)
        with pytest.raises(PrivacyError if mutation.refused else AssertionError) as failure:
            call(check)
    # An assertion of ours elsewhere would only say that the bug was planted badly.
    where = Path(str(failure.traceback[-1].path)).name
    assert mutation.refused or where.endswith("_checks.py"), f"{where}: {failure.value}"
    return f"{check.__name__}: {'refused: ' if mutation.refused else ''}{failure.value}".splitlines()[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.plant.__name__)
def test_a_planted_bug_is_caught(mutation: Mutation, holds: Call, call: Call, planted: Noting) -> None:
    for check in mutation.caught_by:
        holds(check)
        planted(mutation.name, what_notices(mutation, check, call))


def test_there_are_as_many_bugs_as_we_say() -> None:
    """Each by its own name, so that none hides behind another in the list."""
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 23
    assert all(mutation.caught_by for mutation in MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", [m for m in MUTATIONS if m.audited_by], ids=lambda mutation: mutation.plant.__name__
)
def test_a_planted_bug_is_caught_by_the_audit(mutation: Mutation, holds: Call, call: Call, planted: Noting) -> None:
    """A lower bound above the claim."""
    assert mutation.audited_by is not None
    holds(mutation.audited_by)
    planted(mutation.name, what_notices(mutation, mutation.audited_by, call))

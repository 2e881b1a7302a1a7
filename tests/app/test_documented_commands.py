"""Every command that README.md and docs/*.md show is run on what the commands before it made, or skipped for a reason.

The slow part prints its list at the end: what was run, with which arguments beside the documented ones, and what was
skipped, why, and which test covers it.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.app.documented_commands import LANGUAGES, Command, blocks_of, commands_of, documents, filled, without_comment
from tests.app.documented_list import COMMANDS, MOST_SKIPPED, PYTHON, Run, Skip
from tests.app.scratch_checkout import ScratchCheckout
from tests.conftest import DOCUMENTED
from tests.fl_dualpriv.models.conftest import hf_clip_dir, make_hf_clip
from tests.tiny_llava import WORDS

__all__ = ["hf_clip_dir", "make_hf_clip"]  # fixtures

ALL = [command for document in documents() for command in commands_of(document)]
TESTS = Path(__file__).parents[1]
SCRIPTS = [block for document in documents() for block in blocks_of(document) if block.language == "python"]


def entry(command: Command) -> Run | Skip:
    return COMMANDS[command.document][command.text]


# --- the list is whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.place)
def test_every_documented_command_has_an_entry(command: Command):
    assert command.text in COMMANDS.get(command.document, {}), "add it to documented_list.py: run it, or say why not"


def test_no_entry_is_stale():
    listed = {(document, text) for document, entries in COMMANDS.items() for text in entries}
    assert listed - {(command.document, command.text) for command in ALL} == set()


def test_at_most_eight_commands_are_skipped_and_a_test_covers_each():
    skipped = [found for command in ALL if isinstance(found := entry(command), Skip)]
    assert len(skipped) <= MOST_SKIPPED
    for found in skipped:
        assert found.tests
        for name in found.tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), name


def test_every_block_of_python_is_known():
    assert {block.text.partition("\n")[0] for block in SCRIPTS} == PYTHON.keys()


def test_a_command_is_documented_once_in_a_document():
    """Else the runner would run it twice on one entry."""
    assert len({(command.document, command.text) for command in ALL}) == len(ALL)


def test_every_fence_has_a_known_language():
    fences = [(block.language, block.document, block.line) for d in documents() for block in blocks_of(d)]
    assert [fence for fence in fences if fence[0] not in LANGUAGES] == []


def test_comments_and_continuations_are_read_as_a_shell_does(tmp_path: Path):
    assert without_comment("run --set 'a=#1' x#y # words") == "run --set 'a=#1' x#y "
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "text\n```sh\n$ one \\\n    --two  # three\n\n# four\nfive\n```\n```\nsix\n```\n"
    )
    found = commands_of("README.md", tmp_path)
    assert [(command.line, command.text) for command in found] == [(3, "one --two"), (7, "five")]
    (tmp_path / "README.md").write_text("```sh\none\n")
    with pytest.raises(ValueError, match="not closed"):
        commands_of("README.md", tmp_path)


def test_placeholders_are_whole_words():
    assert filled("export RUN --out RUN-1 /RUN", {"RUN": "x"}) == "export x --out x-1 /RUN"
    with pytest.raises(ValueError, match="it has no FOLDER"):
        filled("export RUN", {"FOLDER": "x"})


# --- the runner -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_clip_dir: Path,
    hf_clip_dir: Path,
    make_llava_dir: Callable[..., Path],
) -> Iterator[ScratchCheckout]:
    models = {
        "clip": tiny_clip_dir,
        "hf-clip": hf_clip_dir,
        "llava": make_llava_dir(words=(*WORDS, "Answer", "with", "one", "word", ".")),
    }
    made = ScratchCheckout.made(tmp_path_factory.mktemp("documented"), models)
    yield made
    made.stop_programs()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ALL, ids=lambda command: command.place)
def test_the_documented_command(
    command: Command, checkout: ScratchCheckout, record_property: Callable[[str, object], None]
):
    found = entry(command)
    if isinstance(found, Skip):
        words = f"skipped: needs {found.needs} ({found.why}); covered by {', '.join(found.tests)}"
        record_property(DOCUMENTED, (command.place, command.text, words))
        return
    begun = time.monotonic()
    if found.before:
        getattr(checkout, found.before)()
    text = f"{filled(command.text, found.put)} {found.more}".strip()
    said = checkout.start(text, found.stays) if found.stays else checkout.call(text, found.status)
    assert [words for words in found.says if words not in said] == [], said[-6000:]
    if text.startswith("flwr run"):  # it hands the run over and ends
        checkout.wait_for_files(found.leaves)
    assert [name for name in found.leaves if not (checkout.path / name).exists()] == []
    changed = f", with {found.more}" if found.more else ""
    words = f"run{changed}: {time.monotonic() - begun:.0f} s"
    record_property(DOCUMENTED, (command.place, command.text, words))


@pytest.mark.slow
def test_the_documented_python(checkout: ScratchCheckout, record_property: Callable[[str, object], None]):
    """After the commands of its document, as a reader has them."""
    (block,) = [block for block in SCRIPTS if "load_prompt" in block.text]
    (checkout.path / "documented.py").write_text(f"{block.text}print(prompt.predict(['sailboat.png'])[0])\n")
    said = checkout.call("python documented.py")
    assert "Prediction(image='sailboat.png'" in said
    assert "error=''" in said
    record_property(DOCUMENTED, (f"{block.document}:{block.line}", block.text.partition("\n")[0], "run, as a file"))

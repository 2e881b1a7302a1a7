"""The folder appears at once or not at all, keeps names of files where it can, and is one that the reader takes."""

import functools
from pathlib import Path

import pytest

from fl_dualpriv.errors import ConfigError
from tests.tools.data.made import tree
from tools.data.archives import Member
from tools.data.layout import Picture, Plan, Rule, check, folder_name, made_at_once, write

RULE = Rule("by hand")


def member(path: str, place: int = 0) -> Member:
    return Member(path, "x.zip", (0, place), functools.partial(str.encode, path))


def plan_of(*placed: tuple[str, str, str], domain: str = "", names: dict[str, str] | None = None) -> Plan:
    pictures = [Picture(split, folder, member(path), domain) for split, folder, path in placed]
    return Plan(pictures, names or {folder: folder for _, folder, _ in placed}, "a {}.", RULE)


def good(more: list[tuple[str, str, str]] | None = None, **options) -> Plan:
    placed = [(split, folder, f"{folder}/{split}.jpg") for split in ("train", "val", "test") for folder in "ab"]
    return plan_of(*placed, *(more or []), **options)


def fault(plan: Plan) -> str:
    with pytest.raises(ConfigError) as caught:
        check(plan)
    return str(caught.value)


def written(plan: Plan, out: Path) -> dict[str, bytes]:
    with made_at_once(out) as scratch:
        write(plan, {"data-set": "X"}, scratch)
    return {path: content for path, content in tree(out).items() if not path.endswith(".json")}


def test_a_good_plan_is_written_under_its_names(tmp_path: Path):
    check(good())
    out = tmp_path / "deep" / "out"
    assert written(good(), out) == {
        f"{split}/{folder}/{split}.jpg": f"{folder}/{split}.jpg".encode()
        for split in ("train", "val", "test")
        for folder in "ab"
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_domains_are_folders_above_the_classes(tmp_path: Path):
    assert "train/Real World/a/train.jpg" in written(good(domain="Real World"), tmp_path / "out")


@pytest.mark.parametrize(("first", "second"), [("1.jpg", "1.jpg"), ("1.jpg", "1.JPG")])
def test_equal_names_get_a_number_in_front(tmp_path: Path, first: str, second: str):
    more = [("train", "a", f"x/{first}"), ("train", "a", f"y/{second}")]
    files = written(good(more), tmp_path / "out")
    assert {path: content for path, content in files.items() if path.startswith("train/")} == {
        "train/a/000000_train.jpg": b"a/train.jpg",
        f"train/a/000001_{first}": f"x/{first}".encode(),
        f"train/a/000002_{second}": f"y/{second}".encode(),
        "train/b/train.jpg": b"b/train.jpg",
    }


def test_files_are_read_in_the_order_of_the_archive(tmp_path: Path):
    read = []
    pictures = [
        Picture("train", "a", Member(f"{n}.jpg", "x", (0, place), lambda n=n: read.append(n) or b"x"))
        for n, place in enumerate([5, 3, 9, 1])
    ]
    written(Plan(pictures, {"a": "a"}, "{}", RULE), tmp_path / "out")
    assert read == [3, 1, 0, 2]


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_an_existing_folder_is_refused_and_kept(tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"out exists; give the name of a folder that does not exist, or remove"):
        written(good(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_copy_that_is_cut_off_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    out, seen = tmp_path / "out", []

    def content() -> bytes:
        seen.append(([path.name for path in tmp_path.glob("*")], len(list(tmp_path.rglob("*.jpg")))))
        if len(seen) == 4:
            raise error
        return b"x"

    names = [f"{number}.jpg" for number in range(6)]
    pictures = [Picture("train", "a", Member(name, "x", (0, n), content)) for n, name in enumerate(names)]
    with pytest.raises((error, ConfigError)):
        written(Plan(pictures, {"a": "a"}, "{}", RULE), out)
    # Three files lay in the hidden folder, and there was no other one.
    (hidden,), count = seen[-1]
    assert hidden.startswith(".out.")
    assert count == 3
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_in_one_message():
    placed = [("train", "a", "a/1.jpg"), ("val", "a", "a/1.jpg"), ("test", "b", "b/2.txt")]
    every = "every split needs an image of every class: give the complete archives"
    assert fault(plan_of(*placed, names={"a": "same", "b": "same"})).splitlines() == [
        f"train has no image of 1 of 2 classes: b; {every}",
        f"val has no image of 1 of 2 classes: b; {every}",
        f"test has no image of 1 of 2 classes: a; {every}",
        "1 images are in a split twice or in two splits: a/1.jpg; a split names each image once",
        "1 files of the split do not have an image's ending: b/2.txt; remove them",
        "class folders share a name or have an empty one: a, b; give each its own name",
    ]


def test_one_class_is_too_few():
    placed = [(split, "a", f"a/{split}.jpg") for split in ("train", "val", "test")]
    assert "the images have 1 classes (a); give archives with at least 2" in fault(plan_of(*placed))


def test_a_class_without_images_and_a_split_without_a_domain_are_refused():
    assert "test has no image of 1 of 3 classes: c" in fault(good(names={"a": "a", "b": "b", "c": "c"}))
    only_train = Picture("train", "a", member("x/1.jpg"), "x")
    plan = good(domain="y")
    assert "val has no image of the domains x" in fault(Plan([*plan.pictures, only_train], plan.names, "{}", RULE))


def test_words_become_a_name_of_a_folder():
    assert folder_name("prince of wales feathers") == "prince_of_wales_feathers"
    assert folder_name("../a/b.") == "a_b"
    assert folder_name("black-eyed susan") == "black-eyed_susan"

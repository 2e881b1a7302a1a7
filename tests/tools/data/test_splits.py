"""CoOp's split files are read or refused with all that is wrong, and cuts follow the seed and the class only."""

from collections import Counter
from pathlib import Path

import pytest

from fl_dualpriv.errors import ConfigError
from tests.tools.data.made import jsoned, zipped
from tools.data.archives import Archives, Member
from tools.data.layout import Picture
from tools.data.splits import coop_cut, coop_plan, with_val

ROWS = {
    "train": [["a_b/1.jpg", 0, "ay_bee"], ["c/1.jpg", 1, "sea"]],
    "val": [["a_b/2.jpg", 0, "ay_bee"], ["c/2.jpg", 1, "sea"]],
    "test": [["a_b/3.jpg", 0, "ay_bee"], ["c/3.jpg", 1, "sea"]],
}


def members(count: int, folder: str = "a") -> list[Member]:
    return [Member(f"{folder}/{number:03}.jpg", "x", (0, number), bytes) for number in range(count)]


def plan(tmp_path: Path, document: object):
    archive = zipped(
        tmp_path / "x.zip", {f"images/{folder}/{n}.jpg": b"x" for folder in ("a_b", "c") for n in (1, 2, 3)}
    )
    with Archives([archive], tmp_path, "page") as archives:
        return coop_plan(jsoned(tmp_path / "split.json", document), archives, "images/", "a {}.")


def fault(tmp_path: Path, document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, document)
    return str(caught.value)


def test_a_split_file_of_coop_gives_splits_and_names(tmp_path: Path):
    found = plan(tmp_path, ROWS)
    assert [(p.split, p.folder, p.member.path) for p in found.pictures] == [
        (split, path.partition("/")[0], f"images/{path}") for split, rows in ROWS.items() for path, _, _ in rows
    ]
    assert found.names == {"a_b": "ay bee", "c": "sea"}
    assert found.rule.words == "the split file of CoOp, split.json"
    assert found.rule.options == ()


def test_missing_images_are_counted_and_five_are_named(tmp_path: Path):
    more = [[f"c/{number}.jpg", 1, "sea"] for number in range(10, 17)]
    message = fault(tmp_path, ROWS | {"train": ROWS["train"] + more})
    assert "7 of 13 images that --split " in message
    assert "images/c/10.jpg, images/c/11.jpg, images/c/12.jpg, images/c/13.jpg, images/c/14.jpg and 2 more" in message


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (["c/9.jpg", "1", "sea"], "train[2] is ['c/9.jpg', '1', 'sea']"),
        (["c/9.jpg", 1], "train[2] is ['c/9.jpg', 1]"),
        (["9.jpg", 1, "sea"], "train[2] is ['9.jpg', 1, 'sea']"),
        (["x/c/9.jpg", 1, "sea"], "train[2] is ['x/c/9.jpg', 1, 'sea']"),
        ("c/9.jpg", "train[2] is 'c/9.jpg'"),
        (["c/9.jpg", 1, "ocean"], "train[2] names c 'ocean' and not 'sea'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, row: object, shown: str):
    message = fault(tmp_path, ROWS | {"train": [*ROWS["train"], row]})
    assert "has 1 wrong lines" in message
    assert shown in message


@pytest.mark.parametrize("document", [[], {"train": []}, ROWS | {"dev": []}])
def test_other_keys_are_refused(tmp_path: Path, document: object):
    assert "it must be an object with the keys train, val and test" in fault(tmp_path, document)


def test_a_file_that_is_missing_or_not_json_is_refused(tmp_path: Path):
    (tmp_path / "wrong.json").write_text("{")
    archive = zipped(tmp_path / "x.zip", {"images/a/1.jpg": b"x"})
    with Archives([archive], tmp_path, "page") as archives:
        for name in ("wrong.json", "none.json"):
            with pytest.raises(ConfigError, match=rf"--split .*{name} cannot be read as JSON"):
                coop_plan(tmp_path / name, archives, "images/", "a {}.")


def test_paths_out_of_the_image_folder_are_missing_images(tmp_path: Path):
    assert "1 of 7 images" in fault(tmp_path, ROWS | {"train": [*ROWS["train"], ["../c.jpg", 1, "sea"]]})


def test_the_rule_of_coop():
    for total in range(3, 60):
        counts = Counter(picture.split for picture in coop_cut({"a": members(total)}, 0))
        # CoOp rounds the shares of train and val, and the rest is test. It stops if one of them is empty.
        train, val = round(0.5 * total), round(0.2 * total)
        if min(train, val, total - train - val) > 0:
            assert counts == {"train": train, "val": val, "test": total - train - val}
        assert set(counts) == {"train", "val", "test"}
        assert sum(counts.values()) == total
    assert {picture.split for picture in coop_cut({"a": members(2)}, 0)} == {"train"}


def placed(pictures: list[Picture]) -> dict[str, str]:
    return {picture.member.path: picture.split for picture in pictures}


def test_a_cut_depends_on_seed_and_own_class_only():
    first = placed(coop_cut({"a": members(20)}, 0))
    assert first == placed(coop_cut({"a": members(20)[::-1]}, 0))
    assert first.items() <= placed(coop_cut({"b": members(20, "b"), "a": members(20)}, 0)).items()
    assert first != placed(coop_cut({"a": members(20)}, 1))
    assert first != placed(coop_cut({"a": members(20)}, 0, "art"))


def test_val_is_a_share_of_train_in_each_class_of_each_domain():
    sizes = {("art", "a"): 20, ("art", "b"): 4, ("real", "a"): 1, ("real", "b"): 35}
    train = [
        Picture("train", folder, member, domain)
        for (domain, folder), size in sizes.items()
        for member in members(size, f"{domain}/{folder}")
    ]
    test = [Picture("test", "a", member, "art") for member in members(5, "test")]
    found = with_val([*train, *test], 0.1, 0)
    counts = Counter((picture.domain, picture.folder) for picture in found if picture.split == "val")
    # 10 % of 20, at least one of 4, none of 1, and 10 % of 35 rounded to even.
    assert counts == {("art", "a"): 2, ("art", "b"): 1, ("real", "b"): 4}
    assert Counter(picture.split for picture in found) == {"val": 7, "train": 60 - 7, "test": 5}
    assert [picture.member for picture in found] == [picture.member for picture in [*train, *test]]
    assert [p.split for p in found[-5:]] == ["test"] * 5
    assert placed(found) == placed(with_val([*train, *test][::-1], 0.1, 0))
    assert placed(found) != placed(with_val([*train, *test], 0.1, 1))


def test_a_large_share_leaves_an_image_in_train():
    assert Counter(p.split for p in with_val([Picture("train", "a", m) for m in members(3)], 0.99, 0)) == {
        "val": 2,
        "train": 1,
    }

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.folder import load_folder
from fl_dualpriv.data.formats.pixels import BadImageError
from fl_dualpriv.errors import ConfigError


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)


def make_classes(root: Path, counts: dict[str, int]) -> Path:
    for folder, count in counts.items():
        for i in range(count):
            save(root / folder / f"{i:03}.png", i)
    return root


def load(path: Path, classes: str = "", seed: int = 0, on_bad_image="raise"):
    return load_folder(path, classes, 0.1, 0.2, seed, on_bad_image)


def fault(path: Path, classes: str = "", on_bad_image="raise") -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, classes, on_bad_image=on_bad_image)
    return str(caught.value)


def test_flat_layout_is_cut_by_class(tmp_path):
    splits, template = load(make_classes(tmp_path, {"big_dog": 20, "cat": 10}))
    assert template == "a photo of a {}"
    # 20 images: 2 val, 4 test, 14 train; 10 images: 1 val, 2 test, 7 train.
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [14, 7],
        "val": [2, 1],
        "test": [4, 2],
    }
    paths = [path for split in splits.values() for path in split.paths]
    assert len(set(paths)) == len(paths) == 30
    for split in splits.values():
        assert split.class_names == ("big dog", "cat")
        assert split.labels.dtype == np.int64
        assert len(split) == len(split.labels) == len(split.paths)
        folders = ("big_dog", "cat")
        assert [path.parent.name for path in split.paths] == [folders[label] for label in split.labels]


def test_image_is_the_file(tmp_path):
    splits, _ = load(make_classes(tmp_path, {"a": 5, "b": 5}))
    for index, path in enumerate(splits["train"].paths):
        image = splits["train"].image(index)
        assert (image.mode, image.size) == ("RGB", (6, 4))
        assert image.getpixel((0, 0)) == (int(path.stem), 0, 0)


def test_cut_depends_on_seed_and_own_class_alone(tmp_path):
    make_classes(tmp_path, {"a": 20, "b": 20})
    first, again, other = load(tmp_path)[0], load(tmp_path)[0], load(tmp_path, seed=1)[0]
    assert first["test"].paths == again["test"].paths != other["test"].paths
    make_classes(tmp_path, {"aa": 20})
    more = load(tmp_path)[0]
    assert set(first["test"].paths) < set(more["test"].paths)


def test_split_folders(tmp_path):
    for name, count in (("train", 8), ("val", 3), ("test", 2)):
        make_classes(tmp_path / name, {"x": count, "y": count})
    splits, _ = load(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 6, "test": 4}
    assert all(path.is_relative_to(tmp_path / name) for name, split in splits.items() for path in split.paths)


def test_missing_split_is_cut_from_train(tmp_path):
    make_classes(tmp_path / "train", {"x": 10, "y": 10})
    make_classes(tmp_path / "test", {"x": 2, "y": 2})
    splits, _ = load(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "val": 2, "test": 4}


def test_class_may_be_called_train(tmp_path):
    splits, _ = load(make_classes(tmp_path, {"car": 5, "train": 5}))
    assert splits["train"].class_names == ("car", "train")


def test_smallest_class_gives_one_to_each_split(tmp_path):
    splits, _ = load(make_classes(tmp_path, {"a": 3, "b": 3}))
    assert [len(split) for split in splits.values()] == [2, 2, 2]


def test_what_is_read_and_what_is_ignored(tmp_path):
    for extension in ("png", "JPG", "jpeg", "webp", "bmp", "gif", "tif", "TIFF", "ppm"):
        save(tmp_path / "a" / f"image.{extension}")
    make_classes(tmp_path, {"b": 3})
    (tmp_path / "a" / ".hidden.png").write_text("x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".cache").mkdir()
    splits, _ = load(tmp_path)
    assert sum(int(np.sum(split.labels == 0)) for split in splits.values()) == 9
    assert splits["train"].class_names == ("a", "b")


def test_class_file(tmp_path):
    make_classes(tmp_path / "images", {"n01": 4, "n02": 4})
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"template": "a scan of {}.", "class-names": {"n02": "lung", "n01": "heart"}}))
    splits, template = load(tmp_path / "images", str(file))
    assert (splits["val"].class_names, template) == (("heart", "lung"), "a scan of {}.")
    file.write_text(json.dumps({"template": "one {}"}))
    splits, template = load(tmp_path / "images", str(file))
    assert (splits["val"].class_names, template) == (("n01", "n02"), "one {}")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"class-names": {"a": "x"}}, "class-names do not match the class folders: missing b"),
        ({"class-names": {"a": "x", "b": "y", "c": "z"}}, "class-names do not match the class folders: extra c"),
        ({"class-names": {"a": "x", "b": "x"}}, "class folders a, b share the name 'x'"),
        ({"class-names": {"a": "x", "b": " "}}, "class-names must be an object of non-empty texts"),
        ({"class-names": ["a", "b"]}, "class-names must be an object of non-empty texts"),
        ({"class_names": {}}, "unknown keys class_names; allowed are template and class-names"),
        ({"template": "a photo"}, "must be a text with exactly one {}"),
        ({"template": "{} and {}"}, "must be a text with exactly one {}"),
        ({"template": "a {0} {}"}, "must be a text with exactly one {}"),
        ({"template": 3}, "must be a text with exactly one {}"),
        ([], "must hold a JSON object"),
        (None, "is not JSON"),
    ],
    ids=str,
)
def test_bad_class_file(tmp_path, document, reason):
    make_classes(tmp_path / "images", {"a": 4, "b": 4})
    file = tmp_path / "classes.json"
    file.write_text("{" if document is None else json.dumps(document))
    assert reason in fault(tmp_path / "images", str(file))


def test_missing_class_file(tmp_path):
    make_classes(tmp_path, {"a": 4, "b": 4})
    assert "none.json cannot be read" in fault(tmp_path, str(tmp_path / "none.json"))


def test_path_that_is_no_directory(tmp_path):
    assert "does not exist; give an absolute path" in fault(tmp_path / "none")
    save(tmp_path / "a.png")
    assert "is not a directory" in fault(tmp_path / "a.png")


def test_no_class_folder(tmp_path):
    assert "has 0 class folders" in fault(tmp_path)
    save(tmp_path / "a.png")
    assert "has 0 class folders" in fault(tmp_path)
    make_classes(tmp_path, {"only": 5})
    assert "has 1 class folders" in fault(tmp_path)


def test_all_layout_problems_at_once(tmp_path):
    make_classes(tmp_path / "train", {"a": 4, "b": 4})
    (tmp_path / "train" / "empty").mkdir()
    save(tmp_path / "train" / "b" / "deeper" / "0.png")
    make_classes(tmp_path / "test", {"a": 1, "z": 1})
    make_classes(tmp_path, {"valid": 2})
    (tmp_path / "train" / "a" / "broken.png").write_text("x")
    message = fault(tmp_path)
    assert "valid: beside train/, val/ and test/ there may be no other" in message
    assert "train/empty/ holds no image" in message
    assert "train/b/ has sub-folders" in message
    assert "test/ and train/ have different class folders: missing b, empty; extra z" in message
    assert "1 of 11 images cannot be used" in message  # 4 + 4 + 1 in train, 2 in test


def test_train_is_missing(tmp_path):
    make_classes(tmp_path / "test", {"a": 4, "b": 4})
    assert "train/ is missing beside test" in fault(tmp_path)


def test_class_too_small_to_cut(tmp_path):
    assert "class b has 2 images, too few to cut val and test" in fault(make_classes(tmp_path, {"a": 9, "b": 2}))


@pytest.fixture
def damaged(tmp_path):
    make_classes(tmp_path, {"a": 12, "b": 4})
    for i in range(7):
        (tmp_path / "a" / f"{i:03}.png").write_text("no image")
    return tmp_path


def test_unreadable_images_are_named(damaged):
    message = fault(damaged)
    assert "7 of 16 images cannot be used" in message
    assert message.count("\n  image ") == 5
    assert "... and 2 more" in message


def test_unreadable_images_stay_records_under_dp(damaged):
    splits, _ = load(damaged, on_bad_image="keep")
    assert sum(len(split) for split in splits.values()) == 16
    bad = 0
    for split in splits.values():
        for index, path in enumerate(split.paths):
            if path.parent.name == "a" and int(path.stem) < 7:
                with pytest.raises(BadImageError, match=path.name):
                    split.image(index)
                bad += 1
            else:
                assert split.image(index).size == (6, 4)
    assert bad == 7


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "empty.png", "link.png"])
def test_kinds_of_damage(tmp_path, name):
    make_classes(tmp_path, {"a": 4, "b": 4})
    file = tmp_path / "a" / name
    if name == "link.png":
        file.symlink_to(tmp_path / "gone.png")
    elif name == "empty.png":
        file.write_bytes(b"")
    else:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:-2000])  # the header is whole, the pixels are not
    assert f"1 of 9 images cannot be used; repair or remove them\n  image {file}" in fault(tmp_path)


def test_sixteen_bit_samples_are_scaled(tmp_path):
    make_classes(tmp_path, {"a": 4, "b": 4})
    for i in range(4):
        Image.fromarray(np.full((4, 4), 0x8012, dtype=np.uint16)).save(tmp_path / "b" / f"{i:03}.png")
    splits, _ = load(tmp_path)
    index = int(np.flatnonzero(splits["train"].labels == 1)[0])
    assert splits["train"].image(index).getpixel((0, 0)) == (0x80, 0x80, 0x80)  # the high byte, not clipped at 255


def test_samples_that_are_not_numbers_are_refused(tmp_path):
    make_classes(tmp_path, {"a": 4, "b": 4})
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "b" / "nan.tif")
    assert "nan.tif cannot be read: it has samples that are not finite numbers" in fault(tmp_path)


@pytest.mark.parametrize(
    ("name", "right"), [("validation", "val"), ("Valid", "val"), ("dev", "val"), ("testing", "test")]
)
def test_a_split_of_another_name_is_told_its_name(name: str, right: str, tmp_path: Path):
    for split in ("train", name):
        make_classes(tmp_path / split, {"a": 4, "b": 4})
    assert f"{name}/ is not a name of a split: rename it to {right}/" in fault(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path: Path):
    make_classes(tmp_path, {"valid": 4, "void": 4})
    assert load(tmp_path)[0]["train"].class_names == ("valid", "void")


def test_wordnet_ids_are_no_words(tmp_path: Path):
    make_classes(tmp_path, {"n01440764": 4, "n01443537": 4, "dog": 4})
    assert "class folders n01440764, n01443537 have names that are WordNet ids, which are no words" in fault(tmp_path)
    names = {"n01440764": "tench", "n01443537": "goldfish", "dog": "dog"}
    (tmp_path / "classes.json").write_text(json.dumps({"class-names": names}))
    splits, _ = load_folder(tmp_path, str(tmp_path / "classes.json"), 0.1, 0.2, 0, "raise")
    assert splits["train"].class_names == ("dog", "tench", "goldfish")


# --- domains ----------------------------------------------------------------------------------------------------------


def by_domain(path: Path):
    return load_folder(path, "", 0.1, 0.2, 0, "raise", by_domain=True)


def domain_fault(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        by_domain(path)
    return str(caught.value)


DOMAINS = {"lab/cat": 10, "lab/dog": 10, "hall/cat": 20, "hall/dog": 10}


def test_class_folders_lie_in_a_folder_per_domain(tmp_path):
    for split, counts in (("train", DOMAINS), ("val", {"lab/cat": 1, "hall/dog": 2}), ("test", DOMAINS)):
        make_classes(tmp_path / split, counts)
    splits, _ = by_domain(tmp_path)
    for split in splits.values():
        assert (split.class_names, split.domain_names) == (("cat", "dog"), ("hall", "lab"))
        said = [(split.domain_names[d], split.class_names[c]) for d, c in zip(split.domains, split.labels, strict=True)]
        assert said == [(path.parent.parent.name, path.parent.name) for path in split.paths]
    assert {name: len(split) for name, split in splits.items()} == {"train": 50, "val": 3, "test": 50}


def test_missing_splits_are_cut_out_of_each_class_of_each_domain(tmp_path):
    splits, _ = by_domain(make_classes(tmp_path, DOMAINS))
    groups = {name: np.bincount(2 * split.domains + split.labels).tolist() for name, split in splits.items()}
    assert groups == {"train": [14, 7, 7, 7], "val": [2, 1, 1, 1], "test": [4, 2, 2, 2]}


def test_a_domain_may_lack_a_class(tmp_path):
    splits, _ = by_domain(make_classes(tmp_path, {"lab/cat": 10, "hall/cat": 10, "hall/dog": 10}))
    train = splits["train"]
    assert set(zip(train.domains.tolist(), train.labels.tolist(), strict=True)) == {(0, 0), (0, 1), (1, 0)}


def test_all_problems_of_domains_come_together(tmp_path):
    make_classes(tmp_path / "train", {"lab/cat": 3, "lab/dog": 3})
    make_classes(tmp_path / "test", {"lab/cat": 3, "roof/dog": 3})
    (tmp_path / "train" / "hall").mkdir()
    (tmp_path / "train" / "lab" / "bus").mkdir()
    said = domain_fault(tmp_path)
    assert "train/hall/ is a domain without a class folder" in said
    assert "train/lab/bus/ holds no image" in said
    assert "test/ and train/ have different domain folders: missing" not in said
    assert "test/ and train/ have different domain folders: extra roof" in said
    assert "different class folders: missing bus" in said


def test_a_folder_without_domains_is_no_folder_of_domains(tmp_path):
    said = domain_fault(make_classes(tmp_path, {"cat": 5, "dog": 5}))
    assert "cat/ is a domain without a class folder" in said
    assert 'data.partition = "by-domain" needs one folder per domain' in said


def test_the_old_layout_has_no_domains(tmp_path):
    splits, _ = load(make_classes(tmp_path, {"a": 5, "b": 5}))
    assert {(split.domains, split.domain_names) for split in splits.values()} == {(None, ())}

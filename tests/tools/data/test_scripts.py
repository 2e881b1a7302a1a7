"""Each script makes, from archives in the owners' shape, the folder that ``data.ref = "folder"`` reads."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from fl_dualpriv.data.folder import load_folder
from fl_dualpriv.errors import ConfigError
from tests.tools.data.made import (
    Files,
    Made,
    arguments,
    jsoned,
    made,
    mat,
    pictures,
    provenance,
    python2_pickle,
    refusal,
    tar_gz,
    tree,
    unpacked,
    zipped,
)
from tools.data import (
    archives,
    caltech101,
    cifar100,
    domainnet,
    dtd,
    eurosat,
    food101,
    office_home,
    oxford_flowers,
    oxford_pets,
)

SCRIPTS = (caltech101, cifar100, domainnet, dtd, eurosat, food101, office_home, oxford_flowers, oxford_pets)
SPLITS = ("train", "val", "test")
Capture = pytest.CaptureFixture[str]


def read(out: Path, *, by_domain: bool = False):
    """What the reader of image folders finds: classes by folder order, template and the number of images."""
    splits, template = load_folder(out, str(out / "classes.json"), 0.1, 0.2, 0, "raise", by_domain)
    (names,) = {split.class_names for split in splits.values()}
    for split in splits.values():
        assert set(split.labels.tolist()) == set(range(len(names)))
    return splits, names, template


def check(
    out: Path, files: Files, script: ModuleType, names: tuple[str, ...], counts: dict[str, int]
) -> dict[str, Made]:
    """Read the folder by the reader and by hand, and compare them with what is expected."""
    placed = made(out, files)
    by_domain = any(one.domain for one in placed.values())
    splits, found, template = read(out, by_domain=by_domain)
    assert found == names
    assert template == script.TEMPLATE
    assert {split: len(images) for split, images in splits.items()} == counts
    assert {split: sum(one.split == split for one in placed.values()) for split in SPLITS} == counts
    document = provenance(out)
    assert document["data-set"] == script.NAME
    assert document["page"] == script.PAGE
    assert document["counts"] == counts
    assert document["classes"] == len(names)
    return placed


def numbered(folder: str, count: int, name: str = "image_{:04}.jpg") -> list[str]:
    return [f"{folder}/{name.format(number)}" for number in range(1, count + 1)]


def split_rows(placed: dict[str, tuple[int, str]]) -> dict[str, list[list[object]]]:
    """A split file of CoOp that gives the images of each class to train, val, test, train, …"""
    rows: dict[str, list[list[object]]] = {split: [] for split in SPLITS}
    seen: dict[str, int] = {}
    for path, (label, name) in placed.items():
        number = seen[name] = seen.get(name, -1) + 1
        rows[SPLITS[number % 3]].append([path, label, name])
    return rows


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_makes(script: ModuleType, capsys: Capture):
    assert (script.__doc__ or "").splitlines()[0] == f"Make the folder of {script.NAME} (owner's page: {script.PAGE})."
    assert isinstance(script.ARCHIVES, tuple)
    assert all(isinstance(name, str) and "/" not in name for name in script.ARCHIVES)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    assert script.PAGE in capsys.readouterr().out


def test_every_script_is_tested():
    folder = Path(caltech101.__file__).parent
    modules = [importlib.import_module(f"tools.data.{path.stem}") for path in folder.glob("[a-z]*.py")]
    assert {module.__name__ for module in modules if hasattr(module, "ARCHIVES")} == {m.__name__ for m in SCRIPTS}


# Caltech-101

CALTECH = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes", "car_side"]


def caltech(tmp_path: Path) -> tuple[Path, Files]:
    """The zip file that holds a tar file, with what macOS leaves in it."""
    paths = [path for folder in CALTECH for path in numbered(f"101_ObjectCategories/{folder}", 10)]
    files = pictures(paths)
    inner = tar_gz(tmp_path / "inner.tar.gz", files | {"101_ObjectCategories/Faces/._image_0001.jpg": b"mac"})
    outer = {
        "caltech-101/101_ObjectCategories.tar.gz": inner.read_bytes(),
        "caltech-101/Annotations.tar": b"annotations",
        "__MACOSX/caltech-101/._Annotations.tar": b"mac",
    }
    archive = zipped(tmp_path / "caltech-101.zip", outer)
    inner.unlink()
    return archive, {f"caltech-101/{path}": content for path, content in files.items()}


def test_caltech_is_cut_by_the_rule_of_coop(tmp_path: Path, capsys: Capture):
    archive, files = caltech(tmp_path)
    out = tmp_path / "out"
    caltech101.main(arguments(out, [archive]))
    names = ("face", "leopard", "motorbike", "accordion", "airplane", "car side")
    # 10 images of each of 6 classes: 5 train, 2 val, 3 test.
    placed = check(out, files, caltech101, names, {"train": 30, "val": 12, "test": 18})
    for source, one in placed.items():
        *_, folder, file = source.split("/")
        assert (one.folder, one.file, one.domain) == (folder, file, "")
    assert {one.folder for one in placed.values()} == {*CALTECH} - {"BACKGROUND_Google", "Faces_easy"}
    document = provenance(out)
    assert document["seed"] == 0
    assert "val-fraction" not in document
    assert "rule of CoOp" in document["split"]
    assert document["archives"] == [
        {
            "file": "caltech-101.zip",
            "bytes": archive.stat().st_size,
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        }
    ]
    assert document["left-out"] == {
        "__MACOSX/caltech-101/._*": 1,
        "caltech-101/*.tar": 1,
        "caltech-101/101_ObjectCategories/BACKGROUND_Google/*.jpg": 10,
        "caltech-101/101_ObjectCategories/Faces/._*": 1,
        "caltech-101/101_ObjectCategories/Faces_easy/*.jpg": 10,
    }
    printed = capsys.readouterr().out
    assert "rule of CoOp" in printed
    assert "left out: 23 files" in printed
    assert "10 caltech-101/101_ObjectCategories/BACKGROUND_Google/*.jpg" in printed
    assert f'data.classes = "{out / "classes.json"}"' in printed

    caltech101.main(arguments(tmp_path / "again", [archive]))
    caltech101.main(arguments(tmp_path / "other", [archive], "--seed=1"))
    assert tree(tmp_path / "again") == tree(out)
    assert made(tmp_path / "other", files) != placed
    assert provenance(tmp_path / "other")["seed"] == 1


def test_caltech_by_the_split_file_of_coop(tmp_path: Path):
    archive, files = caltech(tmp_path)
    names = {"Faces": (1, "face"), "accordion": (4, "accordion"), "car_side": (9, "car_side")}
    rows = split_rows({path: names[f] for f in names for path in numbered(f, 6)})
    split = jsoned(tmp_path / "split_zhou_Caltech101.json", rows)
    out = tmp_path / "out"
    caltech101.main(arguments(out, [archive], "--split", split))
    placed = check(out, files, caltech101, ("face", "accordion", "car side"), dict.fromkeys(SPLITS, 6))
    assert {source.partition("101_ObjectCategories/")[2]: one.split for source, one in placed.items()} == {
        str(path): split for split, lines in rows.items() for path, _, _ in lines
    }
    document = provenance(out)
    assert document["split"] == "the split file of CoOp, split_zhou_Caltech101.json"
    assert [file["file"] for file in document["other-files"]] == ["split_zhou_Caltech101.json"]
    assert "seed" not in document


def test_an_option_without_effect_is_refused(tmp_path: Path, capsys: Capture):
    archive, _ = caltech(tmp_path)
    out = tmp_path / "out"
    message = refusal(caltech101.main, arguments(out, [archive], "--val-fraction=0.2"), capsys)
    assert message.startswith("--val-fraction would change nothing: the split is a cut by the rule of CoOp")
    assert message.count("\n") == 1
    split = jsoned(tmp_path / "split.json", split_rows(dict.fromkeys(numbered("Faces", 6), (0, "Faces"))))
    given = arguments(out, [archive], "--split", split, "--seed=0", "--val-fraction=0.1")
    assert refusal(caltech101.main, given, capsys).startswith("--seed and --val-fraction would change nothing")


def test_wrong_numbers_are_refused_together(tmp_path: Path, capsys: Capture):
    archive, _ = caltech(tmp_path)
    message = refusal(caltech101.main, arguments(tmp_path / "out", [archive], "--seed=-1", "--val-fraction=1"), capsys)
    assert message.splitlines() == [
        "--seed -1 is not allowed; give an integer of at least 0",
        "--val-fraction 1.0 is not allowed; give a number above 0 and below 1",
    ]


def test_a_split_of_another_data_set_is_refused(tmp_path: Path, capsys: Capture):
    archive, _ = caltech(tmp_path)
    split = jsoned(tmp_path / "split.json", split_rows(dict.fromkeys(numbered("dog", 9), (0, "dog"))))
    message = refusal(caltech101.main, arguments(tmp_path / "out", [archive], "--split", split), capsys)
    assert message.startswith("9 of 9 images that --split ")
    assert "dog/image_0001.jpg" in message
    assert "and 4 more" in message


def test_a_missing_archive_an_existing_folder_and_a_bad_archive_are_refused(tmp_path: Path, capsys: Capture):
    archive, _ = caltech(tmp_path)
    missing = refusal(caltech101.main, arguments(tmp_path / "out", [tmp_path / "none.zip"]), capsys)
    assert "none.zip; give the files that you downloaded from https://data.caltech.edu" in missing
    (tmp_path / "mine").mkdir()
    assert "exists; give the name" in refusal(caltech101.main, arguments(tmp_path / "mine", [archive]), capsys)
    evil = tar_gz(tmp_path / "evil.tar.gz", {"../evil.jpg": b"evil"})
    assert "'../evil.jpg' has a path with" in refusal(caltech101.main, arguments(tmp_path / "out", [evil]), capsys)
    assert not (tmp_path.parent / "evil.jpg").exists()
    other = zipped(tmp_path / "other.zip", {"x/a/1.jpg": b"x"})
    message = refusal(caltech101.main, arguments(tmp_path / "out", [other]), capsys)
    assert message.startswith("files of 1 archives are missing: caltech-101.zip (101_ObjectCategories)")


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path, capsys: Capture):
    archive, _ = caltech(tmp_path)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        caltech101.main(arguments(tmp_path / "file" / "out", [archive]))
    assert stopped.value.code == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_script_that_is_killed_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive, _ = caltech(tmp_path)
    before, out = sorted(tmp_path.iterdir()), tmp_path / "out"
    whole, copied = archives.Member.read, []

    def read_until_killed(self: archives.Member) -> bytes:
        assert not out.exists()
        copied.append(self.path)
        if len(copied) == 30:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(archives.Member, "read", read_until_killed)
    with pytest.raises(KeyboardInterrupt):
        caltech101.main(arguments(out, [archive]))
    assert len(copied) == 30
    assert sorted(tmp_path.iterdir()) == before


# EuroSAT


@pytest.mark.parametrize(("file", "top"), [("EuroSAT_RGB.zip", "EuroSAT_RGB"), ("EuroSAT.zip", "2750")])
def test_eurosat_has_the_class_names_of_coop(tmp_path: Path, file: str, top: str):
    files = pictures(
        [path for folder in eurosat.NAMES for path in numbered(f"{top}/{folder}", 4, f"{folder}_{{}}.jpg")]
    )
    out = tmp_path / "out"
    eurosat.main(arguments(out, [zipped(tmp_path / file, files | {f"{top}/notes.txt": b"x"})]))
    names = (
        *("Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings"),
        *("Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake"),
    )
    check(out, files, eurosat, names, {"train": 20, "val": 10, "test": 10})
    assert provenance(out)["left-out"] == {f"{top}/*.txt": 1}

    placed = {path.partition("/")[2]: (label, f"name {label}") for label, path in _labelled(files)}
    split = jsoned(tmp_path / "split_zhou_EuroSAT.json", split_rows(placed))
    eurosat.main(arguments(tmp_path / "coop", [tmp_path / file], "--split", split))
    coop = tuple(f"name {label}" for label in range(10))
    check(tmp_path / "coop", files, eurosat, coop, {"train": 20, "val": 10, "test": 10})


def _labelled(files: Files) -> list[tuple[int, str]]:
    """Each path with the number of its folder among all."""
    folders = sorted({path.split("/")[-2] for path in files})
    return [(folders.index(path.split("/")[-2]), path) for path in files]


def test_an_incomplete_eurosat_names_the_missing_classes(tmp_path: Path, capsys: Capture):
    archive = zipped(tmp_path / "x.zip", pictures([f"2750/{folder}/1.jpg" for folder in list(eurosat.NAMES)[:8]]))
    message = refusal(eurosat.main, arguments(tmp_path / "out", [archive]), capsys)
    assert "EuroSAT_RGB.zip (River, SeaLake)" in message


# Oxford-IIIT Pets

BREEDS = ("Abyssinian", "american_bulldog", "Bengal")


def pets(tmp_path: Path) -> tuple[Path, Path, Files]:
    files = pictures([path for breed in BREEDS for path in numbered("images", 30, f"{breed}_{{}}.jpg")])
    lists = {"trainval": range(1, 21), "test": range(21, 31)}
    annotations = {
        f"annotations/{name}.txt": "".join(
            f"{breed}_{number} {label} 1 1\n" for label, breed in enumerate(BREEDS, 1) for number in numbers
        ).encode()
        for name, numbers in lists.items()
    } | {"annotations/._trainval.txt": b"mac", "annotations/trimaps/Bengal_1.png": b"trimap"}
    images = files | {"images/Abyssinian_1.mat": b"matlab"}
    return tar_gz(tmp_path / "images.tar.gz", images), tar_gz(tmp_path / "annotations.tar.gz", annotations), files


def test_pets_follow_the_owners_lists(tmp_path: Path):
    images, annotations, files = pets(tmp_path)
    out = tmp_path / "out"
    oxford_pets.main(arguments(out, [images, annotations]))
    names = ("abyssinian", "american bulldog", "bengal")
    # Of 20 of each class in trainval, 10 % are val.
    placed = check(out, files, oxford_pets, names, {"train": 54, "val": 6, "test": 30})
    for source, one in placed.items():
        breed, number = source.removeprefix("images/").removesuffix(".jpg").rsplit("_", 1)
        assert (one.split == "test") == (int(number) > 20)
        assert one.folder == breed.lower()
    document = provenance(out)
    assert (document["seed"], document["val-fraction"]) == (0, 0.1)
    assert [file["file"] for file in document["archives"]] == ["images.tar.gz", "annotations.tar.gz"]
    assert document["left-out"] == {
        "annotations/._*": 1,
        "annotations/trimaps/*.png": 1,
        "images/*.mat": 1,
    }
    oxford_pets.main(arguments(tmp_path / "more", [annotations, images], "--val-fraction=0.25", "--seed=3"))
    check(tmp_path / "more", files, oxford_pets, names, {"train": 45, "val": 15, "test": 30})
    assert provenance(tmp_path / "more")["val-fraction"] == 0.25


def test_pets_by_the_split_file_of_coop_need_the_images_only(tmp_path: Path):
    images, _, files = pets(tmp_path)
    names = {breed: (label, breed.lower()) for label, breed in enumerate(BREEDS)}
    placed = {path.removeprefix("images/"): names[path[7:].rsplit("_", 1)[0]] for path in files}
    split = jsoned(tmp_path / "split_zhou_OxfordPets.json", split_rows(placed))
    out = tmp_path / "out"
    oxford_pets.main(arguments(out, [images], "--split", split))
    check(out, files, oxford_pets, ("abyssinian", "american bulldog", "bengal"), dict.fromkeys(SPLITS, 30))
    assert {path.name for path in (out / "train").iterdir()} == {"abyssinian", "american_bulldog", "bengal"}


def test_missing_pets_are_named_together(tmp_path: Path, capsys: Capture):
    images, annotations, files = pets(tmp_path)
    message = refusal(oxford_pets.main, arguments(tmp_path / "out", [images]), capsys)
    assert "annotations.tar.gz (annotations/trainval.txt, annotations/test.txt)" in message
    fewer = {path: content for path, content in files.items() if "Bengal" not in path}
    message = refusal(oxford_pets.main, arguments(tmp_path / "out", [tar_gz(images, fewer), annotations]), capsys)
    assert "30 of 90 images" in message
    assert "images/Bengal_1.jpg" in message
    assert "and 25 more" in message
    wrong = {"annotations/trainval.txt": b"Bengal_1 1\n", "annotations/test.txt": b"Bengal 1 1 1\n"}
    message = refusal(oxford_pets.main, arguments(tmp_path / "out", [images, tar_gz(annotations, wrong)]), capsys)
    assert message.startswith("2 lines of the owners' lists are wrong: annotations/trainval.txt: 'Bengal_1 1', ")


# Oxford Flowers-102

FLOWERS = {"1": "pink primrose", "2": "colt's foot ", "3": "globe-flower"}


def flowers(tmp_path: Path) -> tuple[list[Path], Path, Files]:
    """12 images; their classes are 3, 1, 2, 3, 1, 2, … and each set has 1 or 2 of each class."""
    files = pictures([f"jpg/image_{number:05}.jpg" for number in range(1, 13)])
    labels = mat(tmp_path / "imagelabels.mat", labels=[3, 1, 2] * 4)
    sets = mat(tmp_path / "setid.mat", trnid=[4, 5, 6], valid=[1, 2, 3], tstid=list(range(7, 13)))
    names = jsoned(tmp_path / "cat_to_name.json", FLOWERS | {"4": "rose"})
    return [tar_gz(tmp_path / "102flowers.tgz", files), labels, sets], names, files


def test_flowers_follow_the_owners_sets(tmp_path: Path):
    given, names, files = flowers(tmp_path)
    out = tmp_path / "out"
    oxford_flowers.main(arguments(out, given, "--names", names))
    # The classes keep the owners' order, which is not that of their names.
    placed = check(
        out, files, oxford_flowers, ("pink primrose", "colt's foot", "globe-flower"), {"train": 3, "val": 3, "test": 6}
    )
    assert placed["jpg/image_00001.jpg"] == Made("val", "", "003_globe-flower", "image_00001.jpg")
    assert placed["jpg/image_00005.jpg"] == Made("train", "", "001_pink_primrose", "image_00005.jpg")
    assert placed["jpg/image_00012.jpg"] == Made("test", "", "002_colt_s_foot", "image_00012.jpg")
    document = provenance(out)
    assert document["split"] == "the split of the owners: setid.mat"
    assert [file["file"] for file in document["other-files"]] == ["cat_to_name.json"]
    assert document["left-out"] == {}


def test_flowers_by_the_split_file_of_coop_need_the_images_only(tmp_path: Path, capsys: Capture):
    given, names, files = flowers(tmp_path)
    of = {number: (label, FLOWERS[str(label + 1)]) for number, label in enumerate([2, 0, 1] * 4, 1)}
    placed = {f"image_{number:05}.jpg": of[number] for number in of}
    split = jsoned(tmp_path / "split_zhou_OxfordFlowers.json", split_rows(placed))
    out = tmp_path / "out"
    oxford_flowers.main(arguments(out, given[:1], "--split", split))
    names_of = ("pink primrose", "colt's foot", "globe-flower")
    check(out, files, oxford_flowers, names_of, {"train": 6, "val": 3, "test": 3})
    assert sorted(path.name for path in (out / "val").iterdir())[0] == "001_pink_primrose"
    both = arguments(tmp_path / "more", given, "--split", split, "--names", names)
    assert "--split has the names" in refusal(oxford_flowers.main, both, capsys)


def test_flowers_without_names_or_with_wrong_files_are_refused(tmp_path: Path, capsys: Capture):
    given, names, _ = flowers(tmp_path)
    out = tmp_path / "out"
    assert "--names is missing" in refusal(oxford_flowers.main, arguments(out, given), capsys)
    message = refusal(oxford_flowers.main, arguments(out, given[:1], "--names", names), capsys)
    assert "files of 2 archives are missing: imagelabels.mat (imagelabels.mat), setid.mat (setid.mat)" in message
    jsoned(names, {"1": "pink primrose", "3": 5})
    message = refusal(oxford_flowers.main, arguments(out, given, "--names", names), capsys)
    assert "has no text for 2 of 3 classes: 2, 3" in message
    jsoned(names, FLOWERS)
    mat(given[2], trnid=[4, 5, 6], valid=[1, 2, 99], tstid=[100])
    message = refusal(oxford_flowers.main, arguments(out, given, "--names", names), capsys)
    assert "setid.mat names 2 images without a label: 100, 99" in message
    mat(given[2], trnid=[4], tstid=[5])
    assert "no list of numbers valid" in refusal(oxford_flowers.main, arguments(out, given, "--names", names), capsys)
    given[1].write_bytes(given[1].read_bytes()[:150])
    assert "no list of numbers labels" in refusal(oxford_flowers.main, arguments(out, given, "--names", names), capsys)


# Food-101


@pytest.mark.parametrize("ending", ["json", "txt"])
def test_food_follows_the_owners_lists(tmp_path: Path, ending: str):
    folders = ("apple_pie", "waffles")
    files = pictures([path for folder in folders for path in numbered(f"food-101/images/{folder}", 12, "{}.jpg")])
    meta: Files = {"food-101/README.txt": b"x"}
    for split, numbers in {"train": range(1, 9), "test": range(9, 13)}.items():
        listed = {folder: [f"{folder}/{number}" for number in numbers] for folder in folders}
        lines = "\n".join(line for images in listed.values() for line in images)
        meta[f"food-101/meta/{split}.{ending}"] = (json.dumps(listed) if ending == "json" else lines).encode()
    archive = tar_gz(tmp_path / "food-101.tar.gz", files | meta)
    out = tmp_path / "out"
    food101.main(arguments(out, [archive]))
    # Of 8 in train, 10 % are one.
    placed = check(out, files, food101, ("apple pie", "waffles"), {"train": 14, "val": 2, "test": 8})
    for source, one in placed.items():
        assert (one.split == "test") == (int(Path(source).stem) > 8)
    assert provenance(out)["left-out"] == {"food-101/*.txt": 1}

    split = jsoned(
        tmp_path / "split_zhou_Food101.json",
        split_rows({path.removeprefix("food-101/images/"): (0, path.split("/")[-2]) for path in files}),
    )
    food101.main(arguments(tmp_path / "coop", [archive], "--split", split))
    check(tmp_path / "coop", files, food101, ("apple pie", "waffles"), dict.fromkeys(SPLITS, 8))


def test_wrong_lists_of_food_are_refused(tmp_path: Path, capsys: Capture):
    images = pictures(["food-101/images/a/1.jpg"])
    for content, words in (
        (b"[]", "is not a JSON object"),
        (b"{", "is not a JSON object"),
        (b'{"a": ["1", "a/b/1"]}', "2 lines of the owners' lists are wrong: train: '1', train: 'a/b/1'"),
    ):
        lists = {"food-101/meta/train.json": content, "food-101/meta/test.json": b"{}"}
        archive = tar_gz(tmp_path / "food-101.tar.gz", images | lists)
        assert words in refusal(food101.main, arguments(tmp_path / "out", [archive]), capsys)


# DTD


def textures() -> tuple[Files, Files]:
    folders = ("banded", "polka-dotted")
    images = pictures([path for f in folders for path in numbered(f"dtd/images/{f}", 6, f"{f}_{{:04}}.jpg")])
    labels = {
        f"dtd/labels/{split}{fold}.txt": "".join(
            f"{f}/{f}_{number:04}.jpg\n" for f in folders for number in range(first, first + 2)
        ).encode()
        for fold, order in ((1, (1, 3, 5)), (2, (5, 3, 1)))
        for split, first in zip(SPLITS, order, strict=True)
    }
    return images, labels


@pytest.mark.parametrize("form", ["tar.gz", "folder", "inner folder"])
def test_dtd_follows_the_first_split_of_the_owners(tmp_path: Path, form: str):
    images, labels = textures()
    if form == "tar.gz":
        given = tar_gz(tmp_path / "dtd-r1.0.1.tar.gz", images | labels)
    else:
        given = unpacked(tmp_path / "unpacked", images | labels) / ("dtd" if form == "inner folder" else "")
    out = tmp_path / "out"
    dtd.main(arguments(out, [given]))
    placed = check(out, images, dtd, ("banded", "polka-dotted"), dict.fromkeys(SPLITS, 4))
    for source, one in placed.items():
        assert one.split == SPLITS[(int(source[-5]) - 1) // 2]
    document = provenance(out)
    assert sum(document["left-out"].values()) == 3
    if form != "tar.gz":
        (identity,) = document["archives"]
        assert (identity["folder"], identity["files"]) == (given.name, 18)
        content = tree(given)
        assert identity["bytes"] == sum(map(len, content.values()))
        listed = "".join(f"{hashlib.sha256(content[path]).hexdigest()}  {path}\n" for path in content)
        assert identity["sha256"] == hashlib.sha256(listed.encode()).hexdigest()


def test_dtd_by_the_split_file_of_coop(tmp_path: Path):
    images, _ = textures()
    split = jsoned(
        tmp_path / "split_zhou_DescribableTextures.json",
        split_rows({path.removeprefix("dtd/images/"): (0, path.split("/")[-2]) for path in images}),
    )
    out = tmp_path / "out"
    dtd.main(arguments(out, [tar_gz(tmp_path / "dtd.tar", images, "w")], "--split", split))
    check(out, images, dtd, ("banded", "polka-dotted"), dict.fromkeys(SPLITS, 4))


def test_an_image_in_two_lists_and_a_wrong_line_are_refused(tmp_path: Path, capsys: Capture):
    images, labels = textures()
    out = tmp_path / "out"
    twice = labels | {"dtd/labels/val1.txt": labels["dtd/labels/train1.txt"]}
    message = refusal(dtd.main, arguments(out, [tar_gz(tmp_path / "dtd.tar", images | twice, "w")]), capsys)
    assert message.startswith("4 images are in a split twice or in two splits: dtd/images/banded/banded_0001.jpg, ")
    wrong = labels | {"dtd/labels/val1.txt": b"banded\n"}
    message = refusal(dtd.main, arguments(out, [tar_gz(tmp_path / "dtd.tar", images | wrong, "w")]), capsys)
    assert "1 lines of the owners' lists are wrong: labels/val1.txt: 'banded'" in message


# CIFAR-100


def cifar_file(rows: int, first: int) -> bytes:
    pixels = np.random.default_rng(first).integers(0, 256, (rows, 3072), dtype=np.uint8)
    labels = [row % 3 for row in range(rows)]
    return python2_pickle({b"data": pixels, b"fine_labels": labels, b"coarse_labels": labels, b"batch_label": b"x"})


def cifar(tmp_path: Path, **changes: bytes) -> Path:
    # A class of CIFAR-100 is called train, as a split is.
    meta = {b"fine_label_names": [b"aquarium_fish", b"maple_tree", b"train"], b"coarse_label_names": [b"fish"]}
    files = {
        "train": cifar_file(30, 1),
        "test": cifar_file(6, 2),
        "meta": python2_pickle(meta),
        "file.txt~": b"",
    } | changes
    return tar_gz(tmp_path / "cifar-100-python.tar.gz", {f"cifar-100-python/{name}": files[name] for name in files})


def test_cifar_is_written_as_png_files(tmp_path: Path):
    out = tmp_path / "out"
    cifar100.main(arguments(out, [cifar(tmp_path)]))
    splits, names, template = read(out)
    assert names == ("aquarium fish", "maple tree", "train")
    assert template == "a photo of a {}."
    # 10 of each class, of which 10 % are val.
    assert {name: len(split) for name, split in splits.items()} == {"train": 27, "val": 3, "test": 6}
    folders = ("aquarium_fish", "maple_tree", "train")
    for first, rows, ours in ((1, 30, ("train", "val")), (2, 6, ("test",))):
        pixels = np.random.default_rng(first).integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
        for row in range(rows):
            (file,) = [file for split in ours for file in (out / split).rglob(f"{row:05}.png")]
            assert file.parent.name == folders[row % 3]
            with Image.open(file) as image:
                assert np.array_equal(np.asarray(image), pixels[row].transpose(1, 2, 0))
    assert provenance(out)["counts"] == {"train": 27, "val": 3, "test": 6}
    assert provenance(out)["left-out"] == {"cifar-100-python/*.txt~": 1}


def test_a_harmful_pickle_of_cifar_does_not_run(tmp_path: Path, capsys: Capture):
    marker = tmp_path / "ran"
    # Protocol 0: builtins.open(marker, "w").
    harmful = f"cbuiltins\nopen\n(S'{marker}'\nS'w'\ntR.".encode()
    for name in ("train", "meta"):
        message = refusal(cifar100.main, arguments(tmp_path / "out", [cifar(tmp_path, **{name: harmful})]), capsys)
        assert message.startswith(f"cifar-100-python/{name} is refused: it names ")
        assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "document", "words"),
    [
        ("meta", {b"label_names": [b"a"]}, "meta does not have a list of texts fine_label_names"),
        ("meta", {b"fine_label_names": [b"..", b"a"]}, "meta does not have a list of texts fine_label_names"),
        ("meta", [], "meta does not have a list of texts fine_label_names"),
        ("train", {b"data": [1], b"fine_labels": [0]}, "train does not have an array data of shape (images, 3072)"),
        ("train", {b"data": np.zeros((2, 12), np.uint8), b"fine_labels": [0, 0]}, "shape (images, 3072)"),
        ("train", {b"data": np.zeros((2, 3072)), b"fine_labels": [0, 0]}, "bytes of pixels"),
        (
            "test",
            {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]},
            "test does not have a list fine_labels",
        ),
        ("test", {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 3]}, "of 2 integers from 0 to 2"),
    ],
)
def test_other_content_of_cifar_is_refused(tmp_path: Path, capsys: Capture, name: str, document: object, words: str):
    archive = cifar(tmp_path, **{name: python2_pickle(document)})
    assert words in refusal(cifar100.main, arguments(tmp_path / "out", [archive]), capsys)


# DomainNet


def domain_net(tmp_path: Path) -> tuple[list[Path], Files]:
    """Two of the domains: sketch lacks a class."""
    files: Files = {}
    given = []
    for domain, folders in {"clipart": ("The_Eiffel_Tower", "train"), "sketch": ("train",)}.items():
        paths = [p for f in folders for p in numbered(f"{domain}/{f}", 8, f"{domain}_{f}_{{:06}}.jpg")]
        images = pictures(paths, len(files))
        files |= images
        given.append(zipped(tmp_path / f"{domain}.zip", images))
        for split, part in (("train", paths[::2]), ("test", paths[1::2])):
            file = tmp_path / f"{domain}_{split}.txt"
            file.write_text("".join(f"{path} {folders.index(path.split('/')[1])}\n" for path in part))
            given.append(file)
    return given, files


TWO = ("--domain=sketch", "--domain=clipart")


def test_domainnet_follows_the_owners_lists_in_each_domain(tmp_path: Path, capsys: Capture):
    given, files = domain_net(tmp_path)
    out = tmp_path / "out"
    domainnet.main(arguments(out, given, *TWO))
    # 3 cells of 4 train images: one of each is val.
    placed = check(out, files, domainnet, ("The Eiffel Tower", "train"), {"train": 9, "val": 3, "test": 12})
    for source, one in placed.items():
        assert (one.domain, one.folder, one.file) == tuple(source.split("/"))
        assert (one.split == "test") == (int(source[-5]) % 2 == 0)
    splits, _, _ = read(out, by_domain=True)
    for split in splits.values():
        assert split.domain_names == ("clipart", "sketch")
        assert split.domains is not None
        # The first class lies in the first domain only.
        assert {*zip(split.domains.tolist(), split.labels.tolist(), strict=True)} == {(0, 0), (0, 1), (1, 1)}
    assert provenance(out)["domains"] == ["clipart", "sketch"]
    assert 'data.partition = "by-domain"' in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sub-folders"):
        read(out)


def test_all_missing_files_of_domainnet_are_named_together(tmp_path: Path, capsys: Capture):
    given, _ = domain_net(tmp_path)
    out = tmp_path / "out"
    assert len(domainnet.ARCHIVES) == 18
    message = refusal(domainnet.main, arguments(out, given), capsys)
    assert "files of 12 archives are missing: infograph.zip (infograph), painting.zip (painting), " in message
    assert "sketch_test" not in message.partition("Given are")[0]
    message = refusal(domainnet.main, arguments(out, given[1:], *TWO), capsys)
    assert "files of 1 archives are missing: clipart.zip (clipart)" in message
    zipped(given[0], pictures(["clipart/train/other.jpg"]))
    message = refusal(domainnet.main, arguments(out, given, *TWO), capsys)
    assert message.startswith("16 of 24 images that clipart_train.txt, clipart_test.txt, sketch_train.txt, ")


def test_wrong_lines_of_domainnet_are_refused(tmp_path: Path, capsys: Capture):
    given, _ = domain_net(tmp_path)
    given[1].write_text("sketch/train/1.jpg 0\nclipart/train/1.jpg\nclipart/1.jpg 0\nclipart/train/1.jpg zero\n")
    message = refusal(domainnet.main, arguments(tmp_path / "out", given, *TWO), capsys)
    assert message.startswith("4 lines of the owners' lists are wrong: clipart_train.txt: 'sketch/train/1.jpg 0', ")


# Office-Home


def test_office_home_is_cut_in_each_class_of_each_domain(tmp_path: Path):
    top = "OfficeHomeDataset_10072016"
    files = pictures(
        [
            path
            for domain in office_home.DOMAINS
            for folder in ("Alarm_Clock", "ToothBrush")
            for path in numbered(f"{top}/{domain}/{folder}", 5, "{:05}.jpg")
        ]
    )
    more = {f"{top}/ImageInfo.csv": b"x", f"{top}/Art/Thumbs.db": b"x"}
    out = tmp_path / "out"
    office_home.main(arguments(out, [zipped(tmp_path / "OfficeHomeDataset_10072016.zip", files | more)]))
    # 8 cells of 5 images: 2 train (50 %, rounded to even), 1 val, 2 test.
    placed = check(out, files, office_home, ("Alarm Clock", "ToothBrush"), {"train": 16, "val": 8, "test": 16})
    for source, one in placed.items():
        assert (top, one.domain, one.folder, one.file) == tuple(source.split("/"))
    splits, _, _ = read(out, by_domain=True)
    assert all(split.domain_names == office_home.DOMAINS for split in splits.values())
    document = provenance(out)
    assert document["domains"] == ["Art", "Clipart", "Product", "Real World"]
    assert document["left-out"] == {f"{top}/*.csv": 1, f"{top}/Art/*.db": 1}
    with pytest.raises(ConfigError, match="sub-folders"):
        read(out)


def test_an_office_home_without_a_domain_is_refused(tmp_path: Path, capsys: Capture):
    archive = zipped(tmp_path / "x.zip", pictures([f"x/{domain}/a/1.jpg" for domain in office_home.DOMAINS[:3]]))
    message = refusal(office_home.main, arguments(tmp_path / "out", [archive]), capsys)
    assert "OfficeHomeDataset_10072016.zip (Real World)" in message


@pytest.mark.parametrize("script", [office_home, domainnet, cifar100])
def test_scripts_without_a_split_file_of_coop_do_not_have_the_option(
    script: ModuleType, tmp_path: Path, capsys: Capture
):
    main: Callable[[list[str]], None] = script.main
    assert "--split" in refusal(main, arguments(tmp_path / "out", [tmp_path], "--split=x"), capsys)

"""Archives are read by the paths of their files, and dangerous, damaged or missing ones are refused."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from fl_dualpriv.errors import ConfigError
from tests.tools.data.made import tar_gz, unpacked, zipped
from tools.data.archives import Archives

FILES = {"top/images/a/1.jpg": b"one", "top/images/b/2.png": b"two", "top/lists/all.txt": b"1\n2\n"}


def opened(tmp_path: Path, *given: Path, nested: tuple[str, ...] = ()) -> Archives:
    return Archives(given, tmp_path, "https://example.org", nested)


def fault(tmp_path: Path, *given: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, *given)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "folder"])
def test_all_kinds_of_archives_have_the_same_files(tmp_path: Path, kind: str):
    path = tmp_path / f"data.{kind}"
    if kind == "zip":
        zipped(path, FILES)
    elif kind == "folder":
        path = unpacked(tmp_path, FILES) / "top"
    else:
        tar_gz(path, FILES, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind])
    with opened(tmp_path, path) as archives:
        assert {name: member.read() for name, member in archives.members.items()} == FILES
        assert archives.locate({"data": ("images", "lists/all.txt")}) == ["top/"]
        assert {name: [m.name for m in found] for name, found in archives.classes("top/images/").items()} == {
            "a": ["1.jpg"],
            "b": ["2.png"],
        }
        assert archives.text("top/lists/all.txt") == "1\n2\n"
        assert archives.left_out({"top/images/a/1.jpg"}) == {"top/images/b/*.png": 1}


def test_the_order_of_the_places_is_that_of_the_archive(tmp_path: Path):
    names = ["z/9.jpg", "a/1.jpg", "m/5.jpg"]
    with opened(tmp_path, tar_gz(tmp_path / "x.tar.gz", {name: name.encode() for name in names})) as archives:
        assert [m.path for m in sorted(archives.members.values(), key=lambda m: m.place)] == names


def test_a_path_may_begin_with_a_dot(tmp_path: Path):
    with opened(tmp_path, tar_gz(tmp_path / "x.tar.gz", {"./images/a/1.jpg": b"1"})) as archives:
        assert archives.members["images/a/1.jpg"].read() == b"1"


def test_a_single_file_is_a_member(tmp_path: Path):
    (tmp_path / "setid.mat").write_bytes(b"MATLAB" * 100)
    with opened(tmp_path, tmp_path / "setid.mat") as archives:
        assert archives.read("setid.mat") == b"MATLAB" * 100


@pytest.mark.parametrize("outer", ["zip", "folder"])
def test_a_nested_archive_is_opened(tmp_path: Path, outer: str):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inner = tar_gz(tmp_path / "inner.tar.gz", {"inner/a/1.jpg": b"one"}).read_bytes()
    files = {"data/inner.tar.gz": inner, "data/other.tar": b"not opened"}
    path = zipped(tmp_path / "data.zip", files) if outer == "zip" else unpacked(tmp_path / "given", files) / "data"
    with Archives([path], scratch, "page", nested=("inner.tar.gz",)) as archives:
        assert set(archives.members) == {"data/inner/a/1.jpg", "data/other.tar"}
        assert archives.members["data/inner/a/1.jpg"].read() == b"one"


def test_a_hidden_name_of_the_given_folder_hides_nothing(tmp_path: Path):
    with opened(tmp_path, unpacked(tmp_path / ".cache", {"images/a/1.jpg": b"1"})) as archives:
        assert set(archives.members) == {"cache/images/a/1.jpg"}


def test_a_nested_archive_beside_its_files_is_left_out(tmp_path: Path):
    inner = tar_gz(tmp_path / "inner.tar.gz", {"inner/a/1.jpg": b"one"}).read_bytes()
    folder = unpacked(tmp_path / "data", {"inner.tar.gz": inner, "inner/a/1.jpg": b"one"})
    with opened(tmp_path, folder, nested=("inner.tar.gz",)) as archives:
        assert archives.left_out({"data/inner/a/1.jpg"}) == {"data/*.gz": 1}


def test_hidden_files_are_counted_and_not_read(tmp_path: Path):
    names = ["a/._1.jpg", "a/._2.jpg", "__MACOSX/a/1.jpg", ".git/x.jpg", "a/.DS_Store", "a/1.jpg"]
    with opened(tmp_path, tar_gz(tmp_path / "x.tar", dict.fromkeys(names, b"x"), "w")) as archives:
        assert set(archives.members) == {"a/1.jpg"}
        assert archives.left_out({"a/1.jpg"}) == {
            "a/._*": 2,
            "__MACOSX/a/*.jpg": 1,
            ".git/*.jpg": 1,
            "a/.DS_Store": 1,
        }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.jpg", 'has a path with ".."'),
        ("a/../../evil.jpg", 'has a path with ".."'),
        ("/etc/evil.jpg", "has an absolute path"),
        ("C:/evil.jpg", "has an absolute path"),
        ("a\\..\\evil.jpg", "backslash"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_outside_the_archive_is_refused(tmp_path: Path, name: str, reason: str, kind: str):
    files = {name: b"evil", "a/1.jpg": b"good"}
    path = zipped(tmp_path / "x.zip", files) if kind == "zip" else tar_gz(tmp_path / "x.tar", files, "w")
    message = fault(tmp_path, path)
    assert reason in message
    assert "1 members of the archives are refused" in message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a/1.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    message = fault(tmp_path, tmp_path / "x.tar")
    assert "'a/1.jpg' is a " + ("link" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "device") in message


def test_links_in_a_zip_and_in_a_folder_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("a/1.jpg")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    folder = unpacked(tmp_path / "data", {"a/1.jpg": b"1"})
    (folder / "b").symlink_to(folder / "a")
    message = fault(tmp_path, tmp_path / "x.zip", folder)
    assert "2 members of the archives are refused" in message
    assert "x.zip: 'a/1.jpg' is a link" in message
    assert "data: 'data/b' is a link" in message


def test_all_missing_archives_are_named_together(tmp_path: Path):
    given = [tmp_path / "1.zip", zipped(tmp_path / "2.zip", FILES), tmp_path / "3.zip"]
    message = fault(tmp_path, *given)
    assert "names 2 of 3 that do not exist" in message
    assert str(given[0]) in message
    assert str(given[2]) in message
    assert str(given[1]) not in message


def test_all_damaged_archives_are_named_together(tmp_path: Path):
    noise = bytes(range(256)) * 40
    whole = tar_gz(tmp_path / "whole.tar.gz", {"a/1.jpg": noise, "a/2.jpg": noise[::-1]}).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.zip").write_bytes(b"")
    message = fault(tmp_path, tmp_path / "cut.tar.gz", tmp_path / "empty.zip", tmp_path / "whole.tar.gz")
    assert "2 archives cannot be read" in message
    assert "cut.tar.gz" in message
    assert "empty.zip" in message
    assert "whole" not in message


def test_a_damaged_member_is_named(tmp_path: Path):
    content = bytearray(zipped(tmp_path / "x.zip", {"a/1.jpg": bytes(1000)}).read_bytes())
    content[40] ^= 0xFF  # in the compressed bytes, behind 30 bytes of header and 7 of name
    (tmp_path / "x.zip").write_bytes(content)
    with opened(tmp_path, tmp_path / "x.zip") as archives, pytest.raises(ConfigError, match=r"x\.zip: a/1\.jpg cannot"):
        archives.members["a/1.jpg"].read()


def test_a_file_that_is_there_twice_is_refused(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/1.jpg", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.jpg", b"2")
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    assert "1 files are there twice: a/1.jpg (x.zip and x.zip)" in fault(tmp_path, tmp_path / "x.zip")


def test_all_archives_whose_files_are_missing_are_named_together(tmp_path: Path):
    with opened(tmp_path, zipped(tmp_path / "x.zip", FILES)) as archives, pytest.raises(ConfigError) as caught:
        archives.locate({"a.zip": ("images",), "b.zip": ("other", "images"), "c.txt": ("c.txt",)})
    message = str(caught.value)
    assert "files of 2 archives are missing: b.zip (other), c.txt (c.txt)" in message
    assert "Given are x.zip" in message
    assert "https://example.org" in message


def test_files_in_several_folders_are_refused(tmp_path: Path):
    both = {"one/images/a/1.jpg": b"1", "two/images/a/1.jpg": b"2"}
    with opened(tmp_path, zipped(tmp_path / "x.zip", both)) as archives:
        with pytest.raises(ConfigError, match=r"x.zip \(one/, two/\)"):
            archives.locate({"x.zip": ("images",)})
        # A name that ends like the wanted one is another name.
        with pytest.raises(ConfigError, match="missing"):
            archives.locate({"x.zip": ("mages",)})


def test_a_list_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    with opened(tmp_path, zipped(tmp_path / "x.zip", {"a.txt": b"\xff\xfe\xfa"})) as archives:
        with pytest.raises(ConfigError, match="not a UTF-8 text"):
            archives.text("a.txt")
        with pytest.raises(ConfigError, match=r"b.txt is in none of x.zip"):
            archives.text("b.txt")

"""Archives that anybody may have made: nothing outside of the folder, no links, no bombs, and all that is wrong at once."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
from fetch_world import zipped

from pipelines.fetching.unpack import Limits, unpack, unpacked_bytes
from ris_core.errors import DataError

LIMITS = Limits(files=20, total=1_000_000, each=600_000)


def entry(name: str, mode: int = 0, **more: object) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.create_system = 3
    made.external_attr = mode << 16
    made.compress_type = zipfile.ZIP_DEFLATED
    for key, value in more.items():
        setattr(made, key, value)
    return made


def archive(folder: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    path = folder / "archive.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        warnings.simplefilter("ignore")  # duplicate names
        for name, content in entries:
            made.writestr(name, content)
    return path


def unpacked(path: Path, folder: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    sizes: list[int] = []
    count = unpack(path, folder, limits, lambda name: name.endswith(".txt"), sizes.append)
    found = {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert (count, sum(sizes)) == (len(found), sum(map(len, found.values())))
    return found


def refused(path: Path, limits: Limits = LIMITS) -> str:
    """What is said of an archive of which nothing is unpacked, and nothing is left but itself."""
    before = sorted(path.parent.parent.rglob("*"))
    folder = path.parent / "to"
    folder.mkdir(exist_ok=True)
    with pytest.raises(DataError) as error:
        unpack(path, folder, limits, lambda name: True, lambda size: None)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    assert sorted(path.parent.parent.rglob("*")) == before
    return str(error.value)


def test_chosen_files_are_unpacked_flat(tmp_path: Path) -> None:
    path = archive(
        tmp_path,
        (entry("refcoco/", stat.S_IFDIR | 0o755), b""),
        ("refcoco/a.txt", b"a" * 1000),
        (entry("refcoco/deep/b.txt", stat.S_IFREG | 0o4777), b"b"),
        ("refcoco/.DS_Store", b"?"),
        ("é.txt", b""),
    )
    assert unpacked(path, tmp_path / "to") == {"a.txt": b"a" * 1000, "b.txt": b"b", "é.txt": b""}
    assert not (tmp_path / "to" / "b.txt").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)
    assert unpacked_bytes(path, LIMITS) == 1002


def test_what_is_there_with_its_size_stays(tmp_path: Path) -> None:
    path = archive(tmp_path, ("a.txt", b"aaaa"), ("b.txt", b"bbbb"))
    folder = tmp_path / "to"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"mine")
    (folder / "b.txt").write_bytes(b"cut")
    assert unpacked(path, folder) == {"a.txt": b"mine", "b.txt": b"bbbb"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a.txt", "leads out of its folder"),
        ("x/../../a.txt", "leads out of its folder"),
        ("..\\a.txt", "leads out of its folder"),
        ("/etc/a.txt", "is an absolute path"),
        ("C:/a.txt", "is an absolute path"),
        ("\\\\host\\a.txt", "is an absolute path"),
        ("a\n.txt", "has signs in its name that no file has"),
    ],
)
def test_names_that_lead_elsewhere(name: str, message: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert f"{name!r} {message}" in refused(archive(place, ("good.txt", b"good"), (name, b"bad")))


def test_a_name_with_a_zero_byte(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, ("aXtxt", b"bad"))
    path.write_bytes(path.read_bytes().replace(b"aXtxt", b"a\0txt"))
    assert "has signs in its name that no file has" in refused(path)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (stat.S_IFLNK, "is a link"),
        *((kind, "is a device, a pipe") for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)),
    ],
)
def test_what_is_no_file(mode: int, message: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert f"'a.txt' {message}" in refused(archive(place, (entry("a.txt", mode | 0o777), b"/etc/passwd")))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(
        place,
        ("../a.txt", b""),
        (entry("b.txt", stat.S_IFLNK), b"a"),
        ("c.txt", b"1"),
        ("c.txt", b"2"),
        ("D.txt", b"1"),
        ("d.txt", b"2"),
        ("large.txt", os.urandom(600_001)),
    )
    told = refused(path)
    assert "archive.zip is not unpacked (5 problems):" in told
    assert "'c.txt' is there 2 times" in told
    assert "'d.txt' is there 2 times" in told
    assert "'large.txt' would take 600,001 bytes, and 600,000 are allowed for a file" in told


def test_one_name_in_several_folders(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert "a.txt lies in several of its folders" in refused(archive(place, ("x/a.txt", b"1"), ("y/a.txt", b"2")))


def test_too_many_files_and_too_many_bytes(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, *((f"{number}.txt", b"") for number in range(21)))
    assert "has 21 entries, and 20 are allowed" in refused(path)
    path = archive(place, *((f"{number}.txt", os.urandom(400_000)) for number in range(3)))
    assert "its files would take 1,200,000 bytes, and 1,000,000 are allowed" in refused(path)


def test_a_bomb_that_says_what_it_is(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, ("bomb.txt", b"\0" * 50_000_000))
    assert path.stat().st_size < 60_000
    assert "'bomb.txt' would take 50,000,000 bytes" in refused(path)


def test_a_bomb_that_lies(tmp_path: Path) -> None:
    """50 MB that say they are 1000 bytes: no more are read, and their sum is wrong."""
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, ("bomb.txt", b"\0" * 50_000_000))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000)))
    assert "is damaged, or no zip archive (Bad CRC-32" in refused(path)


def test_a_bomb_of_parts_that_overlap(tmp_path: Path) -> None:
    """Two names for the same packed bytes, as David Fifield's bombs have thousands."""
    place = tmp_path / "place"
    place.mkdir()
    path = place / "archive.zip"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("aaaa.txt", b"\0" * 400_000)
        made.writestr("bbbb.txt", b"\0" * 400_000)
        second, first = made.infolist()[1].header_offset, made.infolist()[0].header_offset
    data = bytearray(content.getvalue())
    at = data.rfind(b"PK\x01\x02")
    assert struct.unpack_from("<I", data, at + 42) == (second,)
    struct.pack_into("<I", data, at + 42, first)
    path.write_bytes(data)
    told = refused_after_some(path)
    assert "is damaged, or no zip archive" in told


def refused_after_some(path: Path) -> str:
    with pytest.raises(DataError) as error:
        unpack(path, path.parent / "to", LIMITS, lambda name: True, lambda size: None)
    assert not (path.parent / "to" / "bbbb.txt").exists()
    return str(error.value)


def test_bytes_are_counted_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the list of the archive says: here it is believed to hold less."""
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, ("a.txt", os.urandom(500_000)), ("b.txt", os.urandom(500_000)))
    monkeypatch.setattr("pipelines.fetching.unpack.checked", lambda opened, *_: opened.infolist())
    with pytest.raises(DataError, match=r"stopped in 'b.txt': it takes more than the 200,000 bytes that are left"):
        unpack(path, place / "to", Limits(20, 700_000, 600_000), lambda name: True, lambda size: None)
    assert [each.name for each in (place / "to").iterdir()] == ["a.txt"]


def test_an_encrypted_archive(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, ("a.txt", b"secret"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "'a.txt' is encrypted" in refused(path)


def test_another_way_of_packing(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = archive(place, (entry("a.txt", compress_type=zipfile.ZIP_LZMA), b"a"))
    assert "'a.txt' is packed by method 14, which is not unpacked here" in refused(path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "none"])
def test_damaged_archives(damage: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = place / "archive.zip"
    content = bytearray(zipped({"a.txt": os.urandom(5000)}))
    if damage == "flipped":
        content[2000] ^= 255
    path.write_bytes({"cut": content[:3000], "flipped": content, "none": b"no archive"}[damage])
    assert "is damaged, or no zip archive" in refused(path)

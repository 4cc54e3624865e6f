"""What is written appears whole or not at all, whoever else writes it, and as readable as any other file."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ris_core import files


@pytest.fixture
def umask() -> Iterator[None]:
    """A usual one, whatever it is outside; put back afterwards."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Files


def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "here" / "model.safetensors"
    for content in (b"first", b"second"):
        with files.replaced_file(path) as temporary:
            assert (temporary.parent, temporary.suffix) == (path.parent, ".safetensors")
            before = path.read_bytes() if path.exists() else None
            temporary.write_bytes(content[:2])
            assert (path.read_bytes() if path.exists() else None) == before
            temporary.write_bytes(content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["model.safetensors"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_a_writer_that_raises_leaves_the_old_file_and_no_other(
    error: type[BaseException], there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    if there:
        path.write_text("old")

    def write() -> None:
        with files.replaced_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["scores.json"] if there else [])
    assert not there or path.read_text() == "old"


def test_a_writer_that_raises_before_it_wrote_anything(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("old")
    with pytest.raises(ValueError, match="nothing"), files.replaced_file(tmp_path / "scores.json"):
        raise ValueError("nothing")
    assert names(tmp_path) == ["scores.json"]


def test_what_cannot_be_moved_into_place_goes_away(tmp_path: Path) -> None:
    (tmp_path / "scores.json").mkdir()  # a folder is in the way
    with pytest.raises(OSError, match="directory"):
        files.write_text(tmp_path / "scores.json", "new")
    assert names(tmp_path) == ["scores.json"]


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    """One that was given up and still writes, and the one that took over; in one process and within each other."""
    path = tmp_path / "part.arrow"
    with files.replaced_file(path) as slow:
        slow.write_text("the slow one's, ")
        with files.replaced_file(path) as quick:
            assert quick != slow
            quick.write_text("the quick one's")
        assert path.read_text() == "the quick one's"
        with slow.open("a") as file:
            file.write("all of it")
    assert path.read_text() == "the slow one's, all of it"
    assert names(tmp_path) == ["part.arrow"]


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "state.json", [str(n) * 100_000 for n in range(8)]
    start, seen = threading.Barrier(len(texts)), []

    def write(text: str) -> None:
        start.wait()
        for _ in range(5):
            files.write_text(path, text)
            seen.append(path.read_text())

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40, "none of them failed"
    assert set(seen) <= set(texts)
    assert path.read_text() in texts
    assert names(tmp_path) == ["state.json"]


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """As DVC lays files out where its cache is linked: the cache must stay as it is."""
    (tmp_path / "cache").write_text("old")
    (tmp_path / "scores.json").symlink_to(tmp_path / "cache")
    files.write_text(tmp_path / "scores.json", "new")
    assert not (tmp_path / "scores.json").is_symlink()
    assert (tmp_path / "scores.json").read_text() == "new"
    assert (tmp_path / "cache").read_text() == "old"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_as_readable_as_any_other(mask: int, expected: int, umask: None, tmp_path: Path) -> None:
    os.umask(mask)
    (tmp_path / "usual").touch()
    files.write_json(tmp_path / "scores.json", {})
    files.write_csv(tmp_path / "scores.csv", [])
    with files.replaced_file(tmp_path / "other") as temporary:
        temporary.write_bytes(b"")
    assert {mode(tmp_path / name) for name in ("usual", "scores.json", "scores.csv", "other")} == {expected}


def test_texts_are_utf_8(tmp_path: Path) -> None:
    files.write_text(tmp_path / "page.html", "café ✓\n")
    assert (tmp_path / "page.html").read_bytes() == "café ✓\n".encode()


def test_json_keeps_its_order_and_ends_its_line(tmp_path: Path) -> None:
    content = {"b": 1, "a": [1.5, None, "é"]}
    files.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["b", "a"]
    assert json.loads(text) == content


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert (tmp_path / "x.json").read_text() == "1\n"
    assert names(tmp_path) == ["x.json"]


def test_tables_have_a_header_even_without_rows(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "x.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert (tmp_path / "x.csv").read_bytes() == b"epoch,loss\n1,0.5\n2,0.25\n"
    files.write_csv(tmp_path / "x.csv", [], ["epoch", "loss"])
    assert (tmp_path / "x.csv").read_bytes() == b"epoch,loss\n"
    with pytest.raises(ValueError, match="other"):
        files.write_csv(tmp_path / "x.csv", [{"epoch": 1}, {"epoch": 2, "other": 3}])
    assert (tmp_path / "x.csv").read_bytes() == b"epoch,loss\n"
    assert names(tmp_path) == ["x.csv"]


# Folders


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "results" / "shapes"
    for name in ("first", "second"):
        with files.replaced_folder(path) as fresh:
            assert names(fresh) == []
            assert fresh.parent == path.parent
            (fresh / name).write_text(name)
            assert not (path / name).exists()
        assert names(path) == [name]
        assert names(path.parent) == ["shapes"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_was_not_finished_leaves_the_old_one(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "shapes"
    path.mkdir()
    (path / "old").touch()

    def fill() -> None:
        with files.replaced_folder(path) as fresh:
            (fresh / "half").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["shapes"]


def test_what_a_killed_run_left_of_a_folder_is_not_taken_over(tmp_path: Path) -> None:
    with files.replaced_folder(tmp_path / "shapes") as fresh:
        left = fresh.name
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").touch()
    with files.replaced_folder(tmp_path / "shapes") as fresh:
        (fresh / "new").touch()
    assert names(tmp_path / "shapes") == ["new"]
    assert names(tmp_path) == ["shapes"]


def test_a_linked_folder_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "old").touch()
    (tmp_path / "shapes").symlink_to(tmp_path / "cache", target_is_directory=True)
    with files.replaced_folder(tmp_path / "shapes") as fresh:
        (fresh / "new").touch()
    assert not (tmp_path / "shapes").is_symlink()
    assert names(tmp_path / "shapes") == ["new"]
    assert names(tmp_path / "cache") == ["old"]
    assert names(tmp_path) == ["cache", "shapes"]


def test_a_link_that_leads_nowhere_is_replaced_too(tmp_path: Path) -> None:
    """As where DVC's cache was cleaned."""
    (tmp_path / "shapes").symlink_to(tmp_path / "gone", target_is_directory=True)
    with files.replaced_folder(tmp_path / "shapes") as fresh:
        (fresh / "new").touch()
    assert not (tmp_path / "shapes").is_symlink()
    assert names(tmp_path / "shapes") == ["new"]
    assert names(tmp_path) == ["shapes"]


def test_a_folder_stopped_between_its_two_moves_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, moves = tmp_path / "shapes", []
    path.mkdir()
    (path / "old").touch()

    def move(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", move)
        with pytest.raises(KeyboardInterrupt), files.replaced_folder(path) as fresh:
            (fresh / "new").touch()
    assert moves == [files.replaced(path), path]
    assert not path.exists()
    assert names(files.replaced(path)) == ["old"]
    with files.replaced_folder(path) as fresh:
        (fresh / "newer").touch()
    assert names(path) == ["newer"]
    assert names(tmp_path) == ["shapes"]


def test_a_finished_folder_can_be_put_in_place(tmp_path: Path) -> None:
    for name in ("first", "second"):
        finished = tmp_path / f"shapes{files.PARTIAL}-{name}"
        finished.mkdir()
        (finished / name).touch()
        files.put_folder(finished, tmp_path / "shapes")
        assert names(tmp_path / "shapes") == [name]
        assert names(tmp_path) == ["shapes"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o755), (0o077, 0o700)])
def test_a_folder_is_as_readable_as_any_other(mask: int, expected: int, umask: None, tmp_path: Path) -> None:
    os.umask(mask)
    with files.replaced_folder(tmp_path / "shapes"):
        pass
    assert mode(tmp_path / "shapes") == expected

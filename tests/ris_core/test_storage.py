"""A folder and a bucket keep files alike: whole or not at all, and who cannot reach them is told so in one sentence."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ris_core import files
from ris_core.errors import ClusterError
from ris_core.storage import Storage


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty one of each kind."""
    if request.param == "folder":
        return Storage(tmp_path / "storage")
    return Storage(request.getfixturevalue("new_bucket")())


def test_what_was_written_is_read_by_its_name(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.folders() == []
    contents = {"b": b"", "a/x": b"1", "a/deep/er/x": bytes(range(256)) * 5000}
    for name, content in contents.items():
        storage.write(name, content)
    assert storage.names() == sorted(contents)
    assert storage.folders() == ["a"]
    assert {name: storage.read(name) for name in contents} == contents
    assert storage.sizes(*contents, "c", "a") == [0, 1, 1_280_000, None, None]
    assert storage.sizes() == []
    storage.write("a/x", b"another")
    assert storage.read("a/x") == b"another"
    assert storage.names() == sorted(contents)


def test_files_travel_there_and_back(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for content in (os.urandom(3 << 20), b"less", b""):
        source.write_bytes(content)
        storage.upload(source, "folder/file.bin")
        storage.download("folder/file.bin", target)
        assert target.read_bytes() == content
        with storage.local("folder/file.bin") as path:
            assert path.name == "file.bin"
            assert path.read_bytes() == content
    assert storage.names() == ["folder/file.bin"]
    with storage.local("folder/file.bin") as path:
        pass
    assert path.exists() == (storage.folder is not None), "a copy is gone afterwards"


def test_what_is_not_there_is_not_found(storage: Storage, tmp_path: Path) -> None:
    storage.write("there", b"1")
    with pytest.raises(FileNotFoundError):
        storage.read("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.download("nowhere/x", tmp_path / "target")
    with pytest.raises(FileNotFoundError), storage.local("nowhere") as path:
        path.read_bytes()
    assert not (tmp_path / "target").exists(), "no empty file in its place"
    storage.delete("nowhere")
    storage.delete_folder("nowhere")
    assert storage.names() == ["there"]


def test_files_and_folders_are_removed(storage: Storage) -> None:
    for name in ("run/1/x", "run/1/deep/y", "run/10/x", "run/2", "z"):
        storage.write(name, b"1")
    storage.delete_folder("run/1")
    assert storage.names() == ["run/10/x", "run/2", "z"]
    storage.delete("run/2")
    storage.delete("run")  # a folder is no file
    assert storage.names() == ["run/10/x", "z"]
    storage.write("run/1/x", b"again")
    assert storage.names() == ["run/1/x", "run/10/x", "z"]
    assert storage.below("run").folders() == ["1", "10"]


def test_what_is_below_is_a_storage_itself(storage: Storage) -> None:
    inner = storage.below("runs").below("train-cris")
    inner.write("x", b"1")
    assert (inner.names(), storage.names()) == (["x"], ["runs/train-cris/x"])
    assert Storage(inner.place).read("x") == b"1", "its place is enough to find it from elsewhere"
    assert Storage(storage.place).below("runs/train-cris").read("x") == b"1"
    assert inner.folder == (None if storage.folder is None else storage.folder / "runs/train-cris")
    inner.delete_folder("")
    assert storage.names() == []


def test_a_check_leaves_nothing_behind(storage: Storage) -> None:
    storage.write("x", b"1")
    storage.check()
    assert storage.names() == ["x"]
    if storage.folder is not None:
        assert [path.name for path in storage.folder.iterdir()] == ["x"]


def test_a_path_and_its_uri_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    for place in (folder, str(folder), "runs", f"file://{folder}", f"file://{folder}/"):
        storage = Storage(place)
        assert storage.folder == folder
        storage.write("x", str(place).encode())
        assert (folder / "x").read_bytes() == str(place).encode()
    storage = Storage("runs")
    monkeypatch.chdir("/")
    assert storage.names() == ["x"], "wherever this process goes meanwhile"


# Whole or not at all


def put(storage: Storage, name: str, source: Path, how: str) -> None:
    """Write what a file holds, or upload it."""
    if how == "write":
        storage.write(name, source.read_bytes())
    else:
        storage.upload(source, name)


class Stopped(BaseException):
    """What ends a process in the midst of something: Ctrl-C, say."""


def break_copies(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let every copy of a file fail after its first bytes, or after pyarrow has sent them."""

    def half_a_file(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:5])
        raise error

    def half_a_stream(source, target, _: int) -> None:  # type: ignore[no-untyped-def]
        target.write(source.read(5))
        raise error

    monkeypatch.setattr(shutil, "copyfile", half_a_file)
    monkeypatch.setattr(shutil, "copyfileobj", half_a_stream)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Stopped()], ids=["unreadable", "stopped"])
def test_half_an_upload_is_none(
    error: BaseException, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("other", b"stays")
    (tmp_path / "source").write_bytes(b"0123456789")
    with monkeypatch.context() as patched:
        break_copies(patched, error)
        with pytest.raises((ClusterError, Stopped)):
            storage.upload(tmp_path / "source", "model")
    assert storage.names() == ["other"]
    assert storage.sizes("model") == [None]
    if storage.folder is not None:
        assert [path.name for path in storage.folder.iterdir()] == ["other"]
    storage.upload(tmp_path / "source", "model")
    assert storage.read("model") == b"0123456789"


@pytest.mark.parametrize("how", ["write", "upload"])
def test_in_a_folder_the_older_file_stays_until_the_new_one_is_whole(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path / "storage")
    storage.write("a/x", b"old")
    (tmp_path / "source").write_bytes(b"new")
    seen: list[tuple[list[str], bytes]] = []

    def stop(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        seen.append((storage.names(), storage.read("a/x")))
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", stop)
        with pytest.raises(Stopped):
            put(storage, "a/x", tmp_path / "source", how)
    assert seen == [(["a/x"], b"old")], "and what is being written has no name yet"
    assert storage.read("a/x") == b"old"
    assert [path.name for path in (tmp_path / "storage/a").iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_no_file(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("a/model.safetensors", b"1")
    for left in ("a/.model.partial-1-aaaa.safetensors", "b/.state.partial-7-bbbb.json", "b/.reached-0123"):
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).write_bytes(b"half")
    assert storage.names() == ["a/model.safetensors"]
    assert storage.folders() == ["a", "b"], "so that somebody can clean up"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse every byte of a file beyond this size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("how", ["write", "upload"])
def test_a_file_that_the_system_takes_half_of_is_not_there(how: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "storage")
    storage.write("x", b"old")
    (tmp_path / "source").write_bytes(bytes(50_000))
    with largest_file(20_000), pytest.raises(ClusterError, match=r"x could not be written at .*File too large"):
        put(storage, "x", tmp_path / "source", how)
    assert storage.read("x") == b"old"
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["x"]


# Errors


@contextmanager
def told(place: str, *parts: str) -> Iterator[None]:
    """One ClusterError of one line that names the place and all of these."""
    with pytest.raises(ClusterError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in (place, *parts):
        assert part in message
    assert message.count(place) == 1, "once is enough"


SET_IT = "make room, or set RIS_STORAGE to a folder or a bucket that exists and that you may write"


def test_a_bucket_that_does_not_exist(new_bucket: Callable[[], str]) -> None:
    place = new_bucket().replace("s3://", "s3://no-")
    storage = Storage(place)
    with told(place, "the storage", "NO_SUCH_BUCKET", SET_IT):
        storage.check()
    with told(place, "x could not be written at", "NO_SUCH_BUCKET", "see that it can be reached, then start again"):
        storage.write("x", b"1")


def test_a_server_that_does_not_answer(new_bucket: Callable[[], str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"s3://bucket/x?endpoint_override=127.0.0.1:{free.getsockname()[1]}&scheme=http"
    assert new_bucket, "credentials are set"
    with told(place, "the storage", "NETWORK_CONNECTION", SET_IT):
        Storage(place).check()


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "storage"):
        storage = Storage(place)
        with told(str(place), "the storage", "cannot be written", SET_IT):
            storage.check()
        with told(str(place), "x could not be written at", "see that it can be reached, then start again"):
            storage.write("x", b"1")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_setting_to_change_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with told(str(tmp_path / "file"), "make room, or set --out to a folder or a bucket"):
        Storage(tmp_path / "file").check("--out")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x/y", b"1")
    with told(str(tmp_path), "x could not be written at"):
        storage.write("x", b"1")
    with pytest.raises(ClusterError, match=r"x could not be read at .* is a directory"):
        storage.read("x")
    assert storage.names() == ["x/y"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with told(f"{tmp_path}/storage", "Permission denied", SET_IT):
            Storage(tmp_path / "storage").check()
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room on it, then start again"),
        (errno.EDQUOT, "make room on it, then start again"),
        (errno.EACCES, "see that it can be reached, then start again"),
        (errno.EROFS, "see that it can be reached, then start again"),
    ],
)
@pytest.mark.parametrize("how", ["write", "upload"])
def test_a_disk_that_refuses(how: str, code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "storage"
    storage = Storage(place)
    storage.write("x", b"old")
    (tmp_path / "source").write_bytes(b"new")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", refuse)
        patched.setattr(shutil, "copyfile", refuse)
        with told(str(place), "x could not be written at", os.strerror(code), remedy):
            put(storage, "x", tmp_path / "source", how)
        with told(str(place), "the storage", os.strerror(code), SET_IT):
            storage.check()
    assert storage.read("x") == b"old"
    assert [path.name for path in place.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("place", "reason"), [("ftp://host/folder", "ftp"), ("s3://bucket/x?regoin=eu", "regoin"), ("s3:///", "s3:///")]
)
def test_what_is_no_place(place: str, reason: str) -> None:
    with pytest.raises(ClusterError) as caught:
        Storage(place)
    message = str(caught.value)
    assert message.startswith(f"{place} is no place for files (")
    assert reason in message
    assert message.endswith("): give a folder, or a URI such as s3://bucket/folder")

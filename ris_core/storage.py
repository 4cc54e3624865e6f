"""A place that many machines reach: a folder they all mount, or a bucket (`s3://...`), by pyarrow's file systems.

What stands under a name is there whole or not at all: a folder gets it under a temporary name first, a bucket shows nothing
before its upload ends. Credentials and regions come from the environment, as pyarrow and the AWS tools read them.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow import ArrowInvalid, NativeFile
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from ris_core.errors import ClusterError
from ris_core.files import PARTIAL, replaced_file

PIECE = 8 << 20
MARK = ".reached"


class Storage:
    """Files by their names below a folder or a bucket. Other than where noted, methods raise ClusterError when it fails.

    `place` is a path (made absolute) or a URI of a file system that pyarrow knows, with its options:
    `s3://bucket/prefix?endpoint_override=host:port&scheme=http`.
    """

    def __init__(self, place: str | Path):
        self.place = str(place) if "://" in str(place) else str(Path(place).absolute())
        try:
            if "://" in self.place:
                self.system, root = FileSystem.from_uri(self.place)
                self.root = root.rstrip("/")
            else:
                self.system, self.root = LocalFileSystem(), self.place
        except (ArrowInvalid, OSError, ValueError) as error:
            raise ClusterError(
                f"{self.place} is no place for files ({_reason(error)}): give a folder, or a URI such as s3://bucket/folder"
            ) from error

    @property
    def folder(self) -> Path | None:
        """Give the local folder that this is; None for a bucket."""
        return Path(self.root) if isinstance(self.system, LocalFileSystem) else None

    def below(self, name: str) -> Storage:
        """Give what is below one of its folders."""
        found = object.__new__(Storage)
        address, mark, options = self.place.partition("?")
        found.place = f"{address.rstrip('/')}/{name}{mark}{options}"
        found.system, found.root = self.system, self._path(name)
        return found

    def check(self, setting: str = "RIS_STORAGE") -> None:
        """Write a small file and read it again. Raises ClusterError where that fails, naming what `setting` to change."""
        name = f"{MARK}-{os.urandom(4).hex()}"
        try:
            self.write(name, b"here")
            self.read(name)
            self.delete(name)
        except (OSError, ClusterError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise ClusterError(
                f"the storage {self.place} cannot be written ({_reason(cause)}): make room, or set {setting} to a "
                "folder or a bucket that exists and that you may write"
            ) from error

    def write(self, name: str, content: bytes) -> None:
        """Put a file there; an older one is replaced."""
        with self._explained("written", name):
            if self.folder is None:
                with self._stream(name) as stream:
                    stream.write(content)
            else:
                with replaced_file(Path(self._path(name))) as temporary:
                    temporary.write_bytes(content)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file there; an older one is replaced."""
        with self._explained("written", name):
            if self.folder is None:
                with source.open("rb") as file, self._stream(name) as stream:
                    shutil.copyfileobj(file, stream, PIECE)
            else:
                with replaced_file(Path(self._path(name))) as temporary:
                    shutil.copyfile(source, temporary)

    def read(self, name: str) -> bytes:
        """Give what a file holds. Raises FileNotFoundError if there is none."""
        with self._explained("read", name), self.system.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def download(self, name: str, target: Path) -> None:
        """Copy a file to a local one. Raises FileNotFoundError if there is none."""
        with (
            self._explained("read", name),
            self.system.open_input_stream(self._path(name)) as stream,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(stream, file, PIECE)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give a local file with this content, for the block: itself, or a copy. Raises FileNotFoundError if there is none."""
        if self.folder is not None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(prefix="ris-") as place:
            copy = Path(place) / Path(name).name
            self.download(name, copy)
            yield copy

    def sizes(self, *names: str) -> list[int | None]:
        """Give the bytes of files, None for those that are not there."""
        if not names:
            return []
        with self._explained("read", names[0]):
            found = self.system.get_file_info([self._path(name) for name in names])
        return [info.size if info.type == FileType.File else None for info in found]

    def names(self) -> list[str]:
        """List all files by their names, sorted; without those that are being written."""
        with self._explained("read", ""):
            found = self.system.get_file_info(FileSelector(self.root, allow_not_found=True, recursive=True))
        files = [info.path.removeprefix(f"{self.root}/") for info in found if info.type == FileType.File]
        return sorted(name for name in files if PARTIAL not in name and MARK not in name)

    def folders(self) -> list[str]:
        """List the folders right below, sorted, empty ones and those of unfinished files among them."""
        with self._explained("read", ""):
            found = self.system.get_file_info(FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._explained("removed", name):
            if self.sizes(name) != [None]:
                self.system.delete_file(self._path(name))

    def delete_folder(self, name: str) -> None:
        """Remove all files below a folder, if it is there."""
        with self._explained("removed", name):
            if self.folder is not None:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            elif self.system.get_file_info(self._path(name)).type != FileType.NotFound:
                with suppress(FileNotFoundError):  # some stores list a folder for a while after its last file went
                    self.system.delete_dir(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _stream(self, name: str) -> Iterator[NativeFile]:
        """Open a file of a bucket to write. When the block raises, what it wrote is gone, and an older one with it."""
        stream = self.system.open_output_stream(self._path(name))
        try:
            yield stream
        except BaseException:
            with suppress(OSError):
                stream.close()  # pyarrow ends an upload here, and cannot break it off
                self.system.delete_file(self._path(name))
            raise
        stream.close()

    @contextmanager
    def _explained(self, done: str, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            remedy = "make room on it" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that it can be reached"
            raise ClusterError(
                f"{name or 'a file'} could not be {done} at {self.place} ({_reason(error)}): {remedy}, then start again"
            ) from error


def _reason(error: Exception) -> str:
    """Give what went wrong in a line, without the names of files that the system puts to it."""
    said = error.strerror if isinstance(error, OSError) else None
    return (said or str(error) or type(error).__name__).splitlines()[0]

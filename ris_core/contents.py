"""What a file is, by its content: a model's weights, or one of the other things that get their names.

Who reads such a file learns here what lies there instead, as a BadFile: what it is and what to do.
"""

from __future__ import annotations

import pickle
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ris_core.errors import WeightsError

KEYS = ("state_dict", "model_state_dict", "model")  # where whole checkpoints keep their weights, the likeliest first

AGAIN = "download or copy it again, and compare its size with the source's"
ELSEWHERE = "give weights as PyTorch has them: safetensors, or a state dict of torch.save"
UNPACK = "unpack it and give the weights file in it"

_HEAD = 4096  # bytes that tell what a file is
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch.save began before version 1.6
_FOREIGN = {  # files of other kinds, by what they begin with
    b"\x1f\x8b": "a gzip archive",
    b"BZh9": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x89HDF\r\n": "an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file, as llama.cpp reads them",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}

Kind = Literal["safetensors", "a file of torch.save", "a TorchScript archive"]


class BadFile(WeightsError):
    """A file that is not what it should be: what it is instead, in words that go on after its path, and what to do."""

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        super().__init__(path, what, remedy)  # all of them, so that it can be pickled
        self.path, self.what, self.remedy = path, what, remedy

    def __str__(self) -> str:
        return f"{self.path} {self.what}; {self.remedy}"


def kind_of(path: Path) -> Kind:
    """Tell what a weights file is, by its content. Raises BadFile if it is none."""
    head = first_bytes(path)
    if not head:
        raise BadFile(path, "is empty", AGAIN)
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if _LEGACY in head[:32]:
        return "a file of torch.save"
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) < 1 << 32:
        if path.stat().st_size < 8 + length:
            raise BadFile(path, "is cut short: it is safetensors, but not even the header is whole", AGAIN)
        return "safetensors"
    for beginning, what in _FOREIGN.items():
        if head.startswith(beginning):
            raise BadFile(path, f"is {what}, not weights", UNPACK if what.endswith("archive") else ELSEWHERE)
    if head[257:262] == b"ustar":
        raise BadFile(path, "is a tar archive, not weights", UNPACK)
    if head[0] == 0x80 and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        what = "is a pickle that torch.save did not write, or a cut one, and could run any code: it is not opened here"
        raise BadFile(path, what, resaving(head))
    raise BadFile(path, *(pointer(head) or _text(head) or _unknown(head)))


def first_bytes(path: Path) -> bytes:
    """Read how a file begins. Raises BadFile if there is no file that can be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(path, f"is {'a folder' if path.is_dir() else 'no regular file'}", "give a file")
        with path.open("rb") as file:
            return file.read(_HEAD)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise BadFile(path, what, "write its folder again, or give another") from None
    except OSError as error:
        raise BadFile(path, f"cannot be read ({reason(error)})", "give a file that may be read") from None


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # whatever a damaged file makes a decoder raise
        raise BadFile(path, "is cut short or damaged: the list at the end of its archive is not whole", AGAIN) from None
    below = {name.partition("/")[2] for name in names}
    if "constants.pkl" in below:
        return "a TorchScript archive"
    if "data.pkl" in below:
        return "a file of torch.save"
    if names and all(name.endswith(".npy") for name in names):
        raise BadFile(path, "is an archive of NumPy arrays, not weights", ELSEWHERE)
    raise BadFile(path, f"is a zip archive that torch did not write, of {some(names) or 'nothing'}", UNPACK)


def pointer(head: bytes) -> tuple[str, str] | None:
    """Tell what is wrong, and what to do, with a file that only stands for one elsewhere."""
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself", "run `git lfs pull` in its repository, or download the file"
    if b"/annex/objects/" in head and len(head) < 512:
        return "is a git-annex pointer, not the file itself", "run `git annex get` in its repository"
    return None


def _text(head: bytes) -> tuple[str, str] | None:
    """Tell what is wrong, and what to do, with a file of text: mostly the answer of a server that refused a download."""
    text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="replace")
    words = " ".join(text.split())
    begin = words.lower()
    web = begin.startswith(("<!doctype", "<html", "<head", "<body", "<?xml", "<!--"))
    control = any(ord(character) < 32 or 127 <= ord(character) < 160 for character in words)
    if not words or (not web and (control or 5 * words.count("\ufffd") > len(words))):
        return None
    what = "a saved web page" if web else "JSON" if begin.startswith(("{", "[")) else "text"
    shown = f"{words[:60]}..." if len(words) > 60 else words
    remedy = "it may be an error message in place of the file: download it again, as somebody who may"
    return f"is {what}, not weights: it begins {shown!r}", remedy


def _unknown(head: bytes) -> tuple[str, str]:
    if not any(head):
        return "begins with zeros: it was never written or downloaded to its end", AGAIN
    formats = "safetensors, a TorchScript archive or a state dict of torch.save"
    return f"is not readable as {formats}: it begins with the bytes {head[:8].hex(' ')}", AGAIN


def pickled(path: Path) -> bytes:
    """Find the pickle in a file of torch.save, or how it begins; only to say more of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(name) as file:
                return file.read(1 << 24)
    except Exception:  # not an archive, or a damaged one
        with path.open("rb") as file:
            return file.read(1 << 20)


def resaving(pickled: bytes) -> str:
    """Tell how somebody who trusts a file gets the weights out of it."""
    whole = _holds_text(pickled, "_parameters")  # an attribute of every nn.Module
    key = next((key for key in KEYS if _holds_text(pickled, key) and not (whole and key == "model")), "")
    given = f'{{"{key}": checkpoint["{key}"]}}' if key else "model.state_dict()"
    who = "whoever made it and trusts it can save the weights alone, where it was made"
    return f'{who}: `torch.save({given}, "weights.pt")`'


def _holds_text(pickled: bytes, text: str) -> bool:
    """Tell whether a pickle has exactly that text among its values, however its protocol writes it."""
    size, code = len(text), text.encode()
    return b"X" + size.to_bytes(4, "little") + code in pickled or b"\x8c" + bytes([size]) + code in pickled


def some(texts: Sequence[str]) -> str:
    """Give the first three, and how many more."""
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def reason(error: Exception) -> str:
    """Give what a library says, in a line, unless it is advice to run what is in a file."""
    line = next(iter(str(error).splitlines()), "")
    return line if line and "weights_only" not in line else type(error).__name__

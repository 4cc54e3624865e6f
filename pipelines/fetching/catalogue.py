"""What can be fetched, with the size and the SHA-256 that are published for it, and where it was published."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ris_core.data.refer.reader import DatasetName, facts, how_to_get
from ris_core.errors import ConfigError, DataError

PHOTOS = "train2014"  # every photo of RefCOCO, RefCOCO+ and RefCOCOg is one of COCO's train2014
PHOTO_COUNT = 82_783  # cocodataset.org: photos of train2014
ARCHIVE_MAGIC = b"PK\x03\x04"  # also of OpenAI's weights, which are TorchScript archives
CLIP_TAG = "openai"
# As OpenAI's downloads show them, in MiB; only for telling beforehand what a download takes.
_CLIP_MEBIBYTES = {
    "RN50": 244,
    "RN101": 278,
    "RN50x4": 402,
    "RN50x16": 630,
    "RN50x64": 1290,
    "ViT-B-32": 338,
    "ViT-B-16": 335,
    "ViT-L-14": 890,
    "ViT-L-14-336": 891,
}
_UNKNOWN_MEBIBYTES = 1500

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Wanted:
    """A file that can be recognised: its name, the address where it was published, SHA-256s that it may have, and its bytes.

    `size` is None where none is published, or where another SHA-256 than the published one is accepted; `about` is for
    telling what a download takes.
    """

    name: str
    address: str
    sha256: tuple[str, ...]
    size: int | None
    about: int


def annotations_of(dataset: str, accepted: str | None = None) -> Wanted:
    """Give the archive of a dataset's annotations. `accepted` is one more SHA-256 that it may have.

    The published ones are as other projects state them. Raises DataError for an unknown dataset, ConfigError for one without
    an archive, or where `accepted` is no SHA-256.
    """
    name = DatasetName.parse(dataset)
    archive = facts()["archives"].get(name.folder)
    if archive is None:
        raise ConfigError(f"nothing is fetched of {dataset}: {how_to_get(name)}")
    if accepted is not None and not _SHA256.fullmatch(accepted.lower()):
        raise ConfigError(f"--accept-sha256 {accepted[:80]}: a SHA-256 has 64 digits of 0-9 and a-f")
    sums = (archive["sha256"], *([accepted.lower()] if accepted else []))
    size = archive["bytes"]
    return Wanted(f"{name.folder}.zip", archive["url"], sums, None if accepted else size, size)


def photos() -> Wanted:
    """Give the archive of all photos of train2014."""
    archive = facts()["archives"][PHOTOS]
    return Wanted(f"{PHOTOS}.zip", archive["url"], (archive["sha256"],), archive["bytes"], archive["bytes"])


def photo_count(dataset: str) -> int:
    """Tell on how many photos the referents of a dataset are, as published."""
    return int(facts()["counts"][dataset]["total"]["images"])


def photo_bytes() -> int:
    """Tell how many bytes a photo of train2014 takes on average."""
    return int(facts()["archives"][PHOTOS]["bytes"]) // PHOTO_COUNT


def clip(name: str) -> Wanted:
    """Give OpenAI's weights of a CLIP, by the name that open_clip or OpenAI has for it: RN50, ViT-B-16, ViT-B/16.

    open_clip knows the addresses, whose last folder is the SHA-256. Raises ConfigError for any other name.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_models_by_tag

    plain = name.replace("/", "-").replace("@336px", "-336").removesuffix("-quickgelu")
    known = [each for each in list_pretrained_models_by_tag(CLIP_TAG) if not each.endswith("-quickgelu")]
    if plain not in known:
        raise ConfigError(f"--clip {name}: there is no such CLIP of OpenAI's; there are {', '.join(known)}")
    address = str(get_pretrained_cfg(plain, CLIP_TAG)["url"])
    folder, _, file = address.rpartition("/")
    digest = folder.rpartition("/")[2]
    if not _SHA256.fullmatch(digest):
        raise DataError(
            f"open_clip's address of {plain} names no SHA-256 ({address}): give the weights as a file of yours"
        )
    return Wanted(file, address, (digest,), None, _CLIP_MEBIBYTES.get(plain, _UNKNOWN_MEBIBYTES) << 20)

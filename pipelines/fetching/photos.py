"""The photos that a dataset's referents are on, each by itself: fetched at once over several connections, checked, linked.

Single photos have no published checksum. So each must decode, and have the size that instances.json says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from tqdm import tqdm

from pipelines.fetching.download import waiting, what_instead
from pipelines.fetching.mirrors import joined
from pipelines.fetching.sources import Broken, Changed, Refused, Sources, shown
from pipelines.fetching.stock import Stock, link
from ris_core.data.images import BadImage, decode_image
from ris_core.data.refer.photos import locate_images
from ris_core.data.refer.reader import DatasetName, how_to_get, read_references
from ris_core.data.refer.rows import ImageInfo, parse_image
from ris_core.data.refer.untrusted import read_json
from ris_core.errors import DataError
from ris_core.files import replaced_file

AT_ONCE = 16  # connections
ATTEMPTS = 3  # for each photo at each address
PATIENCE = 50  # photos in a row that an address does not give, after which it is asked no more
LARGEST = 20_000_000  # bytes of a photo; those of train2014 have at most 1 million
MAGIC = b"\xff\xd8"


@dataclass(frozen=True)
class Photo:
    """A photo that a dataset's folder lacks: what is known of it, and where it shall be."""

    info: ImageInfo
    place: Path


def referred(root: Path, name: DatasetName) -> list[ImageInfo]:
    """List the photos that referents of a dataset are on, of the annotations below a root; by image id.

    Raises DataError for files that cannot be read. Images whose entries are damaged are left out: `prepare` tells of them.
    """
    used = {image_id for image_id, _ in read_references(root, name).references}
    remedy, path = how_to_get(name), root / name.instances_file
    tables, _ = read_json(root, name.instances_file, remedy)
    images = tables.get("images") if isinstance(tables, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{path} is no COCO file: it has no list of images. {remedy}")
    rows = (parse_image(entry, position) for position, entry in enumerate(images))
    found = {row.image_id: row for row in rows if isinstance(row, ImageInfo) and row.image_id in used}
    return [found[image_id] for image_id in sorted(found)]


def lacking(root: Path, images: Sequence[ImageInfo]) -> list[Photo]:
    """List those that are in none of the folders in which `prepare` looks, below a dataset's root."""
    located = locate_images(root, images)
    return [Photo(image, root / located.paths[image.image_id]) for image in images if image.image_id in located.missing]


def fetch_photos(
    stock: Stock, photos: Sequence[Photo], folders: Sequence[str], sources: Sources, tell: Callable[[str], None]
) -> list[str]:
    """Put photos into their places, those that the stock lacks, or has damaged, from the folders' addresses first.

    Gives what could not be had, a line for each. What was had stays, and so it does when this is interrupted.
    """
    mirrors = [_Mirror(folder, tell) for folder in folders]
    stop = Event()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        with tqdm(desc="photos", total=len(photos), unit="photo", disable=None) as progress:
            tasks = [pool.submit(_put, photo, stock, mirrors, sources, stop) for photo in photos]
            problems = []
            for task in as_completed(tasks):
                if problem := task.result():
                    problems.append(problem)
                progress.update()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return sorted(problems)


@dataclass
class _Mirror:
    """A folder of photos, and how many in a row it did not give."""

    folder: str
    tell: Callable[[str], None]
    failures: int = 0
    lock: Lock = field(default_factory=Lock)

    @property
    def given_up(self) -> bool:
        return self.failures >= PATIENCE

    def count(self, failed: bool, reason: str = "") -> None:
        with self.lock:
            if self.given_up:
                return
            self.failures = self.failures + 1 if failed else 0
            if self.given_up:
                self.tell(
                    f"{shown(self.folder)} did not give {PATIENCE} photos in a row ({reason}): it is asked no more"
                )


def _put(photo: Photo, stock: Stock, mirrors: Sequence[_Mirror], sources: Sources, stop: Event) -> str | None:
    """Put a photo into its place; tells what went wrong."""
    kept = stock.photos / photo.info.file_name
    if not kept.is_file() or _problem(kept.read_bytes(), photo.info):
        content, reasons = _fetched(photo.info, mirrors, sources, stop)
        if content is None:
            return f"{photo.info.file_name}: {'; '.join(reasons)}"
        with replaced_file(kept) as temporary:
            temporary.write_bytes(content)
    link(kept, photo.place)
    return None


def _fetched(
    info: ImageInfo, mirrors: Sequence[_Mirror], sources: Sources, stop: Event
) -> tuple[bytes | None, list[str]]:
    """Give the content of a photo from the first mirror that has it whole, or why none has."""
    reasons = []
    for mirror in mirrors:
        if mirror.given_up:
            reasons.append(f"{shown(mirror.folder)} is asked no more")
            continue
        address = joined(mirror.folder, info.file_name)
        try:
            content = _from(address, info, sources, stop)
        except Refused as error:
            mirror.count(True, str(error))
            reasons.append(f"{shown(address)} {error}")
        else:
            mirror.count(False)
            return content, []
    return None, reasons


def _from(address: str, info: ImageInfo, sources: Sources, stop: Event) -> bytes:
    """Read a photo at an address. Raises Refused where it cannot be had there whole."""
    for attempt in range(1, ATTEMPTS + 1):
        if stop.is_set():
            raise Refused("was not asked any more")
        try:
            return _read(address, info, sources)
        except (Broken, Changed) as error:
            if attempt == ATTEMPTS:
                raise Refused(f"{error}, {ATTEMPTS} times") from error
            stop.wait(waiting(attempt, error) if isinstance(error, Broken) else 0)
    raise AssertionError("unreachable")


def _read(address: str, info: ImageInfo, sources: Sources) -> bytes:
    content = bytearray()
    with sources.open(address) as opened:
        for piece in opened.pieces:
            content += piece
            if len(content) > LARGEST:
                raise Refused(f"gives more than {LARGEST:,} bytes")
        if told := what_instead(bytes(content[:4096]), MAGIC, "photo"):
            raise Refused(told)
    if problem := _problem(bytes(content), info):
        raise problem
    return bytes(content)


def _problem(content: bytes, info: ImageInfo) -> Broken | Refused | None:
    """Tell what is wrong with the content of a photo. One that was cut may be whole the next time."""
    try:
        height, width, _ = decode_image(content).shape
    except BadImage as error:
        return Broken(f"gives a photo that cannot be decoded ({error.reason})")
    if (width, height) != (info.width, info.height):
        return Refused(f"gives a photo of {width}x{height} pixels, instances.json says {info.width}x{info.height}")
    return None

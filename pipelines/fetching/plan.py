"""What a fetch will do: what is there, what comes from where, how many bytes and how much disk that takes, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.fetching import catalogue
from pipelines.fetching.catalogue import Wanted
from pipelines.fetching.download import part_bytes
from pipelines.fetching.mirrors import Mirrors
from pipelines.fetching.photos import lacking, referred
from pipelines.fetching.sources import shown
from pipelines.fetching.stock import Stock
from ris_core.data.refer.reader import DatasetName
from ris_core.room import size

UNPACKED = 5  # times an archive of annotations: JSON and pickles
RATES = (10, 100)  # megabytes a second, for telling how long it takes


@dataclass(frozen=True)
class Step:
    """One thing that is fetched: bytes to receive, on the disk at the end, and on the disk at most meanwhile.

    `address` is the first that will be asked; empty where nothing is to be received. `about`: sizes are estimates.
    """

    name: str
    told: str
    address: str = ""
    receives: int = 0
    keeps: int = 0
    takes: int = 0
    about: bool = False


def of_annotations(stock: Stock, name: DatasetName, wanted: Wanted, mirrors: Mirrors) -> Step:
    """Plan the annotations of a dataset."""
    if not stock.lacks(name):
        return Step(wanted.name, f"is unpacked in {stock.of(name) / name.folder}")
    if stock.has_annotations(name):
        return Step(wanted.name, f"is unpacked in {stock.folder / name.folder} and will be linked")
    return _archive(stock, wanted, mirrors, UNPACKED * wanted.about)


def of_photos(stock: Stock, name: DatasetName, which: str, mirrors: Mirrors) -> Step:
    """Plan the photos of a dataset: `all` of train2014, the `referred` ones, or `none`."""
    if which == "none":
        return Step("photos", "are left out")
    if which == "all" and not stock.has_all_photos():
        archive = catalogue.photos()
        return _archive(stock, archive, mirrors, max(archive.about - stock.bytes_of_photos(), 0))
    if stock.lacks(name) and not stock.has_annotations(name):
        count = catalogue.photo_count(name.name)
        return _single(f"{count:,}, if none is there: the annotations will tell", count, mirrors)
    images = referred(stock.folder if stock.lacks(name) else stock.of(name), name)
    missing = lacking(stock.of(name), images)
    if not missing:
        return Step("photos", f"all {len(images):,} are in {stock.of(name)}")
    kept = sum((stock.photos / photo.info.file_name).is_file() for photo in missing)
    in_place, left = len(images) - len(missing), len(missing) - kept
    state = f"{in_place:,} in place, {kept:,} to be linked, {left:,} to be fetched"
    return _single(f"{len(images):,}, of them {state}", left, mirrors)


def of_clip(stock: Stock, wanted: Wanted, mirrors: Mirrors) -> Step:
    """Plan weights of CLIP."""
    there = stock.clip / wanted.name
    if there.is_file():
        return Step(wanted.name, f"is there: {there}")
    address = mirrors.of_file(wanted.name, wanted.address)[0]
    left = max(wanted.about - part_bytes(there), 0)
    return Step(wanted.name, _begun(part_bytes(there)), address, left, left, left, about=True)


def told(steps: Sequence[Step], stock: Stock) -> list[str]:
    """Tell a plan, a line for each step, then what it takes."""
    lines = []
    for step in steps:
        about = "about " if step.about else ""
        source = f"{about}{size(step.receives)} from {shown(step.address)}" if step.address else ""
        lines.append(f"  {step.name}: {'; '.join(filter(None, (step.told, source)))}")
    receives = sum(step.receives for step in steps)
    if receives:
        times = " or ".join(f"{_duration(receives / rate / 1e6)} at {rate} MB/s" for rate in RATES)
        lines.append(f"  to receive: about {size(receives)}, {times}")
    lines.append(
        f"  disk: about {size(sum(step.keeps for step in steps))} more in the end, {size(needed(steps))} at most on the way; "
        f"{size(stock.free())} are free"
    )
    return lines


def needed(steps: Sequence[Step]) -> int:
    """Tell how many bytes must be free for all steps, one after the other."""
    before, most = 0, 0
    for step in steps:
        most = max(most, before + step.takes)
        before += step.keeps
    return most


def _single(state: str, count: int, mirrors: Mirrors) -> Step:
    amount = count * catalogue.photo_bytes()
    return Step("photos", state, mirrors.of_photos()[0] if count else "", amount, amount, amount, about=True)


def _archive(stock: Stock, wanted: Wanted, mirrors: Mirrors, unpacked: int) -> Step:
    there = part_bytes(stock.folder / wanted.name)
    left = max(wanted.about - there, 0)
    address = mirrors.of_file(wanted.name, wanted.address)[0] if left else ""
    return Step(wanted.name, _begun(there), address, left, max(unpacked - there, 0), left + unpacked)


def _begun(there: int) -> str:
    return f"{size(there)} are there already" if there else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""`ris fetch`: the annotations and photos of RefCOCO, RefCOCO+ or RefCOCOg, and weights of CLIP, from anywhere to `data/raw`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from tqdm import tqdm

from pipelines import paths
from pipelines.fetching import catalogue, plan, unpack
from pipelines.fetching.catalogue import Wanted
from pipelines.fetching.download import bar, download
from pipelines.fetching.mirrors import Mirrors
from pipelines.fetching.photos import AT_ONCE, fetch_photos, lacking, referred
from pipelines.fetching.recipes import next_steps
from pipelines.fetching.sources import Sources
from pipelines.fetching.stock import Stock
from ris_core.data.refer.reader import DatasetName
from ris_core.errors import ConfigError, DataError, RISError, list_problems
from ris_core.room import size

DATASETS = paths.raw("")
ELSEWHERE = "Name other addresses in a file for --mirrors (docs/real-data.md), or put the file itself at {place}."
ACCEPT = (
    " The published SHA-256s of annotations are as other projects state them: one that you know to be right as well can be "
    "given as --accept-sha256."
)
Found = TypeVar("Found")


class Photos(StrEnum):
    """Which photos are fetched."""

    referred = "referred"
    all = "all"
    none = "none"


def main(
    dataset: Annotated[
        str, typer.Argument(help="refcoco_unc, refcoco_google, refcoco+_unc, refcocog_umd, refcocog_google")
    ],
    clip: Annotated[
        list[str] | None,
        typer.Option(
            help="also OpenAI's weights of this CLIP: RN50, ViT-B-16, ...; may be given again", show_default=False
        ),
    ] = None,
    photos: Annotated[
        Photos,
        typer.Option(help="of train2014: those with referents, one by one; all, as one archive of 13.5 GB; or none"),
    ] = Photos.referred,
    to: Annotated[Path, typer.Option(help="the folder of datasets")] = DATASETS,
    mirrors: Annotated[
        Path | None, typer.Option(help="a YAML file of further addresses: https, http, file, s3", show_default=False)
    ] = None,
    accept_sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="take annotations with this SHA-256, too", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
) -> None:
    """Fetch annotations, photos and weights of CLIP: resumed, checked, and put where stages look for them."""
    archive, weights, known = checked(dataset, accept_sha256, clip or [], mirrors)
    name, stock = DatasetName.parse(dataset), Stock(to.expanduser())
    with _written(stock):
        if dry_run:
            _planned(stock, name, archive, photos, weights, known, typer.echo)
            return
        with stock.locked(_say), closing(Sources(AT_ONCE)) as sources:
            steps = _planned(stock, name, archive, photos, weights, known, _say)
            stock.check_room(plan.needed(steps), f"fetching {dataset}")
            _annotations(stock, name, archive, known, sources)
            files = [_weights(stock, each, known, sources) for each in weights]
            _photos(stock, name, photos, known, sources)
    for line in next_steps(name, stock.of(name), paths.raw(dataset), files):
        typer.echo(line)


def checked(
    dataset: str, accepted: str | None, clips: Sequence[str], mirrors: Path | None
) -> tuple[Wanted, list[Wanted], Mirrors]:
    """Give the archive of annotations, weights of CLIP, and where they are had. Raises ConfigError with all that is wrong."""
    problems: list[str] = []

    def tried(what: Callable[[], Found]) -> list[Found]:
        try:
            return [what()]
        except RISError as error:
            problems.append(str(error))
            return []

    archive = tried(lambda: catalogue.annotations_of(dataset, accepted))
    weights = [found for name in clips for found in tried(partial(catalogue.clip, name))]
    known = tried(lambda: Mirrors.read(mirrors.expanduser() if mirrors else None))
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else list_problems("nothing was fetched", problems))
    return archive[0], weights, known[0]


def _planned(
    stock: Stock,
    name: DatasetName,
    archive: Wanted,
    which: Photos,
    weights: Sequence[Wanted],
    mirrors: Mirrors,
    tell: Callable[[str], None],
) -> list[plan.Step]:
    """Make the plan, and tell it."""
    steps = [
        plan.of_annotations(stock, name, archive, mirrors),
        *(plan.of_clip(stock, each, mirrors) for each in weights),
        plan.of_photos(stock, name, which, mirrors),
    ]
    for line in (f"{name.name}, into {stock.of(name)}:", *plan.told(steps, stock)):
        tell(line)
    return steps


def _annotations(stock: Stock, name: DatasetName, wanted: Wanted, mirrors: Mirrors, sources: Sources) -> None:
    if stock.lacks(name) and not stock.has_annotations(name):
        place = stock.folder / wanted.name
        remedy = ELSEWHERE.format(place=place) + ACCEPT
        archive = download(wanted, mirrors.of_file(wanted.name, wanted.address), place, sources, _say, remedy)
        stock.check_room(unpack.unpacked_bytes(archive, unpack.ANNOTATIONS), f"unpacking {archive}")
        stock.unpack_annotations(archive, name)
        archive.unlink()
    stock.link_annotations(name)


def _weights(stock: Stock, wanted: Wanted, mirrors: Mirrors, sources: Sources) -> Path:
    place = stock.clip / wanted.name
    place.parent.mkdir(exist_ok=True)
    remedy = ELSEWHERE.format(place=place)
    return download(wanted, mirrors.of_file(wanted.name, wanted.address), place, sources, _say, remedy)


def _photos(stock: Stock, name: DatasetName, which: Photos, mirrors: Mirrors, sources: Sources) -> None:
    """Get the photos of a dataset. Raises DataError that lists those that could not be had; the others are in place."""
    if which is Photos.none:
        return
    if which is Photos.all and not stock.has_all_photos():
        _all_photos(stock, mirrors, sources)
    missing = lacking(stock.of(name), referred(stock.of(name), name))
    absent = sum(not (stock.photos / photo.info.file_name).is_file() for photo in missing)
    stock.check_room(absent * catalogue.photo_bytes(), f"fetching {absent:,} photos")
    problems = fetch_photos(stock, missing, mirrors.of_photos(), sources, _say)
    if problems:
        remedy = (
            "The others are in place. The same command again asks for these alone; --mirrors names other addresses. To go on "
            "without them, set prepare.on_bad to skip in params.yaml."
        )
        raise DataError(list_problems(f"photos of {name.name} could not be fetched", problems, remedy))
    if missing:
        _say(f"{len(missing):,} photos are in place now")


def _all_photos(stock: Stock, mirrors: Mirrors, sources: Sources) -> None:
    wanted = catalogue.photos()
    place = stock.folder / wanted.name
    addresses = mirrors.of_file(wanted.name, wanted.address)
    archive = download(wanted, addresses, place, sources, _say, ELSEWHERE.format(place=place))
    unpacked = unpack.unpacked_bytes(archive, unpack.PHOTOS)
    stock.check_room(unpacked - stock.bytes_of_photos(), f"unpacking {archive} ({size(unpacked)})")
    with bar(f"unpacking {wanted.name}", unpacked) as progress:
        stock.unpack_photos(archive, wanted.sha256[0], progress.update)
    archive.unlink()


@contextmanager
def _written(stock: Stock) -> Iterator[None]:
    """Turn what the machine says against writing in the block, a full disk say, into a ConfigError about --to."""
    try:
        yield
    except OSError as error:
        where = f" ({os.fspath(error.filename)})" if error.filename else ""
        raise ConfigError(
            f"--to {stock.root} cannot be written: {error.strerror or error}{where}. What was fetched is kept: mend that, and "
            "the same command goes on"
        ) from error


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above a bar, where there is one


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)

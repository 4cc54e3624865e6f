"""`ris predict-batch`: many images and many expressions, answered by a pool of Ray Data actors each holding the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import pyarrow as pa
import typer
from tqdm import tqdm

from pipelines import batch_output, cluster, inputs, places
from pipelines.batch_answers import Answerer
from pipelines.batch_input import Asked, Photo, digest_of, photos, read_asked, read_expressions, unpack
from pipelines.predict import MODEL, ModelPlace, Threshold, model_folder
from pipelines.transport import Road
from ris_core.errors import ConfigError, DataError, RISError, list_problems
from ris_core.files import file_sha256
from ris_core.models.answer import Reading
from ris_core.models.clip import CONFIG_FILE
from ris_core.models.registry import CLIP_FOLDER, DESCRIPTION, read_description
from ris_core.options import Plain, digest
from ris_core.predictor import RISPredictor

ROOT = Path("/")
Found = TypeVar("Found")


def main(
    source: Annotated[
        Path, typer.Argument(help="a folder of images, or a .parquet, .csv or .jsonl table with columns image and text")
    ],
    out: Annotated[Path, typer.Option(help="the folder for the answers; one that was begun is gone on with")],
    expressions: Annotated[
        Path | None, typer.Option(help="a file of expressions, one a line, each asked of every image")
    ] = None,
    expression: Annotated[
        list[str] | None, typer.Option(help="an expression asked of every image; may be given several times")
    ] = None,
    model: ModelPlace = MODEL,
    threshold: Threshold = 0.5,
) -> None:
    """Answer many expressions about many images with all of a machine or cluster; goes on where it was stopped."""
    start = time.monotonic()
    folder, asked, texts = checked(
        source.expanduser(), out.expanduser(), expressions, expression or [], model, threshold
    )
    out = out.expanduser()
    if asked.skipped:
        typer.echo(f"{source}: left out what is no image: {asked.skipped}", err=True)
    files = photos(asked, out / batch_output.IMAGES)
    decides = what_decides(folder, threshold, digest_of(asked, files, texts))
    bounds = batch_output.parts_of(asked.image_of)
    with batch_output.opened(out, decides, asked.pairs, bounds) as answers:
        if not answers.missing.all():
            typer.echo(
                f"{out}: {answers.parts_before} of {len(bounds) - 1} parts are there already, {int(answers.missing.sum())} of "
                f"{len(asked.pairs)} rows are left",
                err=True,
            )
        images = make(asked, files, answers, folder, threshold)
        answers.finish()
    seconds = time.monotonic() - start
    rows, errors = len(asked.pairs), answers.errors
    if errors == rows:
        raise DataError(f"{out}: none of {rows} rows could be answered, the column error says why: {answers.example}")
    typer.echo(f"{out}: {rows} rows, {errors} errors, {seconds:.1f} s, {images / seconds:.1f} images/s")
    if errors:
        typer.echo(
            f"WARNING: {errors} of {rows} rows have no answer, their column error says why: {answers.example}", err=True
        )


def checked(
    source: Path, out: Path, file: Path | None, texts: list[str], model: str, threshold: float
) -> tuple[Path, Asked, list[str]]:
    """Give the model's folder, what is asked, and the expressions for all images. Raises ConfigError, with all that is wrong."""
    problems: list[str] = []

    def tried(what: Callable[[], Found]) -> Found | None:
        try:
            return what()
        except RISError as error:
            problems.append(str(error))
            return None

    reading = tried(lambda: Reading(threshold))
    blank = [text for text in texts if not text.strip()]
    if blank:
        problems.append(f"{len(blank)} of the texts given as --expression are blank: leave them out")
    chosen = [*((tried(lambda: read_expressions(file)) or []) if file else []), *texts]
    asked = tried(lambda: read_asked(source, chosen or (["of a file that told none"] if file else [])))
    if problem := _problem_of_out(out, source):
        problems.append(f"--out {out} {problem}")
    folder = tried(lambda: model_folder(model))
    if folder is not None:
        tried(lambda: RISPredictor.from_folder(folder, "cpu", reading=reading))
    if problems or folder is None or asked is None:
        raise ConfigError(problems[0] if len(problems) == 1 else list_problems("nothing was answered", problems))
    return folder, asked, chosen


def _problem_of_out(out: Path, source: Path) -> str | None:
    real, given = places.followed(out), places.followed(source)
    if given.is_dir() and (real == given or given in real.parents):
        return f"lies in {source}, among the images: give a folder elsewhere"
    if problem := batch_output.problem_of(out):
        return problem
    return places.problem_of_folder(real) if real.is_dir() else places.problem_of_new(out)


def what_decides(model: Path, threshold: float, input_digest: str) -> Plain:
    """Give all that answers depend on, as the manifest has it."""
    described = read_description(model)
    descriptions = [file_sha256(path) for path in (model / DESCRIPTION, model / CLIP_FOLDER / CONFIG_FILE)]
    return {
        "system": described.system,
        "weights": described.weights_sha256,
        "model": digest(descriptions),
        "threshold": threshold,
        "input": input_digest,
        "code": inputs.digest_of(inputs.code("pipelines.batch_answers", (described.system,))),
    }


def make(asked: Asked, files: list[Photo], answers: batch_output.Answers, model: Path, threshold: float) -> int:
    """Answer the rows that are missing; how many images that took."""
    rows_of = _grouped(asked.image_of, answers.missing)
    if not rows_of:
        return 0
    if asked.of_bytes:
        with places.written(answers.folder):
            unpack(asked, [files[image].key for image in rows_of], answers.folder / batch_output.IMAGES)
    images = list(rows_of)
    bounds = batch_output.cut([len(rows_of[image]) for image in images], [1] * len(images))
    texts = asked.pairs["text"]
    units = []
    for first, end in pairwise(bounds):
        units.append([_entry(files[image], rows_of[image], texts) for image in images[first:end]])
    total = len(asked.pairs)
    with tqdm(total=total, initial=total - int(answers.missing.sum()), unit="row", disable=None) as bar:
        for found in answered(units, model, threshold):
            bar.update(answers.add(found))
    return len(images)


def _grouped(image_of: np.ndarray, missing: np.ndarray) -> dict[int, list[int]]:
    """Give all rows of each image that lacks some, images in the order in which they come first.

    All, as the last digits of a score depend on what is asked beside it: so they are the same, whatever was there before.
    """
    lacking = np.zeros(image_of.max() + 1, bool)
    lacking[image_of[missing]] = True
    rows_of: dict[int, list[int]] = {}
    for row in np.flatnonzero(lacking[image_of]).tolist():
        rows_of.setdefault(int(image_of[row]), []).append(row)
    return rows_of


def _entry(photo: Photo, rows: list[int], texts: pa.ChunkedArray) -> Plain:
    # Names that lead to a photo through links or upwards are followed here: below one root all nodes find it.
    file = None if photo.path is None else str(places.followed(photo.path).relative_to(ROOT))
    return {"file": file, "problem": photo.problem, "rows": rows, "texts": texts.take(pa.array(rows)).to_pylist()}


def travelling(units: list[list[Plain]], road: Road) -> list[dict[str, str]]:
    """Give rows for `Answerer`, with places at which workers find the photos of a unit."""
    found = []
    for images in units:
        photos = road.offer(ROOT, [image["file"] for image in images if image["file"] is not None])
        found.append({"unit": json.dumps({"photos": photos.plain(), "images": images})})
    return found


def answered(units: list[list[Plain]], model: Path, threshold: float) -> Iterator[pa.Table]:
    """Give tables of `batch_answers.FOUND` as they come, made by one actor for each GPU, or each CPU, of the cluster."""
    with cluster.connected():
        use_gpu = cluster.has_gpu("auto")
        cluster.check_resources(1, 1, int(use_gpu))
        road = Road.find()
        items = travelling(units, road)
        data = cluster.data()
        actors = cluster.held(len(items), 1, int(use_gpu))
        rows = data.from_items(items, override_num_blocks=len(items)).map_batches(
            Answerer,
            fn_constructor_args=(road.offer(model), threshold),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        # Nothing is fetched ahead: that would hold a part back until the next one is there.
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


if __name__ == "__main__":
    from pipelines.stage import run

    run(main)

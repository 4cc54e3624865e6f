"""Data of RefCOCO's shape without RefCOCO: photo-like JPEGs, records with polygons and sentences, a store of shards.

640x480 pixels and about 90 KB a photo; three referents with seven expressions and six objects an image, as in RefCOCO val
(10,834 expressions about 1,500 images).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ris_core.data import masks
from ris_core.data.records import ImageRecord, Instance, Reference, Sentence
from ris_core.data.shards import ShardOptions, write_manifest, write_shard

WIDTH, HEIGHT = 640, 480
OBJECTS = 6
SENTENCES_OF_REFS = (3, 2, 2)
EXPRESSIONS = sum(SENTENCES_OF_REFS)
SPLIT = "train"
QUALITY, GRAIN = 90, 5.5  # JPEG quality, and film grain in grey levels: together about 90 KB
WORDS = ("man", "woman", "left", "right", "red", "blue", "shirt", "with", "on", "closest", "chair", "dog", "second")


def write_images(folder: Path, images: int, words: int = 5, seed: int = 0) -> list[ImageRecord]:
    """Write photo-like JPEGs into a folder; returns their records, each sentence of `words` words."""
    random = np.random.default_rng(seed)
    views = photos(random)
    records = []
    for image in range(images):
        name = f"{image:06d}.jpg"
        (folder / name).write_bytes(next(views))
        first = OBJECTS * image
        objects = tuple(_object(random, first + k) for k in range(OBJECTS))
        refs = tuple(
            Reference(first + k, first + k, 1, SPLIT, _sentences(random, 10 * (first + k), count, words))
            for k, count in enumerate(SENTENCES_OF_REFS)
        )
        records.append(ImageRecord(image, name, HEIGHT, WIDTH, objects, refs))
    return records


def write_store(folder: Path, images: int, size: int, words: int = 5) -> Path:
    """A finished store of one shard, letterboxed to `size`, below `folder`; returns its place for `ShardStore`."""
    photos, shards = folder / "photos", folder / f"shards-{size}"
    photos.mkdir(exist_ok=True)
    shards.mkdir()
    options = ShardOptions(size)
    entry = write_shard(shards / "part-00000.arrow", write_images(photos, images, words), photos, options)
    write_manifest(shards, "benchmark", options, [entry])
    return shards


def photos(random: np.random.Generator) -> Iterator[bytes]:
    """Photo-like JPEGs, 640x480, without end: views of one scene."""
    world = _world(random)
    while True:
        yield _photo(world, random)


def _world(random: np.random.Generator) -> np.ndarray:
    """A large scene (2H, 2W, 3) float32 of smooth noise, weaker with each finer octave, as in photographs."""
    height, width = 2 * HEIGHT, 2 * WIDTH
    scene = np.full((height, width, 3), 128, np.float32)
    for octave in range(2, 9):
        cells = random.standard_normal((height * 2**octave // width, 2**octave, 3), np.float32)
        for channel in range(3):
            smooth = Image.fromarray(cells[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
            scene[:, :, channel] += np.asarray(smooth) * (90 / 1.5**octave)
    return scene


def _photo(world: np.ndarray, random: np.random.Generator) -> bytes:
    """A view of the scene with grain, as JPEG."""
    y, x = random.integers(HEIGHT), random.integers(WIDTH)
    view = world[y : y + HEIGHT, x : x + WIDTH] + random.standard_normal((HEIGHT, WIDTH, 1), np.float32) * GRAIN
    buffer = io.BytesIO()
    Image.fromarray(view.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _object(random: np.random.Generator, ann_id: int) -> Instance:
    """An object of two overlapping blobs, polygons of 24 points each."""
    centre, radius = random.uniform((80, 80), (WIDTH - 80, HEIGHT - 80)), random.uniform(20, 110)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    polygons = []
    for _ in range(2):
        reach = radius * random.uniform(0.7, 1.2, (24, 1))
        points = centre + random.uniform(-0.5, 0.5) * radius + reach * np.stack([np.cos(angles), np.sin(angles)], 1)
        polygons.append(points.clip(0, (WIDTH - 1, HEIGHT - 1)).round(2).ravel().tolist())
    counts = masks.segmentation_to_counts(polygons, HEIGHT, WIDTH)
    box = (*(centre - radius).tolist(), 2 * radius, 2 * radius)
    return Instance(ann_id, 1, "blob", 0, box, float(masks.area(counts, HEIGHT, WIDTH)), counts)


def _sentences(random: np.random.Generator, first: int, count: int, words: int) -> tuple[Sentence, ...]:
    texts = [" ".join(random.choice(WORDS, words)) for _ in range(count)]
    return tuple(Sentence(first + k, text, text) for k, text in enumerate(texts))

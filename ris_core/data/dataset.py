"""Reading shards: random access for evaluation, and training batches as a pure function of (seed, epoch, step).

Nothing here remembers a position. A batch is computed from its number alone, so a run that resumes anywhere, or in
another number of processes, sees the same sequence of (referent, sentence) pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from ris_core.data import masks
from ris_core.data.letterbox import Mode, letterbox_mask
from ris_core.data.shards import MANIFEST, SCHEMA_VERSION, decode_pixels
from ris_core.errors import DataError

CACHED_ROWS = 4096

Tokenize = Callable[[Sequence[str]], torch.Tensor]  # a system's: sentences -> int64 (N, L)


class ShardStore:
    """All images of one prepared dataset, addressed by index 0..len-1; shards are memory-mapped, not loaded.

    Raises DataError if the folder holds no finished shards or ones of another schema version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            raise DataError(f"{manifest} does not exist: run the preprocess stage for this dataset first")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        if self.manifest["schema_version"] != SCHEMA_VERSION:
            found = self.manifest["schema_version"]
            raise DataError(f"{manifest}: shard schema {found}, this code reads {SCHEMA_VERSION}; preprocess again")
        self.image_size: int = self.manifest["image_size"]
        self.resample: Mode = self.manifest["resample"]
        self._batches = [self._open(self.folder / entry["file"]) for entry in self.manifest["shards"]]
        self._address = [(shard, row) for shard, batch in enumerate(self._batches) for row in range(batch.num_rows)]
        self._index_refs()
        self.row = lru_cache(CACHED_ROWS)(self._row)

    @staticmethod
    def _open(path: Path) -> pa.RecordBatch:
        if not path.exists():
            raise DataError(f"{path} is named in the manifest but missing: preprocess this dataset again")
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged ({error}): delete it and preprocess this dataset again") from None
        return table.combine_chunks().to_batches()[0] if len(table) else _empty(table.schema)

    def _index_refs(self) -> None:
        """Flatten all referents to numpy columns: image index, position in the image, split, number of sentences."""
        images, positions, splits, sentences = [], [], [], []
        first = 0
        for batch in self._batches:
            refs = batch.column("refs")
            lengths = refs.value_lengths().to_numpy(zero_copy_only=False)
            images.append(first + np.repeat(np.arange(len(lengths)), lengths))
            positions.append(np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0, np.int64)]))
            flat = refs.flatten()
            splits += flat.field("split").to_pylist()
            sentences.append(flat.field("sentences").value_lengths().to_numpy(zero_copy_only=False))
            first += len(lengths)
        self.ref_image = np.concatenate(images)
        self.ref_position = np.concatenate(positions)
        self.ref_split = np.array(splits)
        self.ref_sentences = np.concatenate(sentences)

    def __len__(self) -> int:
        return len(self._address)

    def pixels(self, index: int) -> np.ndarray:
        """Give the letterboxed image, uint8 (S, S, 3), read-only."""
        shard, row = self._address[index]
        content = self._batches[shard].column("image")[row].as_buffer()
        return decode_pixels(content, self.manifest["storage"], self.image_size)

    def _row(self, index: int) -> dict[str, Any]:
        shard, row = self._address[index]
        batch = self._batches[shard]
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names if name != "image"}

    def mask(self, index: int, ann_id: int) -> np.ndarray:
        """Give the exact mask of one annotation at original size, uint8 (height, width) of 0/1."""
        row = self.row(index)
        counts = next(item["counts"] for item in row["instances"] if item["ann_id"] == ann_id)
        return masks.decode(counts, row["height"], row["width"])

    def places(self) -> dict[int, int]:
        """Give the index of every image by its id."""
        ids = [image_id for batch in self._batches for image_id in batch.column("image_id").to_pylist()]
        return {image_id: index for index, image_id in enumerate(ids)}

    def images_of(self, split: str) -> np.ndarray:
        """Give indices of the images with at least one referent in `split`. Raises DataError if there is none."""
        found = np.unique(self.ref_image[self.ref_split == split])
        if not len(found):
            known = ", ".join(self.manifest["splits"])
            raise DataError(f"{self.manifest['dataset']} has no split '{split}'; it has {known}")
        return found


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


@dataclass(frozen=True)
class BatchPlan:
    """How training draws: each epoch a seeded permutation; every referent at least once, one of its sentences each time.

    A batch is `batch_images` groups; a group is one image with `expressions_per_image` of its referents (those are
    filled up by repeating referents when an image has too few). With one expression per image this is CRIS' epoch: each
    referent exactly once, with one random sentence.
    """

    batch_images: int
    expressions_per_image: int
    seed: int
    steps_per_epoch: int | None = None
    text: str = "sent"  # the field of a sentence that is read


class TrainingBatches(Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset over the steps of one epoch: item `step` is rank's whole batch.

    A batch: image uint8 (B, 3, S, S); tokens int64 (N, L), what `tokenize` makes of the N sentences; image_index int64
    (N,), the image each expression belongs to; target uint8 (N, 1, S/stride, S/stride), 0..255, the warped mask. The
    last groups of an epoch that do not fill a batch are dropped (they come in another epoch's permutation).
    """

    def __init__(
        self,
        store: ShardStore,
        split: str,
        plan: BatchPlan,
        tokenize: Tokenize,
        stride: int = 4,
        rank: int = 0,
        world: int = 1,
    ):
        if plan.batch_images % world:
            raise DataError(f"a global batch of {plan.batch_images} images does not divide over {world} workers")
        self.store, self.plan, self.tokenize, self.stride = store, plan, tokenize, stride
        self.rank, self.world = rank, world
        self.refs = np.flatnonzero(store.ref_split == split)
        if not len(self.refs):
            store.images_of(split)
        self.steps = self._groups(0)[0].shape[0] // plan.batch_images
        if not self.steps:
            raise DataError(f"split '{split}' has fewer groups than one batch of {plan.batch_images} images")
        if plan.steps_per_epoch:
            self.steps = min(self.steps, plan.steps_per_epoch)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches `__getitem__` returns."""
        self.groups, self.choice = self._groups(epoch)

    def _groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Give referents (G, k) of every group in this epoch's order, and a uniform number per choice of a sentence."""
        random = np.random.default_rng([self.plan.seed, epoch])
        k = self.plan.expressions_per_image
        refs = random.permutation(self.refs)
        if k == 1:
            groups = refs[:, None]
        else:
            refs = refs[np.argsort(self.store.ref_image[refs], kind="stable")]
            per_image = np.split(refs, np.flatnonzero(np.diff(self.store.ref_image[refs])) + 1)
            filled = [np.resize(members, -(-len(members) // k) * k).reshape(-1, k) for members in per_image]
            groups = random.permutation(np.concatenate(filled))
        return groups, random.random(groups.shape)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        share = self.plan.batch_images // self.world
        start = step * self.plan.batch_images + self.rank * share
        groups, choice = self.groups[start : start + share], self.choice[start : start + share]
        store = self.store
        images = np.stack([store.pixels(int(store.ref_image[group[0]])) for group in groups])
        texts, targets = [], []
        for ref, uniform in zip(groups.ravel(), choice.ravel(), strict=True):
            image = int(store.ref_image[ref])
            entry = store.row(image)["refs"][store.ref_position[ref]]
            sentence = entry["sentences"][int(uniform * len(entry["sentences"]))]
            texts.append(sentence[self.plan.text])
            targets.append(self._target(image, entry["ann_id"]))
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "tokens": self.tokenize(texts),
            "image_index": torch.arange(len(groups)).repeat_interleave(groups.shape[1]),
            "target": torch.from_numpy(np.stack(targets))[:, None],
        }

    def _target(self, image: int, ann_id: int) -> np.ndarray:
        store = self.store
        return letterbox_mask(store.mask(image, ann_id), store.image_size, stride=self.stride, mode=store.resample)

    def loader(self, epoch: int, first_step: int = 0, workers: int = 0) -> DataLoader[dict[str, torch.Tensor]]:
        """Give batches of `epoch` from `first_step` on, made ahead by `workers` processes (0: in this one)."""
        self.set_epoch(epoch)
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(first_step, self.steps),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

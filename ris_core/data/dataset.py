"""Reading shards: random access for evaluation, and training batches as a pure function of (seed, epoch, step).

Nothing here remembers a position. A batch is computed from its number alone, so a run that resumes anywhere, or in
another number of processes, sees the same sequence of (referent, sentence) pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from ris_core.data import masks
from ris_core.data.letterbox import Mode, letterbox_mask
from ris_core.data.shards import MANIFEST, SCHEMA_VERSION, SHARD_SCHEMA, decode_pixels
from ris_core.errors import DataError, list_problems
from ris_core.files import file_sha256

CACHED_ROWS = 4096
# To open one again takes 0.15 ms; a thousand of them hold 150 MB, and a process may have only so many maps (65530 on Linux).
OPEN_SHARDS = 128

Tokenize = Callable[[Sequence[str]], torch.Tensor]  # a system's: sentences -> int64 (N, L)


class ShardStore:
    """All images of one prepared dataset, addressed by index 0..len-1; shards are memory-mapped, not loaded.

    In memory are some bytes for each referent, in columns over all of them in the order of the images: `ref_image` (index of
    its image), `ref_position` (its place among that image's) and `ref_split` (a number, index into `splits`).

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
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        self._index_refs()
        self.row = lru_cache(CACHED_ROWS)(self._row)

    def _open(self, shard: int) -> pa.RecordBatch:
        """Map a shard into memory; what is used of it is read when it is."""
        table = self._read(shard, pa.memory_map)
        return table.combine_chunks().to_batches()[0] if len(table) else _empty(table.schema)

    def _column(self, shard: int, name: str) -> pa.Array:
        """Read a column and nothing else: in a map, every first touch has the system read what lies around it too."""
        options = pa.ipc.IpcReadOptions(included_fields=[SHARD_SCHEMA.get_field_index(name)])
        return self._read(shard, pa.OSFile, options).column(name).combine_chunks()

    def _read(
        self, shard: int, opened: Callable[[str], pa.NativeFile], options: pa.ipc.IpcReadOptions | None = None
    ) -> pa.Table:
        path = self.folder / self.manifest["shards"][shard]["file"]
        if not path.exists():
            raise DataError(f"{path} is named in the manifest but missing: preprocess this dataset again")
        try:
            return pa.ipc.open_file(opened(str(path)), options=options).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged ({error}): delete it and preprocess this dataset again") from None

    def verify(self) -> None:
        """Raise DataError, naming them, unless the bytes of all shards are those that the manifest was written for."""
        entries = self.manifest["shards"]
        damaged = [entry["file"] for entry in entries if file_sha256(self.folder / entry["file"]) != entry["sha256"]]
        if damaged:
            remedy = "Delete them and run the preprocess stage again (or `dvc checkout`, where DVC's cache has them)."
            raise DataError(list_problems(f"{self.folder}: shards with other bytes than were written", damaged, remedy))

    def _index_refs(self) -> None:
        """Flatten all referents to numpy columns."""
        images, positions, splits = [], [], []
        known: dict[str, int] = {}
        first, self._ends = 0, np.zeros(len(self.manifest["shards"]), np.int64)
        for shard in range(len(self._ends)):
            refs = self._column(shard, "refs")
            lengths = refs.value_lengths().to_numpy(zero_copy_only=False)
            images.append(_narrow(first + np.repeat(np.arange(len(lengths)), lengths)))
            positions.append(_narrow(np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)))
            split = refs.flatten().field("split").dictionary_encode()
            numbers = np.array([known.setdefault(name, len(known)) for name in split.dictionary.to_pylist()], np.uint8)
            splits.append(numbers[split.indices.to_numpy()])
            first += len(lengths)
            self._ends[shard] = first
        self.splits = list(known)
        self.ref_image, self.ref_position = np.concatenate(images), np.concatenate(positions)
        self.ref_split = np.concatenate(splits)

    @cached_property
    def is_generalised(self) -> bool:
        """Tell whether some referent has none or several annotations, see `ris_core.data.refer.generalised`."""
        columns = (self._column(shard, "refs").flatten().field("ann_id") for shard in range(len(self._ends)))
        return any(len(column) > 0 and column.to_numpy().min() < 0 for column in columns)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        """Give the shard that holds an image, and its row there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._shard(shard)
        return batch, int(index) - int(self._ends[shard]) + batch.num_rows  # an index may come in a narrow type

    def pixels(self, index: int) -> np.ndarray:
        """Give the letterboxed image, uint8 (S, S, 3), read-only."""
        batch, row = self._place(index)
        content = batch.column("image")[row].as_buffer()
        return decode_pixels(content, self.manifest["storage"], self.image_size)

    def _row(self, index: int) -> dict[str, Any]:
        batch, row = self._place(index)
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names if name != "image"}

    def mask(self, index: int, ann_id: int) -> np.ndarray:
        """Give the exact mask of one annotation at original size, uint8 (height, width) of 0/1."""
        row = self.row(index)
        counts = next(item["counts"] for item in row["instances"] if item["ann_id"] == ann_id)
        return masks.decode(counts, row["height"], row["width"])

    def places(self) -> dict[int, int]:
        """Give the index of every image by its id."""
        ids = [image_id for shard in range(len(self._ends)) for image_id in self._column(shard, "image_id").to_pylist()]
        return {image_id: index for index, image_id in enumerate(ids)}

    def refs_of(self, split: str) -> np.ndarray:
        """Give indices of the referents in `split`, ascending. Raises DataError if there is none."""
        if split not in self.splits:
            known = ", ".join(self.manifest["splits"])
            raise DataError(f"{self.manifest['dataset']} has no split '{split}'; it has {known}")
        return np.flatnonzero(self.ref_split == self.splits.index(split))

    def images_of(self, split: str) -> np.ndarray:
        """Give indices of the images with at least one referent in `split`. Raises DataError if there is none."""
        return np.unique(self.ref_image[self.refs_of(split)])


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Give whole numbers from 0 on in the narrowest type that holds them."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))


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
        self.refs = _narrow(store.refs_of(split))
        _, of_image = np.unique(store.ref_image[self.refs], return_counts=True)
        self.of_image = _narrow(of_image)  # how many of the referents each image has that has any
        self.steps = int((-(-of_image // plan.expressions_per_image)).sum()) // plan.batch_images
        if not self.steps:
            raise DataError(f"split '{split}' has fewer groups than one batch of {plan.batch_images} images")
        if plan.steps_per_epoch:
            self.steps = min(self.steps, plan.steps_per_epoch)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches `__getitem__` returns."""
        self.groups, self._numbers = self._groups(epoch)

    def _groups(self, epoch: int) -> tuple[np.ndarray, np.random.PCG64]:
        """Give referents (G, k) of every group in this epoch's order, and what draws the choices of sentences after that."""
        numbers = np.random.PCG64([self.plan.seed, epoch])
        random = np.random.Generator(numbers)
        k = self.plan.expressions_per_image
        refs = random.permutation(self.refs)
        if k == 1:
            return refs[:, None], numbers
        refs = refs[np.argsort(self.store.ref_image[refs], kind="stable")]
        return random.permutation(refs[filled(self.of_image, k)]), numbers

    def choice(self, first: int, last: int) -> np.ndarray:
        """Give uniform numbers (last - first, k) that choose the sentences of the groups first..last-1 of this epoch.

        They are drawn where they are needed: the epoch's sequence is entered at its place.
        """
        k = self.plan.expressions_per_image
        numbers = copy(self._numbers).advance(first * k)
        return np.random.Generator(numbers).random((last - first, k))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        share = self.plan.batch_images // self.world
        start = step * self.plan.batch_images + self.rank * share
        groups, choice = self.groups[start : start + share], self.choice(start, start + share)
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


def filled(counts: np.ndarray, k: int) -> np.ndarray:
    """Give which members fill groups of k, (G, k), when rows of so many members each lie end to end.

    A row's groups take its members in turn, and from its first again until the last group is full.
    """
    slots = -(-counts.astype(np.int64) // k) * k
    member = np.arange(slots.sum())  # worked on in place: for millions of images its copies would be most of the memory
    member -= np.repeat(np.cumsum(slots) - slots, slots)
    member %= np.repeat(counts, slots)
    member += np.repeat(np.cumsum(counts, dtype=np.int64) - counts, slots)
    return member.reshape(-1, k)

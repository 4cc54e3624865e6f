"""Reading shards: random access for evaluation, and training batches as a pure function of (seed, epoch, step).

Nothing here remembers a position. A batch is computed from its number alone, so a run that resumes anywhere, or in
another number of processes, sees the same sequence of (referent, sentence) pairs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ris_core.data import masks
from ris_core.data.ahead import ahead
from ris_core.data.letterbox import Mode, letterbox_mask
from ris_core.data.shard_view import ShardView
from ris_core.data.shards import MANIFEST, SCHEMA_VERSION, SHARD_SCHEMA, TARGET_STRIDE
from ris_core.errors import DataError, list_problems
from ris_core.files import file_sha256

CACHED_ROWS = 4096
# To open one again takes 0.15 ms; a thousand of them hold 150 MB, and a process may have only so many maps (65530 on Linux).
OPEN_SHARDS = 128

Batch = dict[str, torch.Tensor]
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
            dataset = shlex.quote(str(self.manifest.get("dataset")))
            raise DataError(
                f"{manifest}: shard schema {found}, this code reads {SCHEMA_VERSION}: run `ris preprocess --dataset {dataset}`"
            )
        self.image_size: int = self.manifest["image_size"]
        self.resample: Mode = self.manifest["resample"]
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        self._index_refs()
        self.row = lru_cache(CACHED_ROWS)(self._row)

    def __reduce__(self) -> tuple[type[ShardStore], tuple[Path]]:
        """Have it opened again where it is sent to: a loader's process that is no copy of this one."""
        return type(self), (self.folder,)

    def _open(self, shard: int) -> ShardView:
        """Map a shard into memory; what is used of it is read when it is."""
        table = self._read(shard, pa.memory_map)
        batch = table.combine_chunks().to_batches()[0] if len(table) else _empty(table.schema)
        return ShardView(batch, self.manifest["storage"], self.image_size)

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

    def place(self, index: int) -> tuple[ShardView, int]:
        """Give the shard that holds an image, and its row there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        view = self._shard(shard)
        return view, int(index) - int(self._ends[shard]) + view.batch.num_rows  # an index may come in a narrow type

    def pixels(self, index: int) -> np.ndarray:
        """Give the letterboxed image, uint8 (S, S, 3), read-only."""
        view, row = self.place(index)
        return view.pixels(row)

    def _row(self, index: int) -> dict[str, Any]:
        view, row = self.place(index)
        names = (name for name in view.batch.schema.names if name not in ("image", "targets"))
        return {name: view.batch.column(name)[row].as_py() for name in names}

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


class Room(NamedTuple):
    """Memory for a batch, pinned where there is a GPU, to be copied there while the device works."""

    images: torch.Tensor  # uint8 (B, S, S, 3)
    targets: torch.Tensor  # uint8 (N, S/stride, S/stride)


class Epoch:
    """What an epoch draws, and its batches by step: `groups`, the referents (G, k) of every group in its order, and what
    chooses their sentences.
    """

    def __init__(self, of: TrainingBatches, groups: np.ndarray, numbers: np.random.PCG64):
        self.of, self.groups, self.numbers = of, groups, numbers

    def choice(self, first: int, last: int) -> np.ndarray:
        """Give uniform numbers (last - first, k) that choose the sentences of the groups first..last-1.

        They are drawn where they are needed: the epoch's sequence is entered at its place.
        """
        k = self.groups.shape[1]
        numbers = copy(self.numbers).advance(first * k)
        return np.random.Generator(numbers).random((last - first, k))

    def __getitem__(self, step: int) -> Batch:
        return self.filled(step, self.of.room())

    def filled(self, step: int, room: Room) -> Batch:
        """Make the batch of a step in the memory given."""
        plan = self.of.plan
        share = plan.batch_images // self.of.world
        start = step * plan.batch_images + self.of.rank * share
        return self.of.batch(self.groups[start : start + share], self.choice(start, start + share), room)


class TrainingBatches:
    """The batches of a rank, by epoch and step.

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
            raise DataError(
                f"split '{split}' has fewer groups than one batch of {plan.batch_images} images: lower train.batch_images"
            )
        if plan.steps_per_epoch:
            self.steps = min(self.steps, plan.steps_per_epoch)

    def epoch(self, number: int) -> Epoch:
        """Draw an epoch."""
        numbers = np.random.PCG64([self.plan.seed, number])
        random = np.random.Generator(numbers)
        k = self.plan.expressions_per_image
        refs = random.permutation(self.refs)
        if k == 1:
            return Epoch(self, refs[:, None], numbers)
        refs = refs[np.argsort(self.store.ref_image[refs], kind="stable")]
        return Epoch(self, random.permutation(refs[filled(self.of_image, k)]), numbers)

    def __len__(self) -> int:
        return self.steps

    def room(self) -> Room:
        """Make room for a batch."""
        images, size, side = (
            self.plan.batch_images // self.world,
            self.store.image_size,
            self.store.image_size // self.stride,
        )
        pinned = torch.cuda.is_available()
        return Room(
            torch.empty(images, size, size, 3, dtype=torch.uint8, pin_memory=pinned),
            torch.empty(images * self.plan.expressions_per_image, side, side, dtype=torch.uint8, pin_memory=pinned),
        )

    def batch(self, groups: np.ndarray, choice: np.ndarray, room: Room) -> Batch:
        """Make the batch of groups (B, k) of referents whose sentences are chosen by uniform numbers (B, k)."""
        store = self.store
        places = [store.place(int(store.ref_image[group[0]])) for group in groups]
        for pixels, (view, row) in zip(room.images.numpy(), places, strict=True):
            pixels[:] = view.pixels(row)
        texts = []
        chosen = zip(groups.ravel().tolist(), choice.ravel().tolist(), room.targets.numpy(), strict=True)
        for number, (ref, uniform, target) in enumerate(chosen):
            view, row = places[number // groups.shape[1]]
            position = int(store.ref_position[ref])
            texts.append(view.text(row, position, uniform, self.plan.text))
            target[:] = self._target(view, row, position)
        return {
            "image": room.images.permute(0, 3, 1, 2),
            "tokens": self.tokenize(texts),
            "image_index": torch.arange(len(groups)).repeat_interleave(groups.shape[1]),
            "target": room.targets[:, None],
        }

    def _target(self, view: ShardView, row: int, position: int) -> np.ndarray:
        """Give a referent's target at this stride, uint8 (S/stride, S/stride)."""
        times, rest = divmod(self.stride, TARGET_STRIDE)
        if rest:  # finer than what shards hold: made of the exact mask, which takes longer
            counts, height, width = view.mask(row, position)
            store = self.store
            return letterbox_mask(masks.decode(counts, height, width), store.image_size, self.stride, store.resample)
        return view.target(row, position)[::times, ::times]

    def loader(self, epoch: int, first_step: int = 0, threads: int = 0) -> Iterator[Batch]:
        """Give batches of `epoch` from `first_step` on, made ahead by `threads` (0: each when it is asked for).

        Threads, not processes: most of the work is copying and decoding, which run beside each other, and what another
        process makes has to come through shared memory, whose pages alone take five times as long as the batch.
        """
        drawn = self.epoch(epoch)
        # Room is made by the one who asks: what he has let go of is used again, where a thread would be given new pages.
        steps = ((step, self.room()) for step in range(first_step, self.steps))
        return ahead(lambda each: drawn.filled(*each), steps, threads)


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

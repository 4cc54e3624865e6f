"""One shard in memory: what training reads of a row, found by the columns' offsets, without making a Python object of it."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from ris_core.data.shards import TARGET_STRIDE, decode_pixels


class ShardView:
    """A shard's rows, addressed by their place in it; of the columns only what is asked for is touched."""

    def __init__(self, batch: pa.RecordBatch, storage: str, image_size: int):
        self.batch, self.storage, self.image_size = batch, storage, image_size
        self._texts: dict[str, pa.StringArray] = {}

    @cached_property
    def _images(self) -> pa.LargeBinaryArray:
        return self.batch.column("image")

    @cached_property
    def _targets(self) -> pa.LargeBinaryArray:
        return self.batch.column("targets")

    @cached_property
    def _refs(self) -> np.ndarray:
        """Where each row's referents begin among all, int32 (rows + 1,)."""
        return np.asarray(self.batch.column("refs").offsets)

    @cached_property
    def _sentences(self) -> pa.ListArray:
        """The sentences of each of all referents."""
        return self.batch.column("refs").values.field("sentences")

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each referent's sentences begin among all, int32 (referents + 1,)."""
        return np.asarray(self._sentences.offsets)

    def pixels(self, row: int) -> np.ndarray:
        """Give the letterboxed image, uint8 (S, S, 3), read-only."""
        return decode_pixels(self._images[row].as_buffer(), self.storage, self.image_size)

    def target(self, row: int, position: int) -> np.ndarray:
        """Give what a referent's mask is in training, uint8 (S/4, S/4) of levels 0..255, read-only; see `letterbox_mask`."""
        side = self.image_size // TARGET_STRIDE
        content = np.frombuffer(self._targets[row].as_buffer(), np.uint8)
        return content[position * side * side : (position + 1) * side * side].reshape(side, side)

    def text(self, row: int, position: int, uniform: float, field: str) -> str:
        """Give a referent's sentence that a number 0 <= uniform < 1 chooses, as its `field`: sent or raw."""
        if field not in self._texts:
            self._texts[field] = self._sentences.values.field(field)
        first, end = self._ends[self._refs[row] + position :][:2].tolist()
        return str(self._texts[field][first + int(uniform * (end - first))].as_py())

    def mask(self, row: int, position: int) -> tuple[str, int, int]:
        """Give the run lengths of a referent's exact mask, and the height and width of its image."""
        refs, instances = self.batch.column("refs"), self.batch.column("instances")
        ann_id = refs.values.field("ann_id")[int(self._refs[row]) + position].as_py()
        first, end = instances.offsets[row].as_py(), instances.offsets[row + 1].as_py()
        place = first + instances.values.field("ann_id").slice(first, end - first).index(ann_id).as_py()
        height, width = (self.batch.column(name)[row].as_py() for name in ("height", "width"))
        return str(instances.values.field("counts")[place].as_py()), height, width

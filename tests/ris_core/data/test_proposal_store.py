"""Proposals on disk come back as they were; what was not made is named, and a part is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ris_core.data import proposal_store
from ris_core.data.proposal_store import ProposalStore, decode_all, part_counts, write_manifest, write_part
from ris_core.errors import DataError

RANDOM = np.random.default_rng(0)
IMAGES = {
    7: RANDOM.random((3, 11, 17)) > 0.5,
    3: RANDOM.random((1, 20, 5)) > 0.9,
    9: np.zeros((0, 8, 6), bool),
    4: np.stack([np.ones((4, 4), bool), np.eye(4, dtype=bool)]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Proposals of four images in two parts."""
    items = list(IMAGES.items())
    for number, part in enumerate((items[:2], items[2:])):
        write_part(tmp_path / f"part-{number:05d}.parquet", part)
    names = [f"part-{number:05d}.parquet" for number in range(2)]
    write_manifest(tmp_path, {"splits": ["val", "testA"], "parts": names})
    return tmp_path


def test_proposals_come_back_as_they_were(folder: Path) -> None:
    store = ProposalStore(folder)
    for image_id, expected in IMAGES.items():
        found = store.masks(image_id)
        assert found.dtype == np.bool_
        assert np.array_equal(found, expected)


def test_an_image_without_proposals_keeps_its_size(folder: Path) -> None:
    assert ProposalStore(folder).masks(9).shape == (0, 8, 6)
    assert decode_all([], 8, 6).shape == (0, 8, 6)


def test_a_part_tells_how_many_each_image_has(folder: Path) -> None:
    counts = part_counts(folder / "part-00000.parquet") | part_counts(folder / "part-00001.parquet")
    assert counts == {image_id: len(masks) for image_id, masks in IMAGES.items()}


def test_the_parts_are_readable_without_us(folder: Path) -> None:
    table = pq.read_table(folder / "part-00001.parquet")
    assert table.schema.names == ["image_id", "height", "width", "counts"]
    assert table.drop_columns("counts").to_pylist()[0] == {"image_id": 9, "height": 8, "width": 6}


def test_the_same_proposals_are_the_same_bytes(folder: Path) -> None:
    write_part(folder / "again.parquet", list(IMAGES.items())[:2])
    assert (folder / "again.parquet").read_bytes() == (folder / "part-00000.parquet").read_bytes()


def test_a_part_may_hold_no_image(folder: Path) -> None:
    write_part(folder / "none.parquet", [])
    assert part_counts(folder / "none.parquet") == {}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_manifest_is_not_finished(there: bool, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    place = folder if there else folder / "nowhere"
    with pytest.raises(
        DataError, match=rf"{place}/manifest\.json does not exist: run the propose stage for this datas"
    ):
        ProposalStore(place)


def test_an_image_that_was_left_out_is_named_with_the_splits_that_were_not(folder: Path) -> None:
    with pytest.raises(DataError) as told:
        ProposalStore(folder).masks(5)
    assert str(told.value) == (
        f"{folder} has no proposals of image 5; they were made for ['val', 'testA']. Set proposals.splits, or run the "
        "propose stage again"
    )
    write_manifest(folder, {"splits": [], "parts": []})
    with pytest.raises(
        DataError, match="no proposals of image 7; they were made for no split: no system among `systems`"
    ):
        ProposalStore(folder).masks(7)


def test_a_part_whose_masks_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[int, np.ndarray]]:
        yield 7, IMAGES[7]
        raise DataError("the second photo cannot be read")

    with pytest.raises(DataError, match="the second photo cannot be read"):
        write_part(tmp_path / "part-00000.parquet", failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, b"what was there before"])
def test_a_part_that_is_stopped_while_written_leaves_nothing_half_written(
    old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object, place: Path) -> None:
        place.write_bytes(b"PAR1 and no more")
        raise KeyboardInterrupt

    part = tmp_path / "part-00000.parquet"
    if old:
        part.write_bytes(old)
    monkeypatch.setattr(proposal_store.pq, "write_table", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_part(part, IMAGES.items())
    assert (part.read_bytes() if part.exists() else None) == old
    assert [path for path in tmp_path.iterdir() if path.suffix == ".parquet"] == ([part] if old else [])

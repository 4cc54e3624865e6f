from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ris_core.data.records import (
    ROW_GROUP_IMAGES,
    ImageRecord,
    Instance,
    Reference,
    Sentence,
    count_records,
    count_references,
    read_records,
    write_records,
)
from ris_core.errors import DataError


def some_records(count: int = 3) -> list[ImageRecord]:
    return [
        ImageRecord(
            image_id=number,
            file_name=f"images/train2014/COCO_train2014_{number:012d}.jpg",
            height=480,
            width=640,
            instances=tuple(
                Instance(10 * number + k, 3, "cat", k, (1.5, 2.0, 3.25, 4.0), 12.125, "0d0" * (k + 1)) for k in (0, 1)
            ),
            refs=(Reference(number, 10 * number, 3, "val", (Sentence(7, "", "Café!"), Sentence(8, "b c", "B c"))),),
        )
        for number in range(count)
    ]


def test_records_survive_the_round_trip(tmp_path: Path) -> None:
    # 5000 rows make several row groups; an image may have objects and no referents.
    records = [*some_records(5000), ImageRecord(10**12, "x.jpg", 1, 1, (), ())]
    write_records(tmp_path / "new" / "folder" / "r.parquet", records, "refcoco_unc")
    assert read_records(tmp_path / "new" / "folder" / "r.parquet") == records


def test_a_share_of_a_file_is_a_slice_across_its_row_groups(tmp_path: Path) -> None:
    records, edge = some_records(2 * ROW_GROUP_IMAGES + 10), ROW_GROUP_IMAGES
    write_records(tmp_path / "r.parquet", records, "shapes")
    assert count_records(tmp_path / "r.parquet") == len(records)
    assert count_references(tmp_path / "r.parquet") == sum(len(record.refs) for record in records)
    ends = len(records)
    for first, last in [(0, 3), (edge - 2, edge + 2), (edge, 2 * edge), (5, ends - 5), (ends - 1, ends + 9), (7, 7)]:
        assert read_records(tmp_path / "r.parquet", first, last) == records[first:last]


def test_damage_inside_a_whole_looking_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, some_records(), "shapes")
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # after the magic number: data pages, the footer stays
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)not a whole Parquet file.*run `prepare` again"):
        read_records(path)


def test_equal_records_give_equal_bytes_with_their_dataset(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_records(tmp_path / name, some_records(), "refcoco+_unc")
    write_records(tmp_path / "c", some_records(2), "refcoco+_unc")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert pq.read_schema(tmp_path / "a").metadata[b"ris.dataset"] == b"refcoco+_unc"
    assert pq.read_table(tmp_path / "a").num_rows == 3


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, some_records(), "shapes")
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_records(path, [ImageRecord(1, "\ud800.jpg", 1, 1, (), ())], "shapes")

    def disk_full(writer: pq.ParquetWriter, table: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_records(path, some_records(2), "shapes")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_names_the_stage_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.parquet: no such records file; the stage `prepare` writes it"):
        read_records(tmp_path / "r.parquet")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, some_records(), "shapes")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"not a whole Parquet file.*run `prepare` again"):
        read_records(path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_records(path, some_records(), "shapes")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"ris.schema_version": "0"}), path)
    with pytest.raises(DataError, match="has schema version 0, this code reads 1; run `prepare` again"):
        read_records(path)
    pq.write_table(table.drop_columns(["height"]), path)
    with pytest.raises(DataError, match="has other columns than records have"):
        read_records(path)

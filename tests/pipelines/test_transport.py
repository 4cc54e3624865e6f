"""Files on their way to workers of other nodes and back: by content, checked on arrival, in a bounded cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pipelines_world import DATASET, REPOSITORY, Workplace, contents

from pipelines import paths, preprocess, propose, transport
from pipelines.transport import Parcel, Place, Road
from ris_core.errors import ClusterError, DataError
from ris_core.storage import Storage

if TYPE_CHECKING:
    from tiny_world import Tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transport, "_held", {})


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    for name, text in {"a.txt": "a" * 100, "below/b.txt": "b" * 200, "below/same.txt": "a" * 100}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def objects(storage: Storage) -> list[str]:
    return [name for name in storage.names() if name.startswith("objects/")]


def test_where_all_nodes_see_the_files_nothing_is_copied(folder: Path, tmp_path: Path) -> None:
    place = Road(None).offer(folder)
    assert place.local() == folder.absolute()
    assert not (tmp_path / "cache").exists()


def test_a_folder_arrives_as_it_was_and_equal_files_travel_once(folder: Path, storage: Storage) -> None:
    place = Place.of(json.loads(json.dumps(Road(storage).offer(folder).plain())))
    assert contents(place.local()) == contents(folder)
    assert place.local() != folder
    assert len(objects(storage)) == 2


def test_a_file_arrives_and_chosen_files_of_a_folder(folder: Path, storage: Storage) -> None:
    assert Road(storage).offer(folder / "a.txt").local().read_text() == "a" * 100
    assert list(contents(Road(storage).offer(folder, ["below/b.txt"]).local())) == ["below/b.txt"]
    assert contents(Road(storage).offer(folder, []).local()) == {}
    with pytest.raises(DataError, match=r"lacks files \(1 problem\):\n  - nothing.txt"):
        Road(storage).offer(folder, ["a.txt", "nothing.txt"])


def test_what_is_there_is_not_put_there_again(folder: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    Road(storage).offer(folder)
    monkeypatch.setattr(Storage, "upload", lambda *_: pytest.fail("it was uploaded again"))
    Road(storage).offer(folder)


def test_half_an_object_is_put_there_again(folder: Path, storage: Storage) -> None:
    Road(storage).offer(folder)
    name = objects(storage)[0]
    storage.write(name, storage.read(name)[:10])
    assert contents(Road(storage).offer(folder).local()) == contents(folder)


def test_an_object_with_other_bytes_is_found_and_removed(folder: Path, storage: Storage, tmp_path: Path) -> None:
    place = Road(storage).offer(folder)
    name = objects(storage)[0]
    storage.write(name, b"x" * len(storage.read(name)))
    with pytest.raises(ClusterError, match="was not what its name says and is removed: start again"):
        place.local()
    assert name not in objects(storage)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # nothing half unpacked
    assert contents(Road(storage).offer(folder).local()) == contents(folder)


def in_another_process(parcel: Parcel, code: str) -> str:
    """Unpack in a fresh process and run code that knows the folder as `local`."""
    script = f"""
import json, sys
from pipelines.transport import Place
local = Place.of(json.loads(sys.argv[1])).local()
{code}
"""
    text = json.dumps(Place(parcel=parcel).plain())
    done = subprocess.run(
        [sys.executable, "-c", script, text],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout + done.stderr


def test_a_node_fetches_once_and_finds_what_became_damaged(
    folder: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = Road(storage).offer(folder).parcel
    assert parcel is not None
    local = transport.unpacked(parcel)
    for name in objects(storage):
        storage.delete(name)
    assert "b" * 200 in in_another_process(parcel, "print((local / 'below/b.txt').read_text())")  # from the cache
    Road(storage).offer(folder)
    (local / "a.txt").write_text("c" * 100)
    told = in_another_process(parcel, "print((local / 'a.txt').read_text())")
    assert "is not what was unpacked (a.txt): fetching it again" in told
    assert "a" * 100 in told


def test_the_cache_is_bounded_and_what_is_read_stays(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcels = []
    for number in range(3):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 1000)
        parcels.append(Road(storage).offer(tmp_path / f"{number}").parcel)
    monkeypatch.setenv("RIS_CACHE_GB", "2.5e-6")
    first, second, third = (parcel for parcel in parcels if parcel is not None)
    kept = transport.unpacked(first)  # this process reads it until it ends
    in_another_process(second, "")
    assert (tmp_path / "cache" / second.digest).exists()
    transport.unpacked(third)
    assert not (tmp_path / "cache" / second.digest).exists()
    assert kept.read_bytes() == bytes(1000)
    with pytest.raises(ClusterError, match=r"do not fit into .* raise RIS_CACHE_GB"):
        transport.unpacked(second)


def test_room_is_found_while_others_give_up_what_they_fetched(
    tmp_path: Path, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = Road(storage).offer(folder).parcel
    assert parcel is not None
    ended = threading.Event()

    def fetched_and_given_up() -> None:
        while not ended.is_set():
            content = tmp_path / "cache" / "another.partial" / "content"
            for number in range(20):
                (content / f"{number}").mkdir(parents=True, exist_ok=True)
                (content / f"{number}" / "file").write_bytes(b"1")
            shutil.rmtree(content.parent)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fetched_and_given_up)
        try:
            for _ in range(100):
                monkeypatch.setattr(transport, "_held", {})
                shutil.rmtree(tmp_path / "cache" / parcel.digest, ignore_errors=True)
                assert contents(transport.unpacked(parcel)) == contents(folder)
        finally:
            ended.set()
        other.result()


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up"])
def test_a_parcel_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ClusterError, match="outside of its folder"):
        Parcel("somewhere", {name: ("0" * 64, 1)})


@pytest.fixture
def elsewhere(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Workers that are treated as if they saw nothing of this machine."""
    monkeypatch.setattr(Road, "find", classmethod(lambda cls: cls(storage)))
    return storage


@pytest.mark.ray
def test_shards_and_proposals_made_elsewhere_are_the_same_bytes(
    workplace: Workplace, ray_session: None, elsewhere: Storage, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.link("raw", "records")
    workplace.change(systems=["global_local"], preprocess={"images_per_shard": 8})
    monkeypatch.setattr(propose, "IMAGES_PER_PART", 8)

    def made() -> dict[str, bytes]:
        preprocess.main(DATASET)
        propose.main(DATASET)
        return {**contents(paths.shards(DATASET)), **contents(paths.proposals(DATASET))}

    away = made()
    assert objects(elsewhere)
    monkeypatch.setattr(Road, "find", classmethod(lambda cls: cls(None)))
    assert made() == away


@pytest.mark.ray
def test_parts_that_came_back_are_not_made_again(
    workplace: Workplace, ray_session: None, elsewhere: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.link("raw", "records")
    workplace.change(preprocess={"images_per_shard": 8})
    whole, taken = transport.take, []

    def stopped(path: Path, digest: str, storage: Storage) -> None:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(path.name)
        whole(path, digest, storage)

    with monkeypatch.context() as patch:
        patch.setattr(transport, "take", stopped)
        with pytest.raises(KeyboardInterrupt):
            preprocess.main(DATASET)
    again = []
    monkeypatch.setattr(transport, "take", lambda path, *rest: (again.append(path.name), whole(path, *rest)))
    preprocess.main(DATASET)
    assert not {*taken} & {*again}
    assert again


@pytest.mark.ray
def test_an_error_meant_for_people_comes_back_as_such(
    workplace: Workplace, ray_session: None, elsewhere: Storage
) -> None:
    workplace.link("raw", "records")
    workplace.change(preprocess={"images_per_shard": 1000})  # one task: the first to find it removes it, others miss it
    place = Road(elsewhere)
    whole = place.offer

    def spoilt(self: Road, path: Path, names: object = None) -> Place:
        found = whole(path, names)  # type: ignore[arg-type]
        for name in objects(elsewhere):
            elsewhere.write(name, b"?" * len(elsewhere.read(name)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Road, "offer", spoilt)
        with pytest.raises(ClusterError, match=r"^objects/\S+ \(\S+\) in \S+ was not what its name says"):
            preprocess.main(DATASET)
    assert not paths.shards(DATASET).exists()

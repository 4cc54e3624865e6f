"""`ris fetch`, from a server on this machine, through a proxy, from a folder and a bucket: what is there in the end, and what is
said where something is wrong.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fetch_world import Server, cut, page, serving, sha256, slow, status, zipped
from pipelines_world import REPOSITORY, started, wait_for
from refer_fixture import IMAGES_2014, small_dataset, write_jpeg

from pipelines import fetch
from pipelines.fetch import Photos
from pipelines.fetching import catalogue, download, photos
from pipelines.fetching.catalogue import Wanted
from pipelines.fetching.mirrors import Mirrors, joined
from pipelines.fetching.recipes import RECIPES, Recipe, next_steps, settings
from pipelines.params import load_params
from ris_core.data.refer.audit import prepare
from ris_core.data.refer.reader import DatasetName, facts
from ris_core.errors import ConfigError, DataError
from ris_core.storage import Storage

COUNT = 6  # photos
PHOTO = "http://images.cocodataset.org/train2014/COCO_train2014_{:012d}.jpg"
OVER_TLS = "https://s3.amazonaws.com/images.cocodataset.org/"
KILLED = """
import json, sys
from pathlib import Path
from pipelines import fetch
from pipelines.fetching import catalogue
content = json.loads(sys.argv[1])
catalogue.facts = lambda: content
fetch.main("refcoco_unc", to=Path("raw"), mirrors=Path("mirrors.yaml"))
"""


@dataclass
class World:
    """A server that is also the proxy, with all files of a small RefCOCO, and a folder to fetch into."""

    server: Server
    root: Path
    content: dict[str, bytes]  # of files by the names that mirrors know

    @property
    def to(self) -> Path:
        return self.root / "raw"

    def fetch(self, dataset: str = "refcoco_unc", **options: Any) -> None:
        fetch.main(dataset, to=self.to, **options)

    def prepared(self, dataset: str = "refcoco_unc") -> int:
        """How many images `prepare` accepts."""
        root = self.to / dataset
        records, _ = prepare(root, dataset, on_bad="error", strict=False, exclude={}, check_images=True, workers=2)
        return len(records)

    def mirrors(self, content: object) -> Path:
        path = self.root / "mirrors.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def asked(self) -> list[str]:
        return sorted(served.path for served in self.server.log)

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.to).as_posix() for path in self.to.rglob("*") if path.is_file())


def files_of_refcoco(folder: Path) -> dict[str, bytes]:
    """The archives and single photos, as the official ones are laid out."""
    small = small_dataset("refcoco_unc")
    small.write(folder)
    refs = [{**ref, "split": "val" if ref["split"].startswith("test") else ref["split"]} for ref in small.refs]
    read = {path.name: path.read_bytes() for path in (folder / "refcoco").iterdir()}
    plus = {name: read[name] for name in ("instances.json", "refs(unc).p")}
    read |= {"refs(google).p": pickle.dumps(refs, 2), ".DS_Store": b"?"}
    pictures = {path.name: path.read_bytes() for path in (folder / IMAGES_2014).iterdir()}
    return {
        "refcoco.zip": zipped({f"refcoco/{name}": each for name, each in read.items()}),
        "refcoco+.zip": zipped({f"refcoco+/{name}": each for name, each in plus.items()}),
        "train2014.zip": zipped({f"train2014/{name}": each for name, each in pictures.items()}),
        **{f"train2014/{name}": each for name, each in pictures.items()},
    }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    content = files_of_refcoco(tmp_path / "official")
    shutil.rmtree(tmp_path / "official")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        archives = {}
        for name, each in content.items():
            if name.endswith(".zip"):
                address = f"http://published.example/{name}"
                archives[name[:-4]] = {"url": address, "bytes": len(each), "sha256": sha256(each)}
                server.files[address] = each
            else:
                server.files[f"http://images.cocodataset.org/{name}"] = each
        counts = {name: {"total": {"images": COUNT}} for name in facts()["counts"]}
        monkeypatch.setattr(catalogue, "facts", lambda: {"archives": archives, "counts": counts})
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            monkeypatch.delenv(name.lower(), raising=False)
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTP_PROXY", server.address(""))
        monkeypatch.setenv("HTTPS_PROXY", server.address(""))  # which refuses to CONNECT
        yield World(server, tmp_path, content)


def test_a_dataset_from_its_published_addresses_through_a_proxy(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fetch()
    assert world.asked() == [
        "http://images.cocodataset.org/train2014/" + PHOTO.format(n)[-31:] for n in range(1, 7)
    ] + ["http://published.example/refcoco.zip"]
    assert world.prepared() == COUNT
    linked = {f"refcoco_unc/refcoco/{name}" for name in ("instances.json", "refs(unc).p")}
    linked |= {f"refcoco_unc/{IMAGES_2014}/COCO_train2014_{n:012d}.jpg" for n in range(1, 7)}
    kept = {f"fetched/refcoco/{name}" for name in ("instances.json", "refs(unc).p", "refs(google).p")}
    kept |= {f"fetched/train2014/COCO_train2014_{n:012d}.jpg" for n in range(1, 7)}
    assert set(world.files()) == linked | kept | {"fetched/.lock"}
    told = capsys.readouterr()
    assert "  refcoco.zip: " in told.err
    assert "6, if none is there: the annotations will tell" in told.err
    assert f"ln -s {world.to / 'refcoco_unc'} data/raw/refcoco_unc" in told.out
    assert told.out.endswith("then: make repro\n")


def test_what_is_there_is_not_fetched_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.fetch()
    world.server.log.clear()
    before = {path: path.stat().st_mtime_ns for path in world.to.rglob("*.jpg")}
    world.fetch()
    assert world.asked() == []
    assert {path: path.stat().st_mtime_ns for path in world.to.rglob("*.jpg")} == before
    assert f"all 6 are in {world.to / 'refcoco_unc'}" in capsys.readouterr().err


def test_datasets_share_what_they_have_in_common(world: World) -> None:
    world.fetch()
    world.server.log.clear()
    (world.to / "fetched/train2014/COCO_train2014_000000000002.jpg").unlink()
    before = set((world.to / "refcoco_unc").rglob("*"))
    world.fetch("refcoco+_unc")
    assert world.asked() == [PHOTO.format(2), "http://published.example/refcoco+.zip"]
    world.fetch("refcoco_google")
    assert len(world.server.log) == 2, "its annotations came with those of refcoco_unc"
    assert set((world.to / "refcoco_unc").rglob("*")) == before
    assert world.prepared("refcoco+_unc") == world.prepared("refcoco_google") == COUNT
    places = [world.to / name / IMAGES_2014 for name in ("refcoco_unc", "refcoco+_unc", "refcoco_google")]
    same = {(place / "COCO_train2014_000000000001.jpg").stat().st_ino for place in places}
    assert len(same) == 1, "one photo on the disk"


def test_all_photos_as_one_archive(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.fetch(photos=Photos.all)
    assert world.asked() == [f"http://published.example/{name}.zip" for name in ("refcoco", "train2014")]
    assert world.prepared() == COUNT
    assert not list((world.to / "fetched").glob("*.zip")), "archives go when they are unpacked"
    world.server.log.clear()
    world.fetch("refcoco+_unc", photos=Photos.all)
    assert world.asked() == ["http://published.example/refcoco+.zip"]
    (world.to / "fetched/train2014/COCO_train2014_000000000001.jpg").unlink()
    world.server.log.clear()
    world.fetch(photos=Photos.all)
    assert world.asked() == ["http://published.example/train2014.zip"], "some are gone: it is not all any more"


def test_an_archive_of_photos_that_was_partly_unpacked_is_gone_on_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill: the archive is whole, some photos are out, one is cut; and the disk has room for the rest alone."""
    world.fetch(photos=Photos.none)
    stock = world.to / "fetched"
    (stock / "train2014").mkdir()
    (stock / "train2014.zip").write_bytes(world.content["train2014.zip"])
    for number in range(1, 6):
        name = f"train2014/COCO_train2014_{number:012d}.jpg"
        (stock / name).write_bytes(world.content[name])
    (stock / "train2014/COCO_train2014_000000000005.jpg").write_bytes(b"cut")
    untouched = (stock / "train2014/COCO_train2014_000000000001.jpg").stat().st_ino
    left = len(world.content["train2014.zip"]) - sum(path.stat().st_size for path in (stock / "train2014").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, left))
    world.server.log.clear()
    world.fetch(photos=Photos.all)
    assert world.asked() == []
    assert world.prepared() == COUNT
    assert (stock / "train2014/COCO_train2014_000000000001.jpg").stat().st_ino == untouched
    assert not (stock / "train2014.zip").exists()


def test_annotations_alone(world: World) -> None:
    world.fetch(photos=Photos.none)
    assert world.asked() == ["http://published.example/refcoco.zip"]
    assert not list(world.to.rglob("*.jpg"))


def test_a_layout_of_the_users_own_is_filled_up_and_nothing_in_it_changed(world: World) -> None:
    """Files in another order of folders, under the names of 2017, in a folder that is a link."""
    mine, other = world.root / "mine", world.root / "mine/images/train2017"
    other.mkdir(parents=True)
    write_jpeg(other / "000000000001.jpg", 100, 80)
    (mine / "refcoco").mkdir()
    (mine / "refcoco/instances.json").write_bytes(files_of_refcoco(world.root / "again") and b"{}")
    shutil.copy(world.root / "again/refcoco/instances.json", mine / "refcoco/instances.json")
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*") if path.is_file()}
    world.to.mkdir()
    (world.to / "refcoco_unc").symlink_to(mine)
    world.fetch()
    assert PHOTO.format(1) not in world.asked()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert world.prepared() == COUNT


def test_where_there_are_no_hard_links_there_are_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    world.fetch()
    assert (world.to / f"refcoco_unc/{IMAGES_2014}/COCO_train2014_000000000001.jpg").is_symlink()
    assert world.prepared() == COUNT


def test_a_dry_run_tells_and_does_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.fetch(dry_run=True, clip=["RN50"], photos=Photos.all)
    told = capsys.readouterr().out
    assert not world.to.exists()
    assert world.asked() == []
    assert "refcoco.zip: " in told
    assert "from http://published.example/refcoco.zip" in told
    assert "from http://published.example/train2014.zip" in told
    assert "RN50.pt: about 255.9 MB from https://openaipublic.azureedge.net/clip/models/afeb" in told
    assert re.search(r"to receive: about 255.9 MB, 26 s at 10 MB/s or 3 s at 100 MB/s", told)
    assert re.search(r"disk: about \S+ MB more in the end, \S+ MB at most on the way; \S+ GB are free", told)
    world.fetch()
    (world.to / "refcoco_unc/images").rename(world.root / "away")
    capsys.readouterr()
    world.fetch(dry_run=True)
    told = capsys.readouterr().out
    assert f"refcoco.zip: is unpacked in {world.to / 'refcoco_unc/refcoco'}" in told
    assert "photos: 6, of them 0 in place, 6 to be linked, 0 to be fetched" in told


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_told_before_anything_is_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 1000, 1000))
    with pytest.raises(ConfigError, match=r"fetching refcoco_unc: that takes .* where 1.0 kB are free: make room"):
        world.fetch()
    assert world.asked() == []


def test_a_disk_that_gets_full_on_the_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched stays, and is gone on with."""
    written = photos.replaced_file

    def full(path: Path) -> object:
        if path.name.endswith("3.jpg"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return written(path)

    monkeypatch.setattr(photos, "replaced_file", full)
    with pytest.raises(ConfigError, match=r"cannot be written: No space left on device .*the same command goes on"):
        world.fetch()
    monkeypatch.setattr(photos, "replaced_file", written)
    kept = len(list((world.to / "fetched/train2014").glob("*.jpg")))
    assert kept >= 1
    world.server.log.clear()
    world.fetch()
    assert len(world.asked()) == COUNT - kept
    assert world.prepared() == COUNT


def test_an_unpacked_archive_that_does_not_fit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look, when the archive itself tells its sizes; the archive stays."""
    monkeypatch.setattr("pipelines.fetching.plan.UNPACKED", 0)
    archive = len(world.content["refcoco.zip"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, archive + 1))
    with pytest.raises(ConfigError, match=r"unpacking .*refcoco.zip: that takes"):
        world.fetch(photos=Photos.none)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    world.fetch(photos=Photos.none)
    assert len(world.asked()) == 1


def test_photos_that_cannot_be_had_are_listed_and_the_others_stay(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = world.server
    good = server.files[PHOTO.format(5)]
    write_jpeg(world.root / "large.jpg", 101, 80)
    server.always = {PHOTO.format(1): status(404), PHOTO.format(2): page, PHOTO.format(3): cut(100)}
    server.files[PHOTO.format(4)] = (world.root / "large.jpg").read_bytes()
    server.files[PHOTO.format(5)] = good[: len(good) // 2]
    server.quirks[PHOTO.format(6)] = [cut(100), status(503)]
    with pytest.raises(DataError) as error:
        world.fetch()
    told = str(error.value)
    assert told.startswith("photos of refcoco_unc could not be fetched (5 problems):")
    for number, reason in enumerate(
        (
            "answers 404 Not Found",
            "gives a web page in place of the photo, which says '404 Not Found'",
            "IncompleteRead(100 bytes read",
            "gives a photo of 101x80 pixels, instances.json says 100x80",
            "gives a photo that cannot be decoded (image file is truncated",
        ),
        start=1,
    ):
        assert re.search(
            rf"COCO_train2014_0*{number}.jpg: {re.escape(PHOTO.format(number))} .*{re.escape(reason)}", told
        )
    assert OVER_TLS in told, "the second address was asked as well"
    assert "The same command again asks for these alone; --mirrors names other addresses." in told
    assert told.endswith("To go on without them, set prepare.on_bad to skip in params.yaml.")
    records, _ = prepare(
        world.to / "refcoco_unc", "refcoco_unc", on_bad="skip", strict=False, exclude={}, check_images=True, workers=2
    )
    assert [record.image_id for record in records] == [6]
    assert [path.name[-5] for path in world.to.rglob("*.jpg")] == ["6", "6"]
    server.always.clear()
    server.log.clear()
    for number in (4, 5):
        server.files[PHOTO.format(number)] = world.content[PHOTO.format(number).partition(".org/")[2]]
    world.fetch()
    assert world.asked() == [PHOTO.format(number) for number in range(1, 6)]
    assert "5 photos are in place now" in capsys.readouterr().err
    assert world.prepared() == COUNT


def test_a_damaged_photo_of_the_stock_is_fetched_anew(world: World) -> None:
    world.fetch()
    shutil.rmtree(world.to / "refcoco_unc/images")
    (world.to / "fetched/train2014/COCO_train2014_000000000003.jpg").write_bytes(b"\xff\xd8 cut")
    world.server.log.clear()
    world.fetch()
    assert world.asked() == [PHOTO.format(3)]
    assert world.prepared() == COUNT


def test_an_address_that_gives_no_photos_is_asked_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photos, "PATIENCE", 2)
    monkeypatch.setattr(photos, "AT_ONCE", 1)
    dead = world.server.address("/dead/")
    world.fetch(mirrors=world.mirrors({"train2014/": dead}))
    assert len([path for path in world.asked() if path.startswith("/dead/") or "/dead/" in path]) == 2
    assert (
        f"{dead} did not give 2 photos in a row (answers 404 Not Found): it is asked no more" in capsys.readouterr().err
    )
    assert world.prepared() == COUNT


def test_a_mirror_of_everything_is_a_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    mirror = world.root / "a mirror"
    (mirror / "train2014").mkdir(parents=True)
    for name, content in world.content.items():
        (mirror / name).write_bytes(content)
    world.fetch("refcoco+_unc", mirrors=world.mirrors({"all": mirror.as_uri()}))
    assert world.prepared("refcoco+_unc") == COUNT
    assert world.asked() == []


def test_a_mirror_of_everything_is_a_bucket(
    world: World, new_bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bucket = new_bucket()
    for name, content in world.content.items():
        if name != "train2014/COCO_train2014_000000000002.jpg":
            Storage(bucket).write(name, content)
    world.fetch("refcoco+_unc", mirrors=world.mirrors({"all": bucket}))
    assert world.prepared("refcoco+_unc") == COUNT
    assert world.asked() == [PHOTO.format(2)], "only what the bucket lacks"
    assert "endpoint_override" not in capsys.readouterr().err


def test_mirrors_are_tried_in_order_and_failures_told(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    gone, right = world.server.address("/gone.zip"), world.server.address("/right.zip")
    for address, content in ((right, world.content["refcoco.zip"]),):
        world.server.files[address] = content
    world.fetch(photos=Photos.none, mirrors=world.mirrors({"refcoco.zip": [gone, right]}))
    assert world.asked() == [gone, right]
    assert f"{gone} answers 404 Not Found" in capsys.readouterr().err


def test_another_archive_is_refused_and_taken_where_its_sum_is_given(world: World) -> None:
    other = zipped({"refcoco/refs(unc).p": b"other", "refcoco/instances.json": b"other"})
    world.server.files["http://published.example/refcoco.zip"] = other
    with pytest.raises(DataError) as error:
        world.fetch(photos=Photos.none)
    assert f"has {len(other):,} bytes, published are {len(world.content['refcoco.zip']):,}" in str(error.value)
    assert "--accept-sha256" in str(error.value)
    assert "put the file itself at " in str(error.value)
    wrong = sha256(b"wrong")
    with pytest.raises(DataError) as error:
        world.fetch(photos=Photos.none, accept_sha256=wrong)
    published = sha256(world.content["refcoco.zip"])
    assert f"has the SHA-256 {sha256(other)}, published is {published} or {wrong}" in str(error.value)
    assert not (world.to / "fetched/refcoco").exists()
    world.fetch(photos=Photos.none, accept_sha256=sha256(other).upper())
    assert (world.to / "refcoco_unc/refcoco/refs(unc).p").read_bytes() == b"other"


def test_an_archive_that_was_put_there_by_hand_is_used(world: World) -> None:
    (world.to / "fetched").mkdir(parents=True)
    (world.to / "fetched/refcoco.zip").write_bytes(world.content["refcoco.zip"])
    world.fetch(photos=Photos.none)
    assert world.asked() == []
    assert (world.to / "refcoco_unc/refcoco/refs(unc).p").is_file()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"refcoco/refs(unc).p": b"1"},
            r"lacks files of refcoco_unc \(1 problem\):\n  - instances.json\nit has refs\(unc",
        ),
        ({"readme.txt": b"1"}, r"it has no annotations: get another"),
        ({"../refs(unc).p": b"1", "instances.json": b"1"}, r"'../refs\(unc\).p' leads out of its folder"),
    ],
)
def test_an_archive_of_something_else(files: dict[str, bytes], message: str, world: World) -> None:
    """Whose sum somebody took to be right."""
    other = zipped(files)
    world.server.files["http://published.example/refcoco.zip"] = other
    with pytest.raises(DataError, match=message):
        world.fetch(photos=Photos.none, accept_sha256=sha256(other))
    assert [name for name in world.files() if name.endswith(".p")] == []


def test_weights_of_clip(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = zipped({"RN50/data.pkl": os.urandom(5000)})
    wanted = Wanted("RN50.pt", "http://published.example/RN50.pt", (sha256(content),), None, 5000)
    monkeypatch.setattr(catalogue, "clip", lambda name: wanted)
    world.server.files[wanted.address] = b"PK\x03\x04 something else"
    with pytest.raises(DataError, match=rf"has the SHA-256 {sha256(b'PK' + bytes([3, 4]) + b' something else')}"):
        world.fetch(photos=Photos.none, clip=["RN50"])
    world.server.files[wanted.address] = content
    world.fetch(photos=Photos.none, clip=["RN50"])
    assert (world.to / "fetched/clip/RN50.pt").read_bytes() == content
    told = capsys.readouterr().out
    assert f'mine: {{base: cris, clip_rn: {{weights: "{world.to}/fetched/clip/RN50.pt"}}}}' in told
    world.server.log.clear()
    world.fetch(photos=Photos.none, clip=["RN50"])
    assert world.asked() == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("RN50", "RN50.pt"),
        ("ViT-B/16", "ViT-B-16.pt"),
        ("ViT-L-14-quickgelu", "ViT-L-14.pt"),
        ("ViT-L/14@336px", "ViT-L-14-336px.pt"),
    ],
)
def test_weights_are_those_that_open_clip_knows(name: str, file: str) -> None:
    wanted = catalogue.clip(name)
    assert wanted.name == file
    assert wanted.address.endswith(f"{wanted.sha256[0]}/{file}")
    assert len(wanted.sha256[0]) == 64


def test_two_at_once_fetch_everything_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.server.quirks["http://published.example/refcoco.zip"] = [slow(4, 0.1)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(world.fetch)
        while not world.server.log:
            time.sleep(0.01)
        second = pool.submit(world.fetch)
        first.result()
        second.result()
    assert len(world.asked()) == COUNT + 1
    assert "another `ris fetch` is at work in " in capsys.readouterr().err
    assert world.prepared() == COUNT


def test_killed_at_any_moment_it_goes_on(world: World) -> None:
    """Twice: within the archive, and within the photos."""
    archive = "http://published.example/refcoco.zip"
    larger = io.BytesIO(world.content["refcoco.zip"])
    with zipfile.ZipFile(larger, "a") as opened:
        opened.writestr("refcoco/nobody reads it", os.urandom(500_000))
    many = larger.getvalue()
    content = catalogue.facts()
    content["archives"]["refcoco"].update(bytes=len(many), sha256=sha256(many))
    world.server.files[archive] = many
    world.server.quirks[archive] = [slow(8, 0.3)]
    world.server.quirks[PHOTO.format(4)] = [slow(4, 30)]
    world.mirrors({"refcoco.zip": archive})
    arguments = ("-c", KILLED, json.dumps(content))
    part = world.to / "fetched/refcoco.zip.part"
    with started(*arguments, cwd=world.root) as process:
        wait_for(lambda: part.is_file() and part.stat().st_size > 100_000, process)
    there = part.stat().st_size
    with started(*arguments, cwd=world.root) as process:
        wait_for(lambda: len(list((world.to / "fetched/train2014").glob("COCO*.jpg"))) == COUNT - 1, process)
    assert world.server.asked(archive) == ["", f"bytes={there}-"]
    (world.to / "fetched/train2014/.COCO.partial-1-ab.jpg").write_bytes(b"left by one that was killed while it wrote")
    world.server.log.clear()
    world.fetch()
    assert world.asked() == [PHOTO.format(4)]
    assert world.prepared() == COUNT
    assert not list((world.to / "fetched").rglob("*.part*"))


def test_all_wrong_options_are_told_at_once(world: World) -> None:
    mirrors = world.mirrors(
        {"refcoco.tar": "https://x/y", "refcoco.zip": ["ftp://x/y", "/mnt/x"], "all": 5, "x.pt": []}
    )
    with pytest.raises(ConfigError) as error:
        world.fetch("refcoco", clip=["RN5", "RN50"], mirrors=mirrors, accept_sha256="abc")
    told = str(error.value)
    assert "nothing was fetched (3 problems):" in told
    assert "there is no dataset 'refcoco': did you mean refcoco_unc or refcoco_google?" in told
    assert "--clip RN5: there is no such CLIP of OpenAI's; there are RN50, RN101" in told
    assert "mirrors.yaml cannot be used (5 problems):" in told
    assert "'refcoco.tar' is no name of a file that is fetched: refcoco.zip, refcoco+.zip" in told
    assert "refcoco.zip: ftp://x/y is no address that can be read: use https://, http://, file://, s3://" in told
    assert "all: expected an address or a list of them, found 5" in told
    with pytest.raises(ConfigError, match="--accept-sha256 abc: a SHA-256 has 64 digits"):
        world.fetch(accept_sha256="abc")
    with pytest.raises(ConfigError, match="nothing is fetched of shapes: It is written by `dvc repro synthesize`"):
        world.fetch("shapes")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        world.fetch(mirrors=Path("nowhere.yaml"))
    assert not world.to.exists()


def test_a_place_that_cannot_be_written(world: World) -> None:
    world.to.write_text("a file")
    with pytest.raises(ConfigError, match=r"--to .*raw cannot be written: "):
        world.fetch()


def test_the_packaged_mirrors_are_addresses_for_every_file() -> None:
    known = Mirrors.read()
    assert known.of_file("refcoco.zip", "https://published/") == ["https://published/"]
    assert known.of_photos() == ["http://images.cocodataset.org/train2014/", f"{OVER_TLS}train2014/"]
    published = facts()["archives"]["train2014"]["url"]
    assert known.of_file("train2014.zip", published) == [published, f"{OVER_TLS}zips/train2014.zip"]


def test_the_mirrors_of_the_how_to_can_be_read(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", (REPOSITORY / "docs/real-data.md").read_text(), re.DOTALL)
    assert example
    (tmp_path / "mirrors.yaml").write_text(example[1])
    known = Mirrors.read(tmp_path / "mirrors.yaml")
    assert known.of_file("refcocog.zip", "https://published/") == [
        "s3://bucket/refer/refcocog.zip",
        "file:///mnt/backup/refcocog.zip",
        "s3://bucket/ris/refcocog.zip?endpoint_override=minio:9000&scheme=http",
        "https://published/",
    ]
    assert known.of_photos()[1] == "s3://bucket/ris/train2014/?endpoint_override=minio:9000&scheme=http"


def test_names_below_a_folder_keep_its_options() -> None:
    assert joined("s3://bucket/a/?scheme=http", "refcoco+.zip") == "s3://bucket/a/refcoco%2B.zip?scheme=http"
    assert joined("https://host", "train2014/") == "https://host/train2014/"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.preset)
def test_the_lines_for_params_choose_what_was_fetched(recipe: Recipe, tmp_path: Path) -> None:
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    names = [DatasetName.parse(name) for name in ("refcoco_unc", "refcocog_umd")]
    assert content["presets"].keys() >= {recipe.of(name) for name in names}
    weights = Path("/mnt/{a}: b, 'c' # d/clip") / f"{recipe.weights}.pt" if recipe.weights else None
    given = yaml.safe_load("\n".join(settings(recipe, names[1], weights)))
    presets = {**content["presets"], **given.pop("presets", {})}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**content, **given, "presets": presets}))
    params = load_params(tmp_path / "params.yaml")
    assert (params.datasets, params.systems, params.clips) == (["refcocog_umd"], [recipe.system], [recipe.section])
    if weights:
        clip = params.clip(recipe.section)
        assert (clip.architecture, clip.weights) == (f"{recipe.weights}-quickgelu", str(weights))


def test_what_comes_next() -> None:
    place = Path("data/raw/refcocog_umd")
    lines = next_steps(DatasetName.parse("refcocog_umd"), place, place, [Path("data/raw/fetched/clip/ViT-B-16.pt")])
    assert lines == [
        "next, in params.yaml:",
        "  preset: mine",
        "  datasets: [refcocog_umd]",
        "  systems: [risclip]",
        "  clips: [vit]",
        "  presets: # one more of them",
        '    mine: {base: risclip_b, clip_vit: {weights: "data/raw/fetched/clip/ViT-B-16.pt"}}',
        "then: make repro",
    ]
    lines = next_steps(
        DatasetName.parse("refcoco_unc"), Path("/mnt/my disk/refcoco_unc"), Path("data/raw/refcoco_unc"), []
    )
    assert "  mkdir -p data/raw && ln -s '/mnt/my disk/refcoco_unc' data/raw/refcoco_unc" in lines
    assert "  (other presets: cris_paper, cris_r101, risclip_b, risclip_l, global_local" in "\n".join(lines)
    assert "with --clip RN50" in "\n".join(lines)

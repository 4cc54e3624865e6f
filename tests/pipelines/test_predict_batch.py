"""`ris predict-batch`: its answers are those of a predictor asked one at a time, in the order asked, whatever happens between."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines_world import REPOSITORY, contents, python

from pipelines import batch_answers, batch_output, cli, predict_batch
from pipelines.batch_answers import Answerer
from pipelines.transport import Place, Road
from ris_core.data import masks
from ris_core.errors import ConfigError, DataError
from ris_core.models.clip import load_saved_clip
from ris_core.models.registry import ModelInfo, build_model, export_model
from ris_core.options import Plain
from ris_core.predictor import RISPredictor
from ris_core.storage import Storage

if TYPE_CHECKING:
    from tiny_world import Tiny

TEXTS = ["the red star", "left", "the large blue ring next to the star"]
OUT = Path("out")


def in_this_process(units: list[list[Plain]], model: Path, threshold: float) -> Iterator[pa.Table]:
    """What `predict_batch.answered` gives, without Ray; the last unit comes first."""
    answerer = Answerer(Place(str(model)), threshold)
    for item in reversed(predict_batch.travelling(units, Road(None))):
        yield answerer(pa.table({"unit": [item["unit"]]}))


# The same as a program of its own, which is killed in the midst of its fourth file.
KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from pipelines import batch_output, predict_batch
import test_predict_batch
predict_batch.answered = test_predict_batch.in_this_process
batch_output.IMAGES_EACH, batch_output.ROWS = 3, 7
written, write = [], pq.write_table
def killed(table, path):
    write(table, path)
    written.append(path)
    if len(written) == 4:
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = killed
predict_batch.main(Path("asked.parquet"), Path("out"), None, None, sys.argv[1], 0.5)
"""


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, whose answers are spread around the threshold."""
    torch.manual_seed(3)
    system = build_model("cris", tiny.params().cris.model, load_saved_clip(tiny.clip))
    with torch.no_grad():
        system.get_parameter("proj.txt.weight").mul_(4)
    folder = tmp_path_factory.mktemp("model")
    export_model(folder, "cris", system.state_dict(), tiny.params().cris.model, tiny.clip, ModelInfo(64, word_len=12))
    return folder


@pytest.fixture
def photos(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Seven photos below photos/ in the working directory, and what else lies in such folders."""
    monkeypatch.chdir(tmp_path)
    Path("photos/below").mkdir(parents=True)
    names = []
    for number, record in enumerate(tiny.records()[:7]):
        names.append(f"photos/{'below/' if number % 2 else ''}{number}.jpg")
        shutil.copy(tiny.raw / record.file_name, names[-1])
    shutil.copy(names[0], "photos/.hidden.jpg")
    Path("photos/notes.txt").write_text("no image")
    return names


@pytest.fixture
def asked(photos: list[str]) -> pa.Table:
    """Twenty-one pairs, in no order, with an id and a number of their own; also as asked.parquet."""
    pairs = [(image, text) for image in photos for text in TEXTS]
    random.Random(0).shuffle(pairs)
    table = pa.table(
        {
            "id": [f"{number:03d}" for number in range(len(pairs))],
            "image": [image for image, _ in pairs],
            "text": [text for _, text in pairs],
            "weight": pa.array(range(len(pairs)), pa.int16()),
        }
    )
    pq.write_table(table, "asked.parquet")
    return table


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray, and parts of at most three images or seven rows."""
    monkeypatch.setattr(predict_batch, "answered", in_this_process)
    monkeypatch.setattr(batch_output, "IMAGES_EACH", 3)
    monkeypatch.setattr(batch_output, "ROWS", 7)


def batch(source: str, model: Path, *expressions: str, out: Path = OUT, threshold: float = 0.5) -> pa.Table:
    """All answers to a batch, in the order of its parts."""
    predict_batch.main(Path(source), out, None, list(expressions), str(model), threshold)
    return pq.read_table(out)


def check(answers: pa.Table, model: Path, threshold: float = 0.5, base: str = "", differing: int = 5) -> None:
    """Every row equals what a predictor says that is asked it alone; so many answers differ from each other."""
    predictor = RISPredictor.from_folder(model, threshold=threshold)
    shares = []
    for row in answers.to_pylist():
        (expected,) = predictor.answer(predictor.encode(Path(base, row["image"])), [row["text"]])
        mask = masks.decode(row["counts"], row["height"], row["width"])
        assert np.array_equal(mask, expected.mask)
        assert row["score"] == pytest.approx(expected.score, abs=1e-5)
        assert (row["cut"], row["error"]) == (expected.cut, None)
        shares.append(mask.mean())
    assert len({round(share, 3) for share in shares}) >= differing


@pytest.mark.ray
def test_actors_answer_as_a_predictor_one_at_a_time(
    asked: pa.Table, model: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_output, "IMAGES_EACH", 3)
    monkeypatch.setattr(predict_batch.cluster, "held", lambda *_: 2)
    answers = batch("asked.parquet", model, threshold=0.6)
    assert answers.select(["id", "weight", "image", "text"]).equals(asked.select(["id", "weight", "image", "text"]))
    assert answers.schema.names == ["image", "text", "id", "weight", *batch_answers.ANSWERS.names]
    check(answers, model, 0.6)
    told = capsys.readouterr().out
    assert told.startswith("out: 21 rows, 0 errors, ")
    assert told.endswith(" images/s\n")
    assert sorted(contents(OUT)) == [
        "_manifest.json",
        *(f"part-{i:05d}.parquet" for i in range(len(contents(OUT)) - 1)),
    ]
    assert len(contents(OUT)) > 3


def test_a_folder_of_images_and_one_list_of_expressions(
    photos: list[str], model: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("texts.txt").write_text(f"\ufeff{TEXTS[0]}\n\n  {TEXTS[1]}  \r\n", encoding="utf-8")
    predict_batch.main(Path("photos"), OUT, Path("texts.txt"), [TEXTS[2]], str(model), 0.5)
    answers = pq.read_table(OUT)
    names = sorted(name.removeprefix("photos/") for name in photos)
    assert answers["image"].to_pylist() == [name for name in names for _ in TEXTS]
    assert answers["text"].to_pylist() == TEXTS * len(names)
    check(answers, model, base="photos")
    assert "photos: left out what is no image: 1 hidden, 1 of another kind\n" in capsys.readouterr().err
    assert [pq.read_metadata(path).num_rows for path in sorted(OUT.glob("part-*"))] == [6, 6, 6, 3]
    assert len(pd.read_parquet(OUT)) == 21  # as users read it


def test_tables_of_all_kinds_ask_the_same(asked: pa.Table, model: Path, plain: None) -> None:
    rows = asked.to_pylist()
    expected = batch("asked.parquet", model).drop_columns(["weight"])
    Path("far/away").mkdir(parents=True)
    tables: dict[str, pa.Table] = {}
    frame = asked.select(["id", "image", "text"]).to_pandas()
    frame.to_csv("asked.csv", index=False)
    tables["csv"] = batch("asked.csv", model, out=Path("csv"))
    with open("far/asked.jsonl", "w") as file:
        for row in rows:
            print(json.dumps({"image": f"../{row['image']}", "text": row["text"], "id": row["id"]}), file=file)
    tables["jsonl"] = batch("far/asked.jsonl", model, out=Path("jsonl"))
    absolute = frame.assign(image=[os.path.abspath(name) for name in frame["image"]])
    absolute.assign(text=absolute["text"].astype("category")).to_parquet("far/away/asked.parquet")
    tables["absolute"] = batch("far/away/asked.parquet", model, out=Path("absolute"))
    frame.assign(image=[Path(name).read_bytes() for name in frame["image"]]).to_parquet("bytes.parquet")
    tables["bytes"] = batch("bytes.parquet", model, out=Path("bytes"))
    both = [{"bytes": Path(name).read_bytes(), "path": name} for name in frame["image"]]
    pq.write_table(asked.select(["id", "text"]).append_column("image", pa.array(both)), "datasets.parquet")
    tables["datasets"] = batch("datasets.parquet", model, out=Path("datasets"))
    for kind, table in tables.items():
        assert table.drop_columns(["image"]).to_pylist() == expected.drop_columns(["image"]).to_pylist(), kind
        assert len(set(table["image"].to_pylist())) == 7, kind
    assert sorted(path.name for path in Path("bytes").iterdir() if path.name[0] == ".") == []


def test_workers_that_share_no_folder_get_model_and_photos_through_the_storage(
    photos: list[str], asked: pa.Table, model: Path, plain: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_CACHE", str(tmp_path / "cache"))
    road = Road(Storage(str(tmp_path / "storage")))
    expected = batch("asked.parquet", model)

    def elsewhere(units: list[list[Plain]], folder: Path, threshold: float) -> Iterator[pa.Table]:
        items, place = predict_batch.travelling(units, road), road.offer(folder)
        for name in photos:
            Path(name).rename(f"{name}.away")
        answerer = Answerer(place, threshold)
        yield from (answerer(pa.table({"unit": [item["unit"]]})) for item in items)

    monkeypatch.setattr(predict_batch, "answered", elsewhere)
    pq.write_table(
        asked.set_column(1, "image", pa.array([*asked["image"].to_pylist()[:-1], "nowhere.jpg"])), "asked.parquet"
    )
    answers = batch("asked.parquet", model, out=Path("other"))
    assert answers["counts"].to_pylist()[:-1] == expected["counts"].to_pylist()[:-1]
    assert answers["error"].to_pylist() == [None] * 20 + ["there is no such file"]


def test_lists_of_texts_become_rows_and_none_is_lost(photos: list[str], model: Path, plain: None) -> None:
    lists = [TEXTS[:2], [], None, [TEXTS[2], "  "]]
    pq.write_table(pa.table({"image": photos[:4], "text": lists, "n": range(4)}), "lists.parquet")
    answers = batch("lists.parquet", model)
    assert answers["text"].to_pylist() == [*TEXTS[:2], None, None, TEXTS[2], "  "]
    assert answers["n"].to_pylist() == [0, 0, 1, 2, 3, 3]
    blank = "the text is blank"
    assert answers["error"].to_pylist() == [None, None, blank, blank, None, blank]


def test_a_bad_row_spoils_no_other(
    photos: list[str], model: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Path(photos[0]).read_bytes()
    Path("half.jpg").write_bytes(good[: len(good) // 2])
    Path("folder.jpg").mkdir()
    os.mkfifo("pipe.jpg")
    Image.new("F", (8, 8)).save("float.tif")
    wrong = {
        "nowhere.jpg": "there is no such file",
        "half.jpg": "the image cannot be used: ",
        "folder.jpg": "the image is no file",
        "pipe.jpg": "the image is no file",
        "photos/notes.txt": "the image cannot be used: it is none of the image formats read here",
        "float.tif": "the image cannot be used: its pixels are floating-point numbers",
        f"{'x' * 300}.jpg": "the image cannot be read: File name too long",
        "": "no image is named",
        "a\0b": "the image's name is no path",
        None: "no image is named",
    }
    images = [name for bad in wrong for name in (bad, photos[0])]
    pq.write_table(pa.table({"image": images, "text": [TEXTS[0]] * len(images)}), "asked.parquet")
    answers = batch("asked.parquet", model)
    assert answers["image"].to_pylist() == images
    check(answers.filter(pa.array([name == photos[0] for name in images])).slice(0, 1), model, differing=1)
    for row in answers.to_pylist():
        if row["image"] == photos[0]:
            assert (row["error"], row["counts"] is None) == (None, False)
        else:
            assert row["error"].startswith(wrong[row["image"]]), row
            assert "\n" not in row["error"]
            assert len(row["error"]) <= 300
            assert [row[name] for name in ("height", "width", "counts", "score", "cut")] == [None] * 5
    shown = capsys.readouterr()
    assert "out: 20 rows, 10 errors, " in shown.out
    assert "WARNING: 10 of 20 rows have no answer, their column error says why: row 0: there is" in shown.err


def test_images_alone_in_a_table_are_asked_what_is_asked_of_all(photos: list[str], model: Path, plain: None) -> None:
    pq.write_table(pa.table({"image": [Path(name).read_bytes() for name in photos]}), "bytes.parquet")
    answers = batch("bytes.parquet", model, *TEXTS)
    assert answers["text"].to_pylist() == TEXTS * 7
    pq.write_table(pa.table({"image": photos}), "names.parquet")
    named = batch("names.parquet", model, *TEXTS, out=Path("named"))
    assert answers["counts"].to_pylist() == named["counts"].to_pylist()
    assert answers["error"].null_count == 21


def test_bytes_that_are_no_images_are_told_too(photos: list[str], model: Path, plain: None) -> None:
    images = [Path(photos[0]).read_bytes(), b"no image", None, b""]
    pq.write_table(pa.table({"image": pa.array(images, pa.large_binary()), "text": ["left"] * 4}), "bytes.parquet")
    errors = batch("bytes.parquet", model)["error"].to_pylist()
    assert errors[0] is None
    assert [error.split(":")[0] for error in errors[1:]] == [
        "the image cannot be used",
        "no image is named",
        "the image cannot be used",
    ]


def test_nothing_answered_is_a_failure(
    photos: list[str], model: Path, plain: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("asked.csv").write_text("image,text\nnowhere.jpg,left\nphotos/0.jpg,\n")
    for _ in range(2):  # also when all parts are there already
        monkeypatch.setattr(sys, "argv", ["ris", "predict-batch", "asked.csv", "--out", "out", "--model", str(model)])
        with pytest.raises(SystemExit) as end:
            cli.app()
        assert end.value.code == 1
        told = "error: out: none of 2 rows could be answered, the column error says why: row 0: there is no such"
        assert told in capsys.readouterr().err


def test_an_image_is_encoded_once_and_asked_sixty_four_texts_at_a_time(
    photos: list[str], model: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode, answer = RISPredictor.encode, RISPredictor.answer
    monkeypatch.setattr(RISPredictor, "encode", lambda self, image: calls.append(0) or encode(self, image))
    monkeypatch.setattr(
        RISPredictor, "answer", lambda self, known, texts: calls.append(len(texts)) or answer(self, known, texts)
    )
    pairs = [(image, f"star {number}") for number in range(100) for image in photos[:2]]  # in turns
    pq.write_table(pa.table({"image": [p[0] for p in pairs], "text": [p[1] for p in pairs]}), "asked.parquet")
    answers = batch("asked.parquet", model)
    assert calls == [0, 64, 36, 0, 64, 36]
    assert list(zip(*(answers[name].to_pylist() for name in ("image", "text")), strict=True)) == pairs
    calls.clear()
    monkeypatch.setattr(batch_answers, "PIXELS_AT_ONCE", 80 * 80 * 30)
    assert len(batch("asked.parquet", model, out=Path("other"))) == 200
    assert max(calls) <= 64
    assert calls.count(0) == 2
    assert len(calls) > 8


def test_missing_parts_alone_are_made(
    asked: pa.Table, model: Path, plain: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batch("asked.parquet", model)
    parts = sorted(OUT.glob("part-*"))
    whole = contents(OUT)
    before = {path: path.stat().st_mtime_ns for path in parts}
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:50])
    capsys.readouterr()
    rows = sum(pq.read_metadata(path).num_rows for path in parts if path not in (parts[1], parts[3]))
    assert batch("asked.parquet", model).equals(expected)
    told = capsys.readouterr().err
    assert f"warning: {parts[3]} is damaged: it is made again" in told
    there = f"{len(parts) - 2} of {len(parts)} parts are there already, {21 - rows} of 21 rows are left"
    assert f"out: {there}" in told
    assert contents(OUT) == whole
    assert [path for path in parts if path.stat().st_mtime_ns != before[path]] == [parts[1], parts[3]]
    monkeypatch.setattr(predict_batch, "answered", lambda *_: pytest.fail("there is nothing to do"))
    assert batch("asked.parquet", model).equals(expected)


def test_killed_at_any_moment_it_goes_on(asked: pa.Table, model: Path, plain: None) -> None:
    expected = batch("asked.parquet", model, out=Path("undisturbed"))
    path = os.pathsep.join((str(REPOSITORY), str(Path(__file__).parent), str(REPOSITORY / "tests")))
    killed = python("-c", KILLED, str(model), cwd=Path.cwd(), PYTHONPATH=path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {name.split("/")[0] for name in contents(OUT) if "partial" not in name}
    assert left > {"_manifest.json", ".waiting"}, "some parts are there, and rows of others"
    assert any("partial" in name for name in contents(OUT)), "it died while it wrote"
    assert batch("asked.parquet", model).equals(expected)
    assert contents(OUT) == contents(Path("undisturbed"))


def test_a_folder_of_other_answers_is_left_alone(asked: pa.Table, model: Path, plain: None, tiny: Tiny) -> None:
    batch("asked.parquet", model)
    before = contents(OUT)
    other = Path("model")
    shutil.copytree(model, other)
    described = json.loads((other / "model.json").read_text())
    described["info"]["word_len"] = 9
    (other / "model.json").write_text(json.dumps(described))
    pq.write_table(asked.slice(1), "fewer.parquet")
    for source, given, threshold, names in (
        ("asked.parquet", model, 0.4, ["threshold: 0.5 there, 0.4 now"]),
        ("asked.parquet", other, 0.5, ["model: "]),
        ("fewer.parquet", model, 0.5, ["input: ", "rows: 21 there, 20 now"]),
    ):
        with pytest.raises(ConfigError, match="--out out holds answers to something else") as error:
            batch(source, given, threshold=threshold)
        for name in names:
            assert name in str(error.value)
        assert "Give another folder; nothing in this one was changed." in str(error.value)
    photo = Path(asked["image"][0].as_py())
    Image.new("RGB", (80, 60)).save(photo)  # the same names, another content
    with pytest.raises(ConfigError, match=r"something else \(1 problem\):\n  - input: "):
        batch("asked.parquet", model)
    assert contents(OUT) == before
    (OUT / "_manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its _manifest.json is damaged"):
        batch("asked.parquet", model)
    (OUT / "_manifest.json").write_bytes(before["_manifest.json"])
    assert contents(OUT) == before


def test_two_at_once_do_not_mix(asked: pa.Table, model: Path, plain: None) -> None:
    with (
        batch_output.opened(OUT, {"by": "another"}, asked, np.array([0, 21])),
        pytest.raises(ConfigError, match="--out out: another run is writing there now"),
    ):
        batch("asked.parquet", model)
    assert list(contents(OUT)) == ["_manifest.json"]


def test_a_full_disk_is_told_and_it_goes_on(asked: pa.Table, model: Path, plain: None) -> None:
    """As far as the largest file that a process may write is a small disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"--out out cannot be written: .*File too large"):
            batch("asked.parquet", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(contents(OUT)) == ["_manifest.json"]
    assert len(batch("asked.parquet", model)) == 21


def table(**columns: Any) -> Callable[[], str]:
    def written() -> str:
        pq.write_table(pa.table(columns), "wrong.parquet")
        return "wrong.parquet"

    return written


def text_file(name: str, content: str) -> Callable[[], str]:
    def written() -> str:
        Path(name).write_text(content)
        return name

    return written


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (lambda: "nowhere", ["there is no folder or table 'nowhere': give a folder of images"]),
        (lambda: "photos/0.jpg", ["is no folder and no table that is read here"]),
        (lambda: "photos", ["photos has images and no expressions: give --expressions FILE or --expression TEXT"]),
        (table(picture=["a"], text=["b"]), ["there is no column image", "the columns are 'picture', 'text'"]),
        (table(image=["a"], words=["b"]), ["there is no column text, and no --expressions or --expression"]),
        (table(image=[1], text=[2]), ["2 problems", "the column image is int64", "the column text is int64"]),
        (table(image=["a"], text=["b"], width=[3], error=["x"]), ["answers have columns width, error, too"]),
        (table(image=pa.array([], pa.string()), text=pa.array([], pa.string())), ["it has no rows"]),
        (text_file("wrong.parquet", "no table"), ["wrong.parquet cannot be read: "]),
        (text_file("wrong.csv", 'image,text\n"a,b\n'), ["wrong.csv"]),
        (text_file("twice.csv", "image,text,image\na,b,c\n"), ["the column 'image' is there 2 times"]),
        (
            text_file("wrong.jsonl", '{"image": "a", "text": "b", "n": 1}\n{"image"\n[3]\n{"image": "a", "n": "x"}\n'),
            ["3 problems", "line 2: no JSON", "line 3: a list, not names and values", "'n': its values make no column"],
        ),
        (text_file("deep.jsonl", "[" * 100_000), ["line 1: no JSON"]),
    ],
)
def test_an_input_that_cannot_be_answered_is_told_before_ray_starts(
    source: Callable[[], str], messages: list[str], photos: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.cluster.connected", lambda: pytest.fail("Ray was asked for"))
    with pytest.raises(ConfigError) as error:
        batch(source(), model)
    for message in messages:
        assert message in str(error.value)
    assert not OUT.exists()


def test_all_that_is_wrong_is_told_at_once(
    photos: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.cluster.connected", lambda: pytest.fail("Ray was asked for"))
    Path("none.txt").write_text("\n \n")
    wrong = ["--expression", " ", "--expressions", "none.txt", "--model", "nowhere", "--threshold", "7"]
    monkeypatch.setattr(sys, "argv", ["ris", "predict-batch", "nothing", "--out", "photos", *wrong])
    with pytest.raises(SystemExit) as end:
        cli.app()
    assert end.value.code == 1
    told = capsys.readouterr().err
    for message in (
        "nothing was answered (6 problems)",
        "the threshold is 7.0",
        "1 of the texts given as --expression are blank",
        "--expressions none.txt is empty",
        "there is no folder or table 'nothing'",
        "--out photos holds other things than answers: give a new folder",
        "nowhere holds no model",
    ):
        assert message in told


def test_a_table_with_texts_takes_no_others(asked: pa.Table, model: Path) -> None:
    with pytest.raises(ConfigError, match="there is a column text, and expressions are given beside it"):
        batch("asked.parquet", model, "left")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("photos", "--out photos lies in photos, among the images"),
        ("link/answers", "--out link/answers lies in photos, among the images"),
        ("photos/0.jpg/out", "lies in photos"),
        ("file", "--out file is no folder: give another name"),
        ("file/out", "--out file/out cannot be made: "),
        (".", "--out . holds other things than answers: give a new folder"),
        ("/proc/answers", "--out /proc/answers cannot be written: "),
        ("/dev/full", "--out /dev/full is no folder: give another name"),
    ],
)
def test_answers_go_where_nothing_is_lost(out: str, message: str, photos: list[str], model: Path) -> None:
    Path("link").symlink_to("photos/below")
    Path("file").touch()
    before = contents(Path())
    with pytest.raises(ConfigError) as error:
        batch("photos", model, "left", out=Path(out))
    assert message in str(error.value)
    assert contents(Path()) == before


def test_pieces_hold_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_output.cut([1] * 130, [1] * 130) == [0, 64, 128, 130]
    assert batch_output.cut([1] * 600, [0] * 600) == [0, 512, 600]
    assert batch_output.cut([600, 1, 511, 1, 512], [1] * 5) == [0, 1, 3, 4, 5]
    assert batch_output.cut([9], [1]) == [0, 1]
    monkeypatch.setattr(batch_output, "IMAGES_EACH", 2)
    assert batch_output.parts_of(np.array([0, 0, 0, 1, 0, 2, 2, 1, 3, 0])).tolist() == [0, 5, 10]
    assert batch_output.parts_of(np.array([5])).tolist() == [0, 1]


def test_images_that_were_removed_meanwhile_are_errors(model: Path, tmp_path: Path) -> None:
    predictor = RISPredictor.from_folder(model)
    (answer,) = batch_answers.answer_image(predictor, tmp_path / "gone.jpg", "", ["left"])
    assert answer["error"].startswith("the image cannot be read: no image at ")
    with pytest.raises(DataError):
        predictor.answer(predictor.encode(np.zeros((8, 8, 3), np.uint8)), [" "])  # what `answer_image` keeps away

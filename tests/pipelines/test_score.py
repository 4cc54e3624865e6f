"""`ris score`, `ris tabulate` and `ris evaluate --model`: systems of anybody's by one yardstick, models on any dataset."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipelines_world import DATASET, REPOSITORY, SYSTEM, Workplace, export_untrained

from pipelines import cli, evaluate, paths, score, tabulate
from pipelines.params import Params
from pipelines.transport import Place
from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.data.proposal_store import write_manifest as write_proposals
from ris_core.data.records import ImageRecord, Instance, Reference, Sentence, write_records
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.errors import ConfigError, DataError, WeightsError
from ris_core.evaluation.metrics import PROTOCOLS, paired_bootstrap
from ris_core.models.registry import load_model, read_description
from ris_core.options import Plain

DOCUMENT = (REPOSITORY / "docs/comparing.md").read_text()
OTHER = "shapes+"  # where a dataset that the model was not trained on lies


def code(language: str) -> list[str]:
    """The pieces of the document in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def commands(verb: str) -> list[list[str]]:
    lines = [line for piece in code("bash") for line in piece.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith(f"ris {verb} ")]


def ris(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ris", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.app()
    assert end.value.code == 0


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((6, 8), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


@pytest.fixture
def documented(workplace: Workplace) -> Workplace:
    """The dataset that the document speaks of: an image of 8 x 6 pixels with two referents of two sentences."""
    truth = {5: box(0, 2, 6, 4), 6: box(1, 1, 5, 4)}
    names = {5: [(21, "left"), (22, "red star")], 6: [(23, "The  Blue star"), (24, "it")]}
    objects = tuple(
        Instance(number, 1, "star", 0, (0, 0, 1, 1), 1, masks.encode(mask)) for number, mask in truth.items()
    )
    refs = tuple(
        Reference(number, number, 1, "val", tuple(Sentence(i, text.lower(), text) for i, text in sentences))
        for number, sentences in names.items()
    )
    Image.new("RGB", (8, 6)).save(workplace.root / "star.jpg")
    record = ImageRecord(1, "star.jpg", 6, 8, objects, refs)
    write_records(paths.records(DATASET), [record], DATASET)
    folder, options = paths.shards(DATASET), ShardOptions(32)
    folder.mkdir(parents=True)
    write_manifest(folder, DATASET, options, [write_shard(folder / "part-0.arrow", [record], workplace.root, options)])
    return workplace


def test_the_document_is_true(
    documented: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = code("json")
    Path("predictions.json").write_text(example)
    Path("other.json").write_text(json.dumps([{"sent_id": i, "segmentation": []} for i in range(21, 25)]))
    assert len(commands("score")) == 3
    for command in commands("score"):
        ris(*command, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "ours  " in shown
    metrics = json.loads(Path("scores/mine/metrics.json").read_text())
    truth = {21: box(0, 2, 6, 4), 22: box(0, 2, 6, 4), 23: box(1, 1, 5, 4), 24: box(1, 1, 5, 4)}
    answers = {21: masks.decode("<b0b0", 6, 8), 22: box(0, 2, 6, 3), 23: box(1, 1, 5, 4), 24: box(0, 0, 0, 0)}
    ious = {i: (truth[i] & answers[i]).sum() / (truth[i] | answers[i]).sum() for i in truth}
    assert 0 < ious[21] < 1
    assert metrics["ours"]["val"]["mIoU"] == round(sum(ious.values()) / 4, 5)
    assert metrics["global_local"]["val"]["mIoU"] == round(sum(ious.values()) / 3, 5)  # without that of null
    assert metrics["cris_val"]["val"]["mIoU"] == round((ious[21] + ious[23]) / 2, 5)
    about = json.loads(Path("scores/mine/about.json").read_text())
    assert (about["name"], about["missing"], about["dataset"]) == ("mine", 0, "shapes")


def test_the_documents_code_writes_a_file(documented: Workplace) -> None:
    answers = {i: box(0, 0, 3, i - 20) for i in range(21, 25)}
    listing, writing = code("python")
    known: dict[str, Any] = {"masks": answers}
    exec(listing, known)
    assert [entry[:3] for entry in known["asked"]] == [
        ("star.jpg", 5, 21),
        ("star.jpg", 5, 22),
        ("star.jpg", 6, 23),
        ("star.jpg", 6, 24),
    ]
    exec(writing, known)
    score.main(Path("predictions.json"), DATASET, "val", out=Path("mine"))
    areas = pq.read_table("mine/expressions/ours-val.parquet")
    assert dict(zip(areas["sent_id"].to_pylist(), areas["area"].to_pylist(), strict=True)) == {
        i: 3 * (i - 20) for i in answers
    }


def entries(store: ShardStore, split: str, grow: int) -> list[dict[str, Any]]:
    """True masks, shifted by some pixels."""
    found = []
    for image in store.images_of(split):
        row = store.row(int(image))
        for ref in row["refs"]:
            mask = np.roll(store.mask(int(image), ref["ann_id"]), grow, axis=1)
            rle = {"size": [row["height"], row["width"]], "counts": masks.encode(mask)}
            found += [{"sent_id": sentence["sent_id"], "segmentation": rle} for sentence in ref["sentences"]]
    return found


@pytest.fixture
def given(workplace: Workplace) -> Workplace:
    """A workplace with two files of predictions, good.json the better one."""
    workplace.link("shards")
    for name, grow in (("good", 2), ("bad", 5)):
        Path(f"{name}.json").write_text(json.dumps(entries(workplace.tiny.store(), "val", grow)))
    return workplace


def test_two_files_are_tested_against_each_other(given: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    before = given.files()
    score.main(Path("good.json"), DATASET, "val", against=Path("bad.json"), out=Path("scores"))
    assert {file.split("/")[0] for file in given.files() - before} == {"scores"}
    found = json.loads(Path("scores/comparison.json").read_text())
    assert list(found) == list(PROTOCOLS)
    params = given.tiny.params().evaluate
    score.main(Path("bad.json"), DATASET, "val", out=Path("worse"))
    for name, part in found.items():
        tables = [
            pq.read_table(f"{out}/expressions/{name}-val.parquet").sort_by("sent_id") for out in ("scores", "worse")
        ]
        columns = [table[column].to_numpy() for table in tables for column in ("intersection", "union")]
        expected = paired_bootstrap(*columns, tables[0]["image_id"].to_numpy(), params.bootstrap_samples, params.seed)
        (pair,) = part["splits"]["val"]["pairs"]
        assert (pair["first"], pair["second"]) == ("good.json", "bad.json")
        assert pair["mIoU"]["difference"] == round(expected["mIoU"].difference, 5) > 0
        assert pair["mIoU"]["interval"] == [round(each, 5) for each in expected["mIoU"].interval]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines if " good.json - bad.json:" in line] == [
        [name, "val", "good.json", "-"] for name in PROTOCOLS
    ]


def test_on_generalised_data_its_own_protocol_comes_first(
    given: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an evaluation, where it decides: all others count the right answer to what means nothing as wrong."""
    monkeypatch.setattr(ShardStore, "is_generalised", True)
    score.main(Path("good.json"), DATASET, "val", out=Path("mine"))
    metrics = json.loads(Path("mine/metrics.json").read_text())
    assert list(metrics)[:2] == ["grefcoco", "ours"]
    assert [name for name, parts in metrics.items() if "shuffled_in_image" in parts["val"]] == ["grefcoco"]
    told = capsys.readouterr().out
    assert "by kind of expression, grefcoco:" in told
    assert "N-acc - (every expression has a target)  T-acc " in told  # the data of these tests have one each


def test_what_does_not_apply_to_finished_masks_is_said(given: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    score.main(Path("good.json"), DATASET, "val", out=Path("scores"))
    said = json.loads(Path("scores/protocols.json").read_text())
    assert said["cris"]["not_applied"] == ["threshold 0.35", "upsampling corners", "text sent"]
    assert said["lavt"]["not_applied"][-1].startswith("resizing of the map to 480 before its threshold")
    assert (
        "not applied, as masks are finished: threshold 0.35; upsampling corners; text sent" in capsys.readouterr().out
    )
    made = {"info": {"protocol": "cris"}, "annotations": json.loads(Path("good.json").read_text())}
    Path("made.json").write_text(json.dumps(made))
    score.main(Path("made.json"), DATASET, "val", out=Path("made"))
    said = json.loads(Path("made/protocols.json").read_text())
    assert said["cris"]["not_applied"] == []
    assert said["ours"]["not_applied"] == ["threshold 0.5 (they have 0.35)", "upsampling grid (they have corners)"]
    plain, again = (json.loads(Path(out, "metrics.json").read_text()) for out in ("scores", "made"))
    assert plain == again


def test_squares_are_scored_where_squares_are_compared(given: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    square = {"size": [480, 480], "counts": masks.encode(np.ones((480, 480), np.uint8))}
    squares = [{**entry, "segmentation": square} for entry in json.loads(Path("good.json").read_text())]
    Path("squares.json").write_text(json.dumps({"info": {"protocol": {"resolution": 480}}, "annotations": squares}))
    score.main(Path("squares.json"), DATASET, "val", out=Path("scores"))
    metrics = json.loads(Path("scores/metrics.json").read_text())
    assert list(metrics) == ["lavt"]
    assert 0 < metrics["lavt"]["val"]["mIoU"] < 0.5
    assert "ours      not scored: masks are 480x480, and it compares at their images' sizes" in capsys.readouterr().out
    Path("nothing.json").write_text(json.dumps([{**entry, "segmentation": None} for entry in squares]))
    score.main(Path("nothing.json"), DATASET, "val")
    assert "global_local not scored: no expression had anything to choose from" in capsys.readouterr().out


def test_mistakes_of_both_files_and_all_options_are_told(given: Workplace) -> None:
    Path("good.json").write_text("[]")
    Path("bad.json").write_text("<html>")
    with pytest.raises(DataError) as told:
        score.main(Path("good.json"), DATASET, "val", against=Path("bad.json"))
    assert "good.json cannot be scored on shapes val (1 problem)" in str(told.value)
    assert "bad.json is an HTML or XML page" in str(told.value)
    with pytest.raises(ConfigError) as wrong:
        score.main(
            Path("good.json"), DATASET, "val", against=Path("../workplace/good.json"), missing="no", out=Path(".")
        )
    for part in ("(3 problems)", "--missing no", "good.json is the file itself", "--out . exists already"):
        assert part in str(wrong.value), part
    with pytest.raises(ConfigError, match=r"(?s)\(2 problems\).*a.json: no such file.*b.json: no such file"):
        score.main(Path("a.json"), DATASET, "val", against=Path("b.json"))
    with pytest.raises(DataError, match="shapes has no split 'test'"):
        score.main(Path("good.json"), DATASET, "test")


def score_here(
    params: Params, system: str, folder: Path, dataset: str, wanted: list[Plain], *, keep_masks: bool
) -> dict[str, pa.Table]:
    """`evaluate.score` without Ray."""
    places = {"model": Place(str(folder)), "shards": Place(str(paths.shards(dataset)))}
    scorer = evaluate.Scorer(places, params.evaluate.expressions_per_batch, params.evaluate.precision, keep_masks)
    table = pa.concat_tables(scorer(pa.Table.from_pylist([piece])) for piece in evaluate.pieces(scorer.store, wanted))
    names = [job["job"] for job in wanted]
    return {name: table.filter(pc.equal(table["job"], name)).drop_columns(["job", "position"]) for name in names}


@pytest.mark.ray
def test_predictions_written_here_give_the_evaluations_figures(
    workplace: Workplace, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The document's own command, and a model on a dataset that it was not trained on."""
    workplace.link("shards", "model")
    shutil.copytree(paths.shards(DATASET), paths.shards(OTHER))
    (command,) = commands("evaluate")
    names = [name for name in PROTOCOLS if name != "ours"]
    ris(
        *command,
        "--protocol",
        "ours",
        *(part for name in names for part in ("--protocol", name)),
        monkeypatch=monkeypatch,
    )
    assert not (workplace.root / "results").exists()
    assert not (workplace.root / "data/expressions").exists()
    metrics = json.loads(Path("scores/cris/metrics.json").read_text())
    assert list(metrics) == ["ours", *names]
    assert 0 < metrics["ours"]["val"]["mIoU"] != metrics["cris"]["val"]["mIoU"]  # the masks differ
    for name in metrics:
        score.main(Path(f"scores/cris/predictions/{name}-val.json"), DATASET, "val", out=Path(f"again/{name}"))
        again = json.loads(Path(f"again/{name}/metrics.json").read_text())[name]["val"]
        known = {key: value for key, value in metrics[name]["val"].items() if key in again}
        assert {key: value for key, value in again.items() if key in metrics[name]["val"]} == known
        assert set(metrics[name]["val"]) - set(again) <= {"shuffled_across"}
        assert json.loads(Path(f"again/{name}/protocols.json").read_text())[name]["not_applied"] == []
    assert "shuffled_in_image" in json.loads(Path("again/ours/metrics.json").read_text())["ours"]["val"]

    monkeypatch.setattr(evaluate, "score", score_here)
    evaluate.main(model="models/cris-shapes", dataset=OTHER, split=["testA", "val"], out=Path("scores/other"))
    about = json.loads(Path("scores/other/about.json").read_text())
    assert (about["name"], about["dataset"], about["trained_on"]) == (SYSTEM, OTHER, DATASET)
    assert about["model"]["weights_sha256"] == read_description(paths.model(SYSTEM, DATASET)).weights_sha256
    assert list(about["cut_expressions"]) == ["ours/testA", "ours/val"]
    assert not Path("scores/other/predictions").exists()
    capsys.readouterr()
    tabulate.main([Path("scores/cris"), Path("scores/other"), Path("again/ours")])
    head, _, own, theirs = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        *("mIoU, protocol ours", "trained on", "shapes val", "shapes+ val", "shapes+ testA")
    ]
    part = metrics["ours"]["val"]
    shown = f"{part['mIoU']:.3f}* [{part['mIoU_95'][0]:.3f}, {part['mIoU_95'][1]:.3f}]"
    cells = [cell.strip() for cell in own.split("|")[1:-1]]
    assert cells[:3] == ["cris", "shapes", shown]
    assert cells[3] == shown.replace("*", "")  # the same shards under another name
    assert [cell.strip() for cell in theirs.split("|")[1:-1]] == ["ours-val", "?", shown.replace("*", ""), "", ""]


def outcome(folder: str, name: str, dataset: str, value: float, **about: Any) -> Path:
    place = Path(folder)
    place.mkdir(parents=True)
    part = {"mIoU": value, "mIoU_95": [value, value], "oIoU": value, "oIoU_95": [value, value]}
    (place / "metrics.json").write_text(json.dumps({"ours": {"val": part}}))
    if name:
        (place / "about.json").write_text(json.dumps({"name": name, "dataset": dataset, **about}))
    return place


def test_models_of_one_name_are_kept_apart(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        outcome("results/evaluate/cris-shapes", "", "", 0.5),
        outcome("a", "lts", "shapes", 0.25, trained_on="shapes", model={"weights_sha256": "a" * 64}),
        outcome("b", "lts", "shapesg", 0.125, trained_on="shapes", model={"weights_sha256": "b" * 64}),
        outcome("c", "cris", "shapesg", 0.75, trained_on="shapes", model={"weights_sha256": "c" * 64}),
    ]
    tabulate.main(folders)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [
        ["cris", "shapes", "0.500* [0.500, 0.500]", "0.750 [0.750, 0.750]"],
        ["lts aaaaaaaa", "shapes", "0.250* [0.250, 0.250]", ""],
        ["lts bbbbbbbb", "shapes", "", "0.125 [0.125, 0.125]"],
    ]
    with pytest.raises(ConfigError, match=r"not all have scores of protocol cris \(4 problems\)"):
        tabulate.main(folders, protocol="cris")
    with pytest.raises(ConfigError, match=r"(?s)--protocol mine: choose of.*--metric IoU: choose of mIoU, oIoU"):
        tabulate.main(folders, protocol="mine", metric="IoU")
    with pytest.raises(DataError, match=r"nowhere holds no evaluation \(No such file or directory\)"):
        tabulate.main([Path("nowhere")])
    for content, problem in (
        ("[]", "has no attribute"),
        ('{"val": {"mIoU": 1}}', "no scores with intervals"),
        ("{", ""),
    ):
        (folders[1] / "metrics.json").write_text(content)
        with pytest.raises(DataError, match=rf"a holds no evaluation \(.*{problem}"):
            tabulate.main(folders)


def test_options_that_do_not_go_together_are_told_at_once(workplace: Workplace) -> None:
    with pytest.raises(ConfigError) as told:
        evaluate.main(SYSTEM, split=["val"], protocol=["mine"], predictions=True)
    for part in (
        "(5 problems)",
        "--dataset: name",
        "--split: goes with --model",
        "--predictions: goes with --model",
        "--protocol mine",
    ):
        assert part in str(told.value), part
    with pytest.raises(ConfigError) as told:
        evaluate.main(SYSTEM, DATASET, model="models/x")
    assert "give --system," in str(told.value)
    assert "--out: name a new folder" in str(told.value)
    Path("scores").mkdir()
    with pytest.raises(ConfigError, match="--out scores exists already"):
        evaluate.main(model="models/x", dataset=DATASET, out=Path("scores"))
    assert workplace.files() == set()


def refused(model: str, dataset: str, **options: Any) -> str:
    with pytest.raises((WeightsError, DataError)) as told:
        evaluate.main(model=model, dataset=dataset, out=Path("scores"), **options)
    assert not Path("scores").exists()
    return str(told.value)


def test_a_model_that_does_not_fit_a_dataset_says_what_to_run(workplace: Workplace) -> None:
    workplace.link("shards", "model")
    place = workplace.own(paths.model(SYSTEM, DATASET)) / "model.json"
    content = json.loads(place.read_text())
    content["info"] |= {"image_size": 96, "resample": "exact", "word_len": 99}
    place.write_text(json.dumps(content))
    message = refused("models/cris-shapes", DATASET)
    assert message.startswith("models/cris-shapes cannot be scored on shapes (3 problems):")
    for part in (
        "its image_size is 96, that of the shards of shapes 64: set preprocess.image_size: 96 in params.yaml and run "
        "`ris preprocess --dataset shapes`",
        "its resample is exact, that of the shards of shapes opencv4",
        "it is said to read 99 tokens of a sentence, and has room for 32",
    ):
        assert part in message, part
    content["info"] |= {"word_len": None}
    place.write_text(json.dumps(content))
    assert "it is what a training starts from" in refused("models/cris-shapes", DATASET)
    assert "run the preprocess stage for this dataset first" in refused("models/cris-shapes", OTHER)
    assert "shapes has no split 'test'" in refused("models/cris-shapes", DATASET, split=["test"])
    assert "models/none holds no model" in refused("models/none", DATASET)


def test_proposals_that_do_not_fit_say_what_to_run(workplace: Workplace) -> None:
    workplace.link("shards")
    export_untrained(workplace.tiny, Path("models/zero"), "global_local")
    message = refused("models/zero", DATASET)
    assert (
        "it chooses among proposals, and shapes has none (data/proposals/shapes/manifest.json does not exist" in message
    )
    assert "run `ris propose --dataset shapes` with a system that chooses among proposals" in message
    assert "it sees the photos themselves, and there is no data/raw/shapes/images/mscoco" in message
    workplace.link("raw")
    options = dict(load_model(Path("models/zero"))[1].info.proposals or {})
    folder = paths.proposals(DATASET)
    folder.mkdir(parents=True)
    made = {"parts": [], "splits": ["val"], "options": {**options, "generator": "sam"}, "data_digest": "other"}
    write_proposals(folder, made)
    message = refused("models/zero", DATASET)
    assert "(3 problems)" in message
    assert f"made with generator sam and not {options['generator']}: set these in section `proposals`" in message
    assert "were made of other shards: run `ris propose" in message
    assert "shapes has no proposals of testA, testB: set proposals.splits" in message

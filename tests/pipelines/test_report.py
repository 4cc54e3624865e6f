"""The report page, the gallery's choice and pictures, and files that are whole or not there."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pipelines_world import Workplace

from pipelines import evaluate, files, gallery, report
from ris_core.config import EvaluateParams
from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation.evaluator import TABLE_SCHEMA
from ris_core.evaluation.figures import PREDICTED
from ris_core.evaluation.metrics import PROTOCOLS

OURS = PROTOCOLS["ours"]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """A table as `evaluate` makes it, from what matters about each row."""
    plain = {"split": "val", "kind": "attribute", "intersection": 0, "union": 100, "area": 50, "score": 0.5}
    control = {"right_object": False, "random_intersection": 10.0, "random_union": 90.0, "random_iou": 0.11}
    ids = ({"image_id": i // 2, "ref_id": i, "sent_id": i, "text": f"thing {i}"} for i in range(len(rows)))
    filled = [plain | control | own | row for own, row in zip(ids, rows, strict=True)]
    return pa.Table.from_pylist(filled, schema=TABLE_SCHEMA)


def test_hits_are_typical_and_misses_are_the_surest() -> None:
    hits = [{"intersection": value} for value in (50, 60, 70, 80, 90, 95, 99, 100)]
    misses = [{"intersection": 5, "score": score} for score in (0.6, 0.9, 0.7)]
    middling = [{"intersection": 30, "score": 0.99}]
    chosen = gallery.choose(table(hits + misses + middling))
    assert [(row["verdict"], round(row["iou"], 2)) for row in chosen[:2]] == [("hit", 0.99), ("hit", 1.0)]
    assert [(row["verdict"], row["score"]) for row in chosen[2:]] == [("miss", 0.9), ("miss", 0.7)]


def test_every_kind_of_expression_is_shown_and_ties_are_broken_by_sentence() -> None:
    rows = [{"kind": kind, "intersection": 80} for kind in reversed(gallery.KINDS) for _ in range(5)]
    chosen = gallery.choose(table(rows))
    assert [row["kind"] for row in chosen] == [kind for kind in gallery.KINDS for _ in range(2)]
    first = [row["sent_id"] for row in chosen if row["kind"] == gallery.KINDS[-1]]
    assert first == [3, 4]
    assert gallery.choose(table([])) == []


def draw(workplace: Workplace, threshold: float, out: Path) -> list[dict[str, Any]]:
    """A picture of the first sentence of the data."""
    out.mkdir()
    shards = ShardStore("data/shards/shapes")
    image = shards.row(0)
    ref = image["refs"][0]
    row = {"image_id": image["image_id"], "ref_id": ref["ref_id"], "verdict": "hit", "kind": "size", "iou": 0.75}
    row |= {"text": ref["sentences"][0]["sent"], "sent_id": ref["sentences"][0]["sent_id"], "score": 0.5}
    model = Path("models/cris-shapes")
    return gallery.draw([row], model, threshold, shards, Path("data/raw/shapes"), out)


def test_pictures_show_what_was_scored(workplace: Workplace, tmp_path: Path) -> None:
    workplace.link("raw", "shards", "model")
    (shown,) = draw(workplace, 0.0, tmp_path / "all")
    assert set(shown) == {"file", "text", "kind", "verdict", "iou", "score", "sent_id"}
    assert shown["file"] == "00-hit-size.jpg"
    draw(workplace, 0.9999, tmp_path / "none")
    everything, nothing = (np.asarray(Image.open(tmp_path / n / shown["file"]), float) for n in ("all", "none"))
    assert (tmp_path / "all" / "answers.jpg").stat().st_size > 0
    assert min(everything.shape[:2]) >= 160  # small pictures are enlarged
    tint = np.array(PREDICTED)
    assert np.abs(everything - tint).mean() < np.abs(nothing - tint).mean() - 10  # the mask covers all, or nothing


def evaluated(name: str, scores: int, located: bool = False) -> None:
    """Leave what train and evaluate leave of one run; `located`, of a two-stage system that has a coarse map."""
    random = np.random.default_rng(scores)
    rows = [{"intersection": int(random.integers(100)), "kind": gallery.KINDS[i % 5]} for i in range(20)]
    metrics = {"ours": {"val": evaluate.summary(table(rows), OURS, EvaluateParams(bootstrap_samples=20))}}
    metrics["ours"]["val"]["shuffled_in_image"] = {"mIoU": 0.0123, "oIoU": 0.0456}
    metrics["ours"]["val"]["shuffled_across"] = {"mIoU": 0.0234, "oIoU": 0.0567}
    metrics["ours"]["testA"] = evaluate.summary(table(rows[:3]), OURS, EvaluateParams(bootstrap_samples=20))
    out = Path("results/evaluate") / name
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "protocols.json", {"ours": asdict(OURS)})
    item = {"file": "00.jpg", "text": 'the <red> "star"', "kind": "size", "verdict": "miss", "iou": 0.01, "score": 0.9}
    files.write_json(out / "gallery" / "gallery.json", [{**item, "sent_id": 1}])
    Image.new("RGB", (4, 4), (scores, 0, 0)).save(out / "gallery" / "00.jpg")
    rows = [{"epoch": epoch, "train/loss": 1 / epoch, "val/mIoU": 0.1, "val/oIoU": 0.2} for epoch in (1, 2)]
    files.write_csv(Path("results/train") / name / "history.csv", rows)
    if located:
        metrics["ours"]["val"]["located"] = {"mIoU": 0.0345, "oIoU": 0.0678}
        files.write_json(out / "metrics.json", metrics)
        files.write_csv(Path("results/initialise") / name / "history.csv", rows[:1])


def page() -> str:
    report.main()
    return unescape(Path("results/report/index.html").read_text())


CLIP = {
    "retrieval@1": 0.9,
    "retrieval@1_chance": 1 / 128,
    "phrase_to_object": 0.8,
    "phrase_to_object_chance": 0.25,
}


def test_the_page_shows_scores_curves_and_pictures(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    files.write_json(Path("results/clip/rn.json"), CLIP)
    files.write_json(Path("results/clip/vit.json"), {})  # weights were given: there was nothing to train
    shown = page()
    scores = json.loads(Path("results/evaluate/cris-shapes/metrics.json").read_text())["ours"]
    for split in ("val", "testA"):
        for value in (scores[split]["mIoU"], scores[split]["oIoU"], scores[split]["Pr@0.5"], *scores[split]["mIoU_95"]):
            assert f"{value:.3f}" in shown, (split, value)
    assert "<td>0.012 / 0.046</td><td>0.023 / 0.057</td></tr>" in shown
    assert "<td>–</td><td>–</td></tr>" in shown  # the controls were scored on one split only
    head, *clips = rows_of("<h2>The small CLIPs</h2>", shown)
    assert head[:3] == ["CLIP", "retrieval@1chance", "phrase_to_objectchance"]
    assert clips == [["rn", "0.900 0.008", "0.800 0.250", *["–"] * (len(head) - 3)]]
    assert 'the <red> "star"' in shown
    assert 'the <red> "star"' not in Path("results/report/index.html").read_text()  # escaped: data cannot be markup
    picture = base64.b64encode(Path("results/evaluate/cris-shapes/gallery/00.jpg").read_bytes()).decode()
    assert f'src="data:image/jpeg;base64,{picture}"' in shown
    assert not re.findall(r'src="(?!data:)', shown)  # one file, which can be mailed
    (curves,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', shown)
    assert "<svg" in base64.b64decode(curves).decode()


def test_the_page_holds_every_run_and_is_the_same_every_time(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    evaluated("cris-shapesg", 2)
    (Path("results/evaluate") / ".gitignore").write_text("")
    shown = page()
    assert shown.count("<h2>Gallery: ") == 2
    assert "The small CLIP" not in shown
    assert page() == shown


def rows_of(heading: str, shown: str) -> list[list[str]]:
    """The rows of the table under a heading, each a list of its cells' texts."""
    table = shown.split(heading)[1].split("</table>")[0]
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in rows]


def test_systems_are_compared_where_they_answered_the_same(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    evaluated("risclip-shapes", 2, located=True)
    evaluated("cris-shapesg", 3)
    shown = page()
    headings = re.findall("<h3>(.*?)</h3>", shown.split("<h2>Comparison</h2>")[1].split("<h2>")[0])
    places = [f"{dataset} {split}" for dataset in ("shapes", "shapesg") for split in ("val", "testA")]
    assert headings == [f"{place}, protocol “ours”" for place in places]
    head, cris, risclip, random = rows_of("<h3>shapes val, protocol “ours”</h3>", shown)
    assert head[0] == "system"
    assert [row[0] for row in (cris, risclip, random)] == ["cris", "risclip", "random object"]
    for row, name in ((cris, "cris-shapes"), (risclip, "risclip-shapes")):
        scores = json.loads((Path("results/evaluate") / name / "metrics.json").read_text())["ours"]["val"]
        assert row[1].startswith(f"{scores['mIoU']:.3f} [{scores['mIoU_95'][0]:.3f}, ")
        assert row[3] == f"{scores['Pr@0.5']:.3f}"
        assert len(row) == len(head)
    assert (cris[-1], risclip[-1]) == ("–", "0.035 / 0.068")
    assert [row[0] for row in rows_of("<h3>shapesg val, protocol “ours”</h3>", shown)] == [
        "system",
        "cris",
        "random object",
    ]


def test_curves_of_both_stages_are_drawn(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    alone = page()
    (Path("results/initialise") / "cris-shapes").mkdir(parents=True)  # nothing was trained before
    assert page() == alone
    evaluated("risclip-shapes", 2, located=True)
    run = report.read_run(Path("results/evaluate/risclip-shapes"))
    assert {name: [row["epoch"] for row in rows] for name, rows in run["histories"].items()} == {
        "risclip-shapes, stage 1": [1],
        "risclip-shapes": [1, 2],
    }
    single = report.read_run(Path("results/evaluate/cris-shapes"))
    assert list(single["histories"]) == ["cris-shapes"]
    picture = base64.b64decode(report.curves([single, run]).partition(",")[2]).decode()
    assert [f"<!-- {name} -->" in picture for name in ("cris-shapes", "risclip-shapes, stage 1")] == [True, True]


def test_without_scores_there_is_no_page(workplace: Workplace) -> None:
    with pytest.raises(DataError, match="results/evaluate has no scores yet: run the evaluate stage first"):
        report.main()
    assert workplace.files() == set()


def test_curves_are_written_as_dvc_reads_them(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "val/mIoU": 0.25}, {"epoch": 2, "val/mIoU": 0.5}]
    files.write_csv(tmp_path / "deep" / "history.csv", rows)
    with (tmp_path / "deep" / "history.csv").open() as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in rows]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["history.csv"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with files.replaced_folder(out) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(FileNotFoundError), files.replaced_folder(out) as folder:
        (folder / "new").write_text((tmp_path / "nowhere").read_text())
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/old"]
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "half").write_text("left by a run that was killed")
    with files.replaced_folder(out) as folder:
        (folder / "new").write_text("2")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/new"]

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
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pipelines_world import Workplace

from pipelines import gallery, paths, report, report_tables
from pipelines.scores import summary
from ris_core import files
from ris_core.data.dataset import ShardStore
from ris_core.errors import DataError
from ris_core.evaluation.evaluator import TABLE_SCHEMA
from ris_core.evaluation.figures import PREDICTED
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.params import EvaluateParams
from ris_core.models.answer import Reading
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

OURS = PROTOCOLS["ours"]


def table(rows: list[Plain]) -> pa.Table:
    """A table as `evaluate` makes it, from what matters about each row."""
    plain = {"split": "val", "kind": "attribute", "intersection": 0, "union": 100, "area": 50, "score": 0.5}
    plain |= {"found": True, "object_share": 0.1}
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


def draw(workplace: Workplace, threshold: float, out: Path) -> list[Plain]:
    """A picture of the first sentence of the data."""
    out.mkdir()
    shards = ShardStore("data/shards/shapes")
    image = shards.row(0)
    ref = image["refs"][0]
    row = {"image_id": image["image_id"], "ref_id": ref["ref_id"], "verdict": "hit", "kind": "size", "iou": 0.75}
    row |= {"text": ref["sentences"][0]["sent"], "sent_id": ref["sentences"][0]["sent_id"], "score": 0.5}
    model = Path("models/cris-shapes")
    predictor = RISPredictor.from_folder(model, reading=Reading(threshold))
    return gallery.draw([row], predictor, shards, Path("data/raw/shapes"), out)


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


def scores(seed: int, count: int = 20) -> Plain:
    """Scores of one split in the form of metrics.json."""
    random = np.random.default_rng(seed)
    mean, cumulative = (round(float(value), 5) for value in random.uniform(0.2, 0.8, 2))
    numbers: Plain = {
        "expressions": count,
        "images": count // 2,
        "mIoU": mean,
        "oIoU": cumulative,
        "right_object": 0.4321,
    }
    numbers |= {name: round(float(random.random()), 5) for name in report.PRECISION}
    numbers |= {"mIoU_95": [mean - 0.05, mean + 0.05], "oIoU_95": [cumulative - 0.04, cumulative + 0.04]}
    kinds = {kind: {"count": count // 5, "mIoU": round(float(random.random()), 5)} for kind in gallery.KINDS}
    return {**numbers, "random_object": {"mIoU": 0.2713, "oIoU": 0.1592}, "by_kind": kinds}


def evaluated(name: str, seed: int, **val: Any) -> Path:
    """Leave what train and evaluate leave of one run; `val` are further scores of that split. Returns the folder."""
    metrics = {"ours": {"val": scores(seed), "testA": scores(seed + 100, 5)}}
    metrics["ours"]["val"]["shuffled_in_image"] = {"mIoU": 0.0123, "oIoU": 0.0456}
    metrics["ours"]["val"]["shuffled_across"] = {"mIoU": 0.0234, "oIoU": 0.0567}
    metrics["ours"]["val"] |= val
    out = Path("results/evaluate") / name
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "protocols.json", {"ours": asdict(OURS)})
    item = {"file": "00.jpg", "text": 'the <red> "star"', "kind": "size", "verdict": "miss", "iou": 0.01, "score": 0.9}
    files.write_json(out / "gallery" / "gallery.json", [{**item, "sent_id": 1}])
    Image.new("RGB", (4, 4), (seed, 0, 0)).save(out / "gallery" / "00.jpg")
    files.write_csv(Path("results/train") / name / "history.csv", EPOCHS)
    return out


EPOCHS = [{"epoch": epoch, "train/loss": 1 / epoch, "val/mIoU": 0.1, "val/oIoU": 0.2} for epoch in (1, 2)]
COST = {"parameters": 4_321_000, "trained_parameters": 765_432, "gflop_image": 12.345, "gflop_expression": 0.0123}
WAITING = {
    "ms_first": 45.678,
    "ms_next": 1.2345,
    "floor_ms_first": 23.4,
    "device": "a <slow> one",
    "gflop_per_s_matmul": 87.6,
}
BEHAVED = {
    "mirror": {
        "cases": 12,
        "iou": 0.6111,
        "agree": 0.7,
        "iou_unswapped": 0.2222,
        "cases_plain": 30,
        "iou_plain": 0.7333,
    },
    "swap": {"cases": 0},
    "absent": {"cases": 7, "score_present": 0.9444, "score_absent": 0.8555, "auroc": 0.6666, "empty_absent": 0.0777},
}
CLIP = {
    "retrieval@1": 0.9,
    "retrieval@1_chance": 1 / 128,
    "phrase_to_object": 0.8,
    "phrase_to_object_chance": 0.25,
}


def timed(**systems: Plain) -> None:
    """Leave what `python -m benchmarks.waiting --record` leaves of systems on the dataset shapes."""
    found = {f"{system}-shapes": waiting for system, waiting in systems.items()}
    files.write_json(paths.WAITING, {"date": "2001-02-03", "commit": "0" * 40, "systems": found})


def compared(dataset: str, pairs: bool = True) -> None:
    """Leave what `compare` leaves of two systems, or of one."""
    test = {"difference": 0.1234, "interval": [0.0456, 0.2012], "p": 0.002, "p_holm": 0.0234}
    other = {"difference": -0.0321, "interval": [-0.1, 0.05], "p": 0.0003, "p_holm": 0.4567}
    pair = {"first": "cris", "second": "risclip", "mIoU": test, "oIoU": other}
    hard: Plain = {
        "file": "hard-00-size.jpg",
        "text": "the <b>hard</b> one",
        "kind": "size",
        "iou": {"cris": 0.714, "lts": 0.1},
    }
    part = {"expressions": 20, "pairs": [pair] if pairs else []}
    content = {"protocol": "ours", "splits": {"val": part, "testA": part}, "hard": [hard]}
    files.write_json(Path("results/compare") / dataset / "comparison.json", content)
    Image.new("RGB", (4, 4)).save(Path("results/compare") / dataset / hard["file"])


def page() -> str:
    report.main()
    return unescape(Path("results/report/index.html").read_text())


def rows_of(heading: str, shown: str) -> list[list[str]]:
    """The rows of the first table after a heading, each a list of its cells' texts; a cell over two columns counts twice."""
    (_, after) = shown.split(heading)
    table = after.split("<table")[1].split("</table>")[0]
    rows = []
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.S):
        cells = []
        for attributes, cell in re.findall(r"<t[dh]\b([^>]*)>(.*?)</t[dh]>", row, re.S):
            span = re.search(r'colspan="(\d+)"', attributes)
            text = re.sub(r"</?[a-z][^>]*>", " ", cell).translate({0xAD: None, 0x200B: None}).split()
            cells += [" ".join(text)] * (int(span[1]) if span else 1)
        rows.append(cells)
    return rows


def test_one_table_holds_all_systems_and_splits(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    files.write_json(evaluated("risclip-shapes", 2) / "cost.json", COST)
    timed(risclip=WAITING)
    evaluated("cris-shapesg", 3)
    shown = page()
    groups, head, *rows = rows_of("<h3>shapes, protocol “ours”</h3>", shown)
    assert groups == ["system", *["val"] * 5, *["testA"] * 5, *["parameters"] * 2, *["GFLOP per"] * 2, *["ms for"] * 2]
    assert head[:10] == ["mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"] * 2
    assert [row[0] for row in rows] == ["cris", "risclip", "random object"]
    for row, name in zip(rows, ("cris-shapes", "risclip-shapes"), strict=False):
        metrics = json.loads((Path("results/evaluate") / name / "metrics.json").read_text())["ours"]
        expected = []
        for split in ("val", "testA"):
            for measure in ("mIoU", "oIoU"):
                value, (low, high) = metrics[split][measure], metrics[split][f"{measure}_95"]
                expected.append(f"{value:.3f} {low:.3f}–{high:.3f}")
            expected += [f"{metrics[split][f'Pr@0.{i}']:.3f}" for i in (5, 7, 9)]
        assert row[1:11] == expected
        assert len(row) == len(groups) == len(head) + 1
    assert rows[0][11:] == ["–"] * 6
    assert rows[1][11:] == ["4.32 M", "0.765 M", "12.3", "0.0123", "45.7 floor 23.4", "1.23"]
    assert rows[2][1:] == ["0.271", "0.159", "", "", "", "0.271", "0.159", "", "", "", *[""] * 6]
    told = "Timed by <code>python -m benchmarks.waiting</code> (2001-02-03) on a <slow> one (risclip 87.6): the rate of"
    assert f"{told} float32 matrix products" in shown
    assert [row[0] for row in rows_of("<h3>shapesg, protocol “ours”</h3>", shown)[2:]] == ["cris", "random object"]


def test_waiting_times_are_those_that_were_recorded_and_no_others(workplace: Workplace) -> None:
    for system in ("cris", "lts"):
        files.write_json(evaluated(f"{system}-shapes", 1) / "cost.json", COST)
    counted = ["4.32 M", "0.765 M", "12.3", "0.0123"]

    def ends(shown: str) -> list[list[str]]:
        return [row[11:] for row in rows_of("<h3>shapes, protocol “ours”</h3>", shown)[2:4]]

    assert ends(alone := page()) == [[*counted, "–", "–"]] * 2
    assert "Timed by" not in alone
    timed()  # as it is before anybody timed anything
    assert page() == alone
    timed(lts=WAITING, risclip=WAITING)  # the one is not in it, of the other there are no scores
    shown = page()
    assert ends(shown) == [[*counted, "–", "–"], [*counted, "45.7 floor 23.4", "1.23"]]
    assert "on a <slow> one (lts 87.6): the rate" in shown
    timed(cris=WAITING, lts={**WAITING, "device": "another", "gflop_per_s_matmul": 4.321})
    assert "on a <slow> one (cris 87.6); another (lts 4.32): the rate" in page()


def test_a_system_without_a_split_leaves_a_gap(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    out = evaluated("lts-shapes", 2)
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["ours"]["val"]
    files.write_json(out / "metrics.json", metrics | {"cris": {"testA": scores(9)}})
    files.write_json(out / "protocols.json", {name: asdict(PROTOCOLS[name]) for name in ("ours", "cris")})
    shown = page()
    (cris, lts, random) = rows_of("<h3>shapes, protocol “ours”</h3>", shown)[2:]
    assert lts[1:6] == ["–"] * 5
    assert lts[6].startswith(f"{metrics['ours']['testA']['mIoU']:.3f} ")
    assert len({len(row) for row in (cris, lts, random)}) == 1
    alone = rows_of("<h3>shapes, protocol “cris”</h3>", shown)
    assert [row[0] for row in alone[2:]] == ["lts", "random object"]
    assert alone[0][1:6] == ["testA"] * 5
    *_, lts_kinds = rows_of("<h3>shapes by kind, protocol “ours”</h3>", shown)
    assert lts_kinds[1:6] == ["–"] * 5


def test_what_a_zero_shot_system_chose_among_stands_below_its_score(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    best, oracle = {"mIoU": 0.8123, "oIoU": 0.8234}, {"mIoU": 0.5123, "oIoU": 0.5234}
    evaluated("global_local-shapes", 2, upper_bound=best, oracle_proposals=oracle, unanswered=3)
    (Path("results/train/global_local-shapes") / "history.csv").unlink()
    shown = page()
    rows = rows_of("<h3>shapes, protocol “ours”</h3>", shown)[2:]
    assert [row[0] for row in rows] == [
        "cris",
        "global_local",
        "best of its proposals, each time",
        "choosing among the true objects",
        "random object",
    ]
    assert rows[2][1:8] == ["0.812", "0.823", "", "", "", "", ""]
    assert rows[3][1:3] == ["0.512", "0.523"]
    assert len({len(row) for row in rows}) == 1
    assert "Expressions without any proposal to choose from, global_local: 3 of 20 in val." in shown


def test_the_papers_figures_stand_apart_with_their_grade(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    shown = page()
    aside = shown.split("<aside")[1].split("</aside>")[0]
    assert "They are not comparable with our figures on the embedded" in aside
    head, *rows = rows_of("<h3>The papers’ own figures: RefCOCO, UNC split, real photos</h3>", shown)
    assert head[:6] == ["system", "metric", "val", "testA", "testB", "grade of evidence"]
    assert ["CRIS, ResNet-50", "mIoU", "69.52", "72.72", "64.70", "stated"] in [row[:6] for row in rows]
    assert "(72.5)" in next(row for row in rows if row[:3] == ["RISCLIP-B", "mIoU", "75.7"])  # nothing confirms it
    assert next(row[1] for row in rows if row[0] == "LTS") == "IoU, kind unclear"
    assert all(row[1] in ("mIoU", "oIoU", "IoU, kind unclear") and all(row) for row in rows)
    assert {row[0].split(",")[0].split("-")[0] for row in rows} == {"CRIS", "RISCLIP", "LTS", "Global"}
    assert "69.52" not in shown.replace(aside, "")


def test_all_unconfirmed_figures_are_marked() -> None:
    """A row graded unconfirmed as a whole has all of its figures in parentheses; one stated or confirmed, none."""
    for row in json.loads(report.PUBLISHED.read_text())["rows"]:
        doubtful = {"unconfirmed": ["val", "testA", "testB"], "stated": [], "confirmed": []}.get(row["grade"])
        assert doubtful is None or row.get("doubtful", []) == doubtful, row
        assert all(0 < float(row[split]) < 100 for split in ("val", "testA", "testB"))


def test_pairs_and_hard_expressions_are_shown_when_they_were_compared(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    alone = page()
    assert "Paired tests" not in alone
    assert "Hard expressions, side by side" not in alone
    compared("shapes")
    shown = page()
    groups, _, pair = rows_of('<h2 id="pairs">Paired tests</h2>', shown)
    assert groups == ["first", "second", *["val 20 expressions"] * 2, *["testA 20 expressions"] * 2]
    both = ["+0.123 +0.046 to +0.201 p 0.002, Holm 0.023", "-0.032 -0.100 to +0.050 p < 0.001, Holm 0.457"]
    assert pair == ["cris", "risclip", *both, *both]
    assert "<b>+0.123</b>" in shown
    assert "<b>-0.032</b>" not in shown
    assert 'src="../compare/shapes/hard-00-size.jpg"' in shown
    assert "size · cris 0.71 · lts 0.10" in shown
    assert "<b>hard</b>" not in Path("results/report/index.html").read_text()
    compared("shapes", pairs=False)
    assert "There is one system: no pairs to compare." in page()


def test_kinds_and_sizes_have_systems_as_rows(workplace: Workplace) -> None:
    size = {name: {"count": 7, "mIoU": value, "oIoU": 0.1} for name, value in (("small", 0.1111), ("large", 0.9999))}
    evaluated("cris-shapes", 1, by_size={"bounds": [0.0412, 0.125], **size})
    evaluated("lts-shapes", 2)  # as scored before there were sizes
    shown = page()
    groups, head, *rows = rows_of("<h3>shapes by kind, protocol “ours”</h3>", shown)
    assert groups == ["system", *["val"] * len(gallery.KINDS), *["testA"] * len(gallery.KINDS)]
    assert head == [f"{kind} {count}" for count in (4, 1) for kind in gallery.KINDS]
    for row, name in zip(rows, ("cris", "lts"), strict=True):
        metrics = json.loads((Path(f"results/evaluate/{name}-shapes") / "metrics.json").read_text())["ours"]
        values = [metrics[split]["by_kind"][kind]["mIoU"] for split in ("val", "testA") for kind in gallery.KINDS]
        assert row == [name, *(f"{value:.3f}" for value in values)]
    groups, head, *rows = rows_of("<h3>shapes by size, protocol “ours”</h3>", shown)
    assert (groups, head) == (["system", "val", "val"], ["small ≤ 4.1 % 7", "large > 12 % 7"])
    assert rows == [["cris", "0.111", "1.000"], ["lts", "–", "–"]]
    evaluated("cris-shapes", 1)
    assert "mIoU by size" not in page()


def test_behaviour_is_shown_with_what_it_means(workplace: Workplace) -> None:
    out = evaluated("cris-shapes", 1)
    evaluated("lts-shapes", 2)
    assert '<h2 id="behaviour">' not in page()
    files.write_json(out / "behaviour.json", BEHAVED)
    shown = page()
    groups, head, *rows = rows_of("<h3>shapes, behaviour</h3>", shown)
    assert groups == ["system", *["mirror"] * 4, *["swap"] * 3, *["absent"] * 5]
    assert head == [measure for measures in report_tables.BEHAVIOUR.values() for measure in measures]
    swap = ["0", "–", "–"]
    absent = ["7", "0.944", "0.856", "0.667", "0.078"]
    assert rows == [["cris", "12", "0.611", "0.222", "0.733", *swap, *absent]]
    for test, measures in report_tables.BEHAVIOUR.items():
        for measure, meaning in measures.items():
            assert f"<dt>{test}.{measure}</dt><dd>{meaning}</dd>" in shown


def test_the_page_shows_each_system_and_its_pictures(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1, located={"mIoU": 0.0341, "oIoU": 0.0678})
    files.write_json(Path("results/clip/rn.json"), CLIP)
    files.write_json(Path("results/clip/vit.json"), {})  # weights were given: there was nothing to train
    shown = page()
    head, val, test = rows_of("<h2>cris-shapes</h2>", shown)
    assert len(head) == len(val) == len(test)
    assert val[:2] == ["val", "20"]
    assert val[-5:] == ["0.432", "0.271 / 0.159", "0.012 / 0.046", "0.023 / 0.057", "0.034 / 0.068"]
    assert test[-3:] == ["–", "–", "–"]  # controls were scored on one split only
    head, *clips = rows_of("<h2>The small CLIPs</h2>", shown)
    assert head[:3] == ["CLIP", "retrieval@1 chance", "phrase_to_object chance"]
    assert clips == [["rn", "0.900 0.008", "0.800 0.250", *["–"] * (len(head) - 3)]]
    assert 'the <red> "star"' in shown
    assert 'the <red> "star"' not in Path("results/report/index.html").read_text()  # escaped: data cannot be markup
    (curves,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', shown)
    assert "<svg" in base64.b64decode(curves).decode()


def test_pictures_are_where_the_page_says(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    evaluated("cris-refcoco+_unc", 2)
    compared("shapes")
    shown = page()
    sources = [unquote(source) for source in re.findall(r'src="(?!data:)([^"]*)"', shown)]
    assert sources == [
        "../compare/shapes/hard-00-size.jpg",
        "../evaluate/cris-refcoco+_unc/gallery/00.jpg",
        "../evaluate/cris-shapes/gallery/00.jpg",
    ]
    assert all((Path("results/report") / source).is_file() for source in sources)
    targets = re.findall(r'href="#([^"]*)"', shown)
    assert {"systems", "published", "pairs", "hard", "kinds", "each", "curves", "galleries"} == set(targets)
    assert all(shown.count(f'id="{target}"') == 1 for target in targets)  # no link to a section that is not there
    assert "<script" not in shown


def test_all_pictures_that_are_missing_are_told_at_once(workplace: Workplace) -> None:
    (evaluated("cris-shapes", 1) / "gallery" / "00.jpg").unlink()
    compared("shapes")
    Path("results/compare/shapes/hard-00-size.jpg").unlink()
    with pytest.raises(DataError) as told:
        report.main()
    assert str(told.value).splitlines() == [
        "pictures that results name are not there (2 problems):",
        "  - results/evaluate/cris-shapes/gallery/00.jpg",
        "  - results/compare/shapes/hard-00-size.jpg",
        "run the stages evaluate and compare again",
    ]
    assert not Path("results/report").exists()


def test_the_page_holds_every_run_and_is_the_same_every_time(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    evaluated("cris-shapesg", 2)
    (Path("results/evaluate") / ".gitignore").write_text("")
    shown = page()
    assert shown.startswith("<!doctype html>\n")
    assert shown.count("<h2>Gallery: ") == 2
    assert "The small CLIP" not in shown
    assert page() == shown


def test_curves_of_both_stages_are_drawn(workplace: Workplace) -> None:
    evaluated("cris-shapes", 1)
    alone = page()
    (Path("results/initialise") / "cris-shapes").mkdir(parents=True)  # nothing was trained before
    assert page() == alone
    evaluated("risclip-shapes", 2)
    files.write_csv(Path("results/initialise/risclip-shapes/history.csv"), EPOCHS[:1])
    run = report.read_run(Path("results/evaluate/risclip-shapes"), {})
    assert {name: [row["epoch"] for row in rows] for name, rows in run["histories"].items()} == {
        "risclip-shapes, stage 1": [1],
        "risclip-shapes": [1, 2],
    }
    single = report.read_run(Path("results/evaluate/cris-shapes"), {})
    assert list(single["histories"]) == ["cris-shapes"]
    picture = base64.b64decode((report.curves([single, run]) or "").partition(",")[2]).decode()
    assert [f"<!-- {name} -->" in picture for name in ("cris-shapes", "risclip-shapes, stage 1")] == [True, True]


@pytest.mark.parametrize("history", ["epoch,train/loss,val/mIoU,val/oIoU\n", None])
def test_a_system_without_training_has_no_curve(history: str | None, workplace: Workplace) -> None:
    evaluated("global_local-shapes", 1)
    file = Path("results/train/global_local-shapes/history.csv")
    if history is None:
        file.unlink()
    else:
        file.write_text(history)
    run = report.read_run(Path("results/evaluate/global_local-shapes"), {})
    assert run["histories"] == {}
    assert report.curves([run]) is None
    assert '<h2 id="curves">' not in page()


def test_scores_as_evaluate_writes_them_are_shown(workplace: Workplace) -> None:
    """The page reads what `summary` makes, not only what these tests imagine."""
    out = evaluated("cris-shapes", 1)
    rows = [{"intersection": 5 * i, "kind": gallery.KINDS[i % 5]} for i in range(20)]
    found = summary(table(rows), OURS, EvaluateParams(bootstrap_samples=20))
    files.write_json(out / "metrics.json", {"ours": {"val": found}})
    low, high = found["mIoU_95"]
    (_, _, cris, _) = rows_of("<h3>shapes, protocol “ours”</h3>", page())
    assert cris[1] == f"{found['mIoU']:.3f} {low:.3f}–{high:.3f}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0123456, "0.0123"), (0.987, "0.987"), (1.2345, "1.23"), (45.67, "45.7"), (1234567.8, "1,234,568")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, shown: str) -> None:
    assert report_tables.significant(value) == shown


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

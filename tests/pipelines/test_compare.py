"""Stage `compare`: systems paired over the same expressions, and the expressions that were hard for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipelines_world import DATASET, Workplace, export_untrained

from pipelines import compare, gallery, paired, paths
from pipelines.params import load_params
from ris_core.errors import DataError
from ris_core.evaluation.figures import PREDICTED, TRUTH, outline
from ris_core.evaluation.metrics import PROTOCOLS, paired_bootstrap
from ris_core.evaluation.params import EvaluateParams
from ris_core.models.answer import Reading

OUT = Path("results/compare/shapes")
PARAMS = EvaluateParams(bootstrap_samples=100)


def table(intersections: list[int], **columns: list[Any]) -> pa.Table:
    """Rows as `evaluate` leaves them, two per image, all unions 100; and a column that no one here knows."""
    count = len(intersections)
    plain: dict[str, list[Any]] = {
        "image_id": [i // 2 for i in range(count)],
        "ref_id": list(range(count)),
        "sent_id": list(range(count)),
        "text": [f"thing {i}" for i in range(count)],
        "kind": ["attribute"] * count,
        "new": [0.5] * count,
        "intersection": intersections,
        "union": [100] * count,
    }
    return pa.table(plain | columns)


def save(system: str, split: str, content: pa.Table, protocol: str = "ours") -> None:
    folder = paths.expressions(system, DATASET)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, folder / f"{protocol}-{split}.parquet")


def test_expressions_are_those_that_all_systems_answered(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = table([10, 20, 30, 40, 50]), table([11, 21, 31, 41])
    backwards = second.take([3, 1, 0, 2]).select(paired.EXPRESSION + paired.ANSWER)
    found = paired.joined({"a": first.select(backwards.column_names), "b": backwards}, "shapes val")
    assert found["sent_id"].to_pylist() == [0, 1, 2, 3]
    assert found["a/intersection"].to_pylist() == [10, 20, 30, 40]
    assert found["b/intersection"].to_pylist() == [11, 21, 31, 41]
    told = capsys.readouterr().err.splitlines()
    assert told == ["shapes val: 1 of 5 expressions of a left out, as other systems did not answer them"]
    paired.joined({"a": backwards, "b": backwards}, "shapes val")
    assert capsys.readouterr().err == ""


def test_the_same_number_about_another_expression_is_not_compared() -> None:
    columns = paired.EXPRESSION + paired.ANSWER
    here, elsewhere = table([1, 2]).select(columns), table([1, 2], text=["x", "y"]).select(columns)
    with pytest.raises(DataError, match="shapes val: no expression was answered by all of a, b; evaluate them again"):
        paired.joined({"a": here, "b": elsewhere}, "shapes val")


def test_a_protocol_may_leave_out_what_had_nothing_to_choose_from(workplace: Workplace) -> None:
    found = [True, False, True]
    for protocol in ("ours", "global_local"):
        save("global_local", "val", table([10, 0, 30], found=found), protocol)
    for name, kept in (("ours", [0, 1, 2]), ("global_local", [0, 2])):
        tables = compare.read_tables(DATASET, ["global_local"], PROTOCOLS[name])
        assert tables["val"]["global_local"]["sent_id"].to_pylist() == kept
        assert tables["val"]["global_local"].column_names == paired.EXPRESSION + paired.ANSWER


def answers(**systems: list[int]) -> pa.Table:
    """A joined table."""
    columns = paired.EXPRESSION + paired.ANSWER
    return paired.joined({name: table(values).select(columns) for name, values in systems.items()}, "shapes val")


def test_every_two_systems_are_tested_and_p_values_adjusted_for_their_number() -> None:
    random = np.random.default_rng(0)
    good, bad = random.integers(60, 100, 40).tolist(), random.integers(0, 60, 40).tolist()
    other = [value + int(noise) for value, noise in zip(bad, random.integers(-9, 10, 40), strict=True)]
    joined = answers(good=good, bad=bad, other=[max(0, value) for value in other])
    found = paired.pairs(joined, ["good", "bad", "other"], PARAMS)
    assert [(pair["first"], pair["second"]) for pair in found] == [
        ("good", "bad"),
        ("good", "other"),
        ("bad", "other"),
    ]
    union, images = np.full(40, 100), np.arange(40) // 2
    expected = paired_bootstrap(np.array(good), union, np.array(bad), union, images, 100, PARAMS.seed)
    for name in ("mIoU", "oIoU"):
        each = expected[name]
        assert found[0][name] == {
            "difference": each.difference,
            "interval": list(each.interval),
            "p": each.p,
            "p_holm": 3 * each.p,  # the smallest of three
        }
        assert [pair[name]["p"] < 0.05 for pair in found] == [True, True, False]
        assert found[2][name]["p_holm"] == found[2][name]["p"] > 0.1  # the largest
    assert paired.pairs(joined, ["good"], PARAMS) == []


def test_hard_is_what_some_system_can_do_and_most_cannot() -> None:
    joined = answers(a=[50, 90, 0, 49, 80, 95], b=[10, 5, 0, 49, 70, 90])
    chosen = compare.hardest(joined, ["a", "b"])
    assert [row["sent_id"] for row in chosen] == [0, 4]  # 2 and 3 nobody can, 1 is of the same image as 0
    assert chosen[0]["iou"] == {"a": 0.5, "b": 0.1}
    assert [row["sent_id"] for row in compare.hardest(joined, ["b"])] == [4, 5]  # one image is all there is


def test_every_kind_has_hard_ones_and_ties_go_to_the_first_sentence() -> None:
    kinds = ["size"] * 6 + ["order"] * 6
    columns = paired.EXPRESSION + paired.ANSWER
    content = table([60] * 12, kind=kinds).select(columns)
    joined = paired.joined({"a": content.take(list(reversed(range(12))))}, "shapes val")
    chosen = compare.hardest(joined, ["a"])
    assert [(row["kind"], row["sent_id"]) for row in chosen] == [("size", 0), ("size", 2), ("order", 6), ("order", 8)]
    assert compare.hardest(answers(a=[10, 20]), ["a"]) == []


def truth_table(workplace: Workplace, split: str, share: float) -> pa.Table:
    """A table about the small world's own expressions, all of the same IoU."""
    store = workplace.tiny.store()
    rows = [
        {"sent_id": sentence["sent_id"], "image_id": store.row(int(i))["image_id"], "ref_id": ref["ref_id"]}
        | {"text": sentence["sent"], "kind": "size", "intersection": int(100 * share), "union": 100, "new": 1}
        for i in store.images_of(split)
        for ref in store.row(int(i))["refs"]
        for sentence in ref["sentences"]
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture
def two_systems(workplace: Workplace) -> Workplace:
    """What preprocess, train and evaluate leave of two systems, cris the better one."""
    workplace.link("raw", "shards", "model")
    export_untrained(workplace.tiny, paths.model("risclip", DATASET), "risclip")
    for split in ("testA", "val"):
        save("cris", split, truth_table(workplace, split, 0.75))
        save("risclip", split, truth_table(workplace, split, 0.25))
        save("cris", split, truth_table(workplace, split, 0.01), protocol="cris")
    return workplace


def test_the_stage_writes_tests_and_pictures(two_systems: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    before = two_systems.files()
    compare.main(DATASET)
    found = json.loads((OUT / "comparison.json").read_text())
    assert found["protocol"] == "ours"
    assert list(found["splits"]) == ["val", "testA"]
    for split, part in found["splits"].items():
        assert part["expressions"] == len(truth_table(two_systems, split, 0))
        (pair,) = part["pairs"]
        assert (pair["first"], pair["second"]) == ("cris", "risclip")
        for name in ("mIoU", "oIoU"):
            assert pair[name] == {"difference": 0.5, "interval": [0.5, 0.5], "p": 0.03922, "p_holm": 0.03922}  # 2 / 51
    assert [{**entry, "text": ""} for entry in found["hard"]] == [
        {"file": f"hard-0{i}-size.jpg", "text": "", "kind": "size", "iou": {"cris": 0.75, "risclip": 0.25}}
        for i in range(2)
    ]
    asked = truth_table(two_systems, "val", 0)["text"].to_pylist()
    assert all(entry["text"] in asked for entry in found["hard"])
    written = {f"{OUT}/{name}" for name in ("comparison.json", *(entry["file"] for entry in found["hard"]))}
    assert two_systems.files() - before == written
    lines = capsys.readouterr().out.splitlines()
    start = "cris - risclip:  mIoU +0.500 [+0.500, +0.500] p 0.039 (Holm 0.039)  oIoU +0.500"
    assert [line.split(maxsplit=1)[1][: len(start)] for line in lines] == [start, start]


def distance(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How far pixels are from a colour on average; JPEG changes thin lines a little."""
    return float(np.abs(pixels.astype(float) - colour).mean())


def test_each_system_has_its_own_picture_beside_the_others(two_systems: Workplace, tmp_path: Path) -> None:
    """With a threshold of 1 nothing is marked, with one of 0 everything; the truth is drawn in both."""
    content = truth_table(two_systems, "val", 0.75).select(paired.EXPRESSION + paired.ANSWER)
    rows = compare.hardest(paired.joined({"cris": content, "risclip": content}, "shapes val"), ["cris", "risclip"])
    params = load_params(two_systems.root / "params.yaml")
    pictures = {}
    for threshold in (0.0, 1.0):
        out = tmp_path / str(threshold)
        out.mkdir()
        (first, _) = compare.draw(rows, params, DATASET, Reading(threshold), out)
        pictures[threshold] = np.asarray(Image.open(out / first["file"]))
    (scene, _) = gallery.scenes(rows, two_systems.tiny.store(), paths.raw(DATASET))
    photo, truth = (each.repeat(4, 0).repeat(4, 1) for each in (scene.photo, scene.truth))
    edge, (height, width) = outline(truth), truth.shape
    assert width == 320  # small pictures are enlarged
    assert pictures[1.0].shape[1] > 2 * width
    for left in (0, pictures[1.0].shape[1] - width):
        everything, nothing = (pictures[t][:, left : left + width] for t in (0.0, 1.0))
        assert distance(everything[:height], PREDICTED) < distance(nothing[:height], PREDICTED) - 10
        assert distance(nothing[:height][edge], TRUTH) < distance(photo[edge], TRUTH) - 20
        assert (nothing[height:] < 100).any()  # the caption, black on white
        assert np.median(nothing[height:]) > 250


def test_one_system_has_no_pairs_and_says_so(two_systems: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    two_systems.change(systems=["cris"])
    compare.main(DATASET)
    found = json.loads((OUT / "comparison.json").read_text())
    assert {split: part["pairs"] for split, part in found["splits"].items()} == {"val": [], "testA": []}
    assert [entry["iou"] for entry in found["hard"]] == [{"cris": 0.75}] * 2
    assert capsys.readouterr().out == "cris is the only system: there are no pairs to compare\n"


def test_all_missing_tables_are_told_at_once(two_systems: Workplace) -> None:
    two_systems.change(systems=["cris", "risclip", "lts"])
    (paths.expressions("risclip", DATASET) / "ours-testA.parquet").unlink()
    before = two_systems.files()
    with pytest.raises(DataError) as told:
        compare.main(DATASET)
    assert str(told.value).splitlines() == [
        "the systems cannot be compared on shapes (3 problems):",
        "  - risclip: no data/expressions/risclip-shapes/ours-testA.parquet",
        "  - lts: no data/expressions/lts-shapes/ours-val.parquet",
        "  - lts: no data/expressions/lts-shapes/ours-testA.parquet",
        "run the stage evaluate for them: python -m pipelines.evaluate --system ... --dataset shapes",
    ]
    assert two_systems.files() == before


def test_without_any_table_the_command_says_what_to_run(workplace: Workplace) -> None:
    workplace.link("shards")
    done = workplace.stage("compare", "--dataset", DATASET)
    assert done.returncode == 1
    assert "cris: no data/expressions/cris-shapes/ours-*.parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert workplace.files() == set()


def test_what_was_there_stays_when_it_fails(two_systems: Workplace) -> None:
    compare.main(DATASET)
    before = (OUT / "comparison.json").read_bytes()
    paths.model("cris", DATASET).unlink()  # no pictures can be drawn
    with pytest.raises(Exception, match="models/cris-shapes"):
        compare.main(DATASET)
    assert (OUT / "comparison.json").read_bytes() == before
    assert not [file for file in two_systems.files() if "partial" in file]

"""Stage `evaluate`: what Ray Data's actors find is what one process finds, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines_world import DATASET, SYSTEM, Workplace, export_untrained

from pipelines import cluster, evaluate, gallery, paths, scores
from pipelines.transport import Place
from ris_core.errors import ClusterError, DataError, WeightsError
from ris_core.evaluation import evaluator
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.figures import outline
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.metrics import scores as measured
from ris_core.evaluation.params import EvaluateParams
from ris_core.models.answer import Reading, resized
from ris_core.models.contract import MapSystem, ProposalSystem
from ris_core.models.registry import export_model, load_model
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

if TYPE_CHECKING:
    from tiny_world import Tiny

SPLITS = ["val", "testA", "testB"]
CHANGING = ["intersection", "union", "area", "score", "right_object"]  # columns of a table that depend on the answers
SEGMENTING = Mock(spec=MapSystem, locates=False)
JOBS = evaluate.jobs([PROTOCOLS["ours"], PROTOCOLS["cris_val"]], SPLITS, EvaluateParams(), SEGMENTING)


def test_jobs_are_protocols_times_splits_and_the_controls() -> None:
    scored = [f"{protocol}/{split}" for protocol in ("ours", "cris_val") for split in SPLITS]
    assert [job["job"] for job in JOBS] == [*scored, *scores.SHUFFLED]
    assert all((job["protocol"], job["split"]) == ("ours", "val") for job in JOBS[-2:])
    locating, choosing = Mock(spec=MapSystem, locates=True), Mock(spec=ProposalSystem)
    without = evaluate.jobs([PROTOCOLS["ours"]], ["testA"], EvaluateParams(), locating)
    assert [job["job"] for job in without] == ["ours/testA"]  # the controls belong to their own split
    located = evaluate.jobs([PROTOCOLS["ours"], PROTOCOLS["cris_val"]], SPLITS, EvaluateParams(), locating)
    assert located == [*JOBS, {"job": "located", "protocol": "ours", "split": "val", "seed": 0}]
    zero_shot = evaluate.jobs([PROTOCOLS["ours"]], ["val", "testA"], EvaluateParams(), choosing)
    bounded = ["ours/val", "ours/val/upper_bound", "ours/testA", "ours/testA/upper_bound"]
    assert [job["job"] for job in zero_shot] == [*bounded, *scores.SHUFFLED, "oracle_proposals"]
    assert scores.sorted_splits(["testB", "train", "val", "testA"]) == ["val", "testA", "testB"]


def test_the_controls_exchange_sentences_and_nothing_else(tiny: Tiny) -> None:
    store = tiny.store()
    *_, in_image, across = ({query.sent_id: query for query in evaluate.job_queries(store, job)} for job in JOBS)
    true = {query.sent_id: query for query in evaluate.job_queries(store, JOBS[0])}
    assert across.keys() == true.keys() >= in_image.keys() != set()
    for control in (in_image, across):
        assert all(replace(query, text=true[key].text) == true[key] for key, query in control.items())
        assert sum(query.text != true[key].text for key, query in control.items()) > 0.8 * len(control)
    texts: dict[int, set[str]] = {}
    for query in true.values():
        texts.setdefault(query.image, set()).add(query.text)
    assert all(query.text in texts[query.image] for query in in_image.values())


def test_a_control_that_cannot_be_made_is_none(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one referent has more than half of a split's sentences, as in small data of one's own."""
    every = evaluate.job_queries(tiny.store(), JOBS[0])
    of_one = [query for query in every if query.ref_id == every[0].ref_id]
    monkeypatch.setattr(evaluate, "queries_of", lambda *_: of_one)
    assert evaluate.job_queries(tiny.store(), JOBS[0]) == of_one != []
    assert [evaluate.job_queries(tiny.store(), job) for job in JOBS[-2:]] == [[], []]


def one_process(tiny: Tiny, model: Path, job: Plain) -> pa.Table:
    """A job's table without Ray and without pieces."""
    network, described = load_model(model)
    assert isinstance(network, MapSystem)
    assert described.info.word_len is not None
    return evaluator.evaluate(
        MapAnswers(network, described.info.word_len, "locate" if job["job"] == "located" else "segment"),
        tiny.store(),
        evaluate.job_queries(tiny.store(), job),
        PROTOCOLS[job["protocol"]],
        split=job["split"],
        expressions_per_batch=20,
    )


@pytest.fixture
def prepared(workplace: Workplace) -> Workplace:
    workplace.link("raw", "shards", "model")
    return workplace


@pytest.mark.ray
@pytest.mark.parametrize("actors", [1, 2])
def test_actors_find_what_one_process_finds(
    actors: int, prepared: Workplace, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, untrained = prepared.tiny, prepared.trained
    params = prepared.change(cluster={"evaluate_actors": actors})
    monkeypatch.setattr(evaluate, "PIECE", 7)  # many pieces, which cut through images
    tables = evaluate.score(params, SYSTEM, paths.model(SYSTEM, DATASET), DATASET, JOBS)
    assert list(tables) == [job["job"] for job in JOBS]
    for job in JOBS:
        found, expected = tables[job["job"]], one_process(tiny, untrained, job)
        assert found.schema == evaluator.TABLE_SCHEMA
        assert found.num_rows == expected.num_rows > 0
        for name in evaluator.TABLE_SCHEMA.names:
            column, wanted = found[name].to_pylist(), expected[name].to_pylist()
            if name in ("intersection", "union", "area"):  # a pixel may tip over where batches are cut elsewhere
                assert max(abs(a - b) for a, b in zip(column, wanted, strict=True)) <= 1, name
            elif name == "score":
                assert column == pytest.approx(wanted, abs=1e-4)
            else:
                assert column == wanted, name


@pytest.mark.ray
def test_the_stage_writes_scores_tables_and_pictures(
    prepared: Workplace, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared.change(evaluate={"protocols": ["ours", "cris"], "shuffled_split": "testA"})
    evaluate.main(SYSTEM, DATASET)
    out = paths.evaluation(SYSTEM, DATASET)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {protocol: list(parts) for protocol, parts in metrics.items()} == {"ours": SPLITS, "cris": SPLITS}
    plain = {"expressions", "images", "mIoU", "oIoU", *(f"Pr@0.{i}" for i in range(5, 10)), "mIoU_95", "oIoU_95"}
    plain |= {"right_object", "random_object", "by_kind", "by_size"}
    for protocol, parts in metrics.items():
        for split, part in parts.items():
            shuffled = set(scores.SHUFFLED) if (protocol, split) == ("ours", "testA") else set()
            assert set(part) == plain | shuffled, (protocol, split)
            assert part["mIoU_95"][0] <= part["mIoU"] <= part["mIoU_95"][1]
            table = pq.read_table(paths.expressions(SYSTEM, DATASET) / f"{protocol}-{split}.parquet")
            intersection, union = (table[name].to_numpy() for name in ("intersection", "union"))
            expected = measured(intersection, union, PROTOCOLS[protocol].strict)
            assert {name: part[name] for name in expected} == {k: round(v, 5) for k, v in expected.items()}
            assert part["expressions"] == table.num_rows == sum(kind["count"] for kind in part["by_kind"].values())
            sizes = {name: group for name, group in part["by_size"].items() if name != "bounds"}
            assert part["expressions"] == sum(size["count"] for size in sizes.values())
            assert table["found"].to_pylist() == [True] * table.num_rows
    assert set(json.loads((out / "protocols.json").read_text())["cris"]) >= {
        "threshold",
        "resolution",
        "sentences",
        "text",
    }
    behaviour = json.loads((out / "behaviour.json").read_text())
    assert list(behaviour) == ["mirror", "swap", "absent"]
    cost = json.loads((out / "cost.json").read_text())
    assert set(cost) == {"parameters", "trained_parameters", "gflop_image", "gflop_expression"}  # no machine's times
    assert cost["gflop_image"] > 0
    assert not (out / "setting.json").exists()  # what a trained system depends on is in its model
    pictures = [item["file"] for item in json.loads((out / "gallery" / "gallery.json").read_text())]
    assert pictures
    assert all((out / "gallery" / name).stat().st_size for name in pictures)
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[:2]) for line in lines] == [(p, s) for p in ("ours", "cris") for s in SPLITS]
    assert [line.split()[0:2] for line in lines if "shuffled" in line] == [["ours", "testA"]]
    assert not [file for file in prepared.files() if "partial" in file or file.endswith(".tmp")]


@pytest.mark.ray
def test_the_coarse_map_of_a_system_that_has_one_is_scored_beside_its_masks(
    workplace: Workplace, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("raw", "shards")
    params = workplace.change(evaluate={"splits": ["testA", "val"]})
    model = paths.model("risclip", DATASET)
    export_untrained(workplace.tiny, model, "risclip")
    network, described = load_model(model)
    with torch.no_grad():
        network.get_parameter("locator.logit_bias").fill_(0.0)  # the map marks something
        network.get_parameter("decoder.head.bias").fill_(-4.0)  # the mask little of it
    section = params.of("risclip").model
    export_model(model, "risclip", network.state_dict(), section, workplace.tiny.clip_vit, described.info)
    evaluate.main("risclip", DATASET)
    metrics = json.loads((paths.evaluation("risclip", DATASET) / "metrics.json").read_text())["ours"]
    assert set(metrics["val"]) - set(metrics["testA"]) == {*scores.SHUFFLED, "located"}
    protocol = PROTOCOLS["ours"]
    found = {}
    for name in ("ours/val", "located"):
        table = one_process(workplace.tiny, model, {"job": name, "protocol": "ours", "split": "val", "seed": 0})
        found[name] = measured(table["intersection"].to_numpy(), table["union"].to_numpy(), protocol.strict)
    assert metrics["val"]["located"] == pytest.approx({k: found["located"][k] for k in ("mIoU", "oIoU")}, abs=1e-3)
    assert metrics["val"]["mIoU"] == pytest.approx(found["ours/val"]["mIoU"], abs=1e-3)
    assert abs(found["located"]["mIoU"] - found["ours/val"]["mIoU"]) > 0.01  # they are not the same
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if f"located {metrics['val']['located']['mIoU']:.3f}" in line] == ["val"]


@pytest.fixture
def marking(workplace: Workplace) -> Workplace:
    """A workplace whose model has probabilities on both sides of every threshold in each image."""
    workplace.link("raw", "shards")
    model = paths.model(SYSTEM, DATASET)
    export_untrained(workplace.tiny, model)
    network, described = load_model(model)
    with torch.no_grad():
        network.get_parameter("proj.txt.weight").mul_(4.0)
        network.get_parameter("proj.txt.bias").mul_(4.0)
        network.get_parameter("proj.txt.bias")[-1] -= 1.0  # of all logits
    section = workplace.tiny.params().of(SYSTEM).model
    export_model(model, SYSTEM, network.state_dict(), section, workplace.tiny.clip, described.info)
    return workplace


def shown_size(photo: np.ndarray, reading: Reading) -> tuple[int, int]:
    """Height and width at which answers about a photo are scored."""
    height, width = photo.shape[:2]
    return (height, width) if isinstance(reading.resolution, str) else (reading.resolution, reading.resolution)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["cris", "lavt"])
def test_the_gallery_shows_what_was_scored(
    name: str, marking: Workplace, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks that are drawn have the IoU of the table, and are drawn at the size at which they were scored."""
    drawn: list[tuple[Plain, gallery.Scene, gallery.Drawn]] = []
    answered = gallery.answered

    def watched(
        rows: Sequence[Plain], seen: Sequence[gallery.Scene], predictor: RISPredictor
    ) -> Iterator[gallery.Drawn]:
        for row, scene, each in zip(rows, seen, answered(rows, seen, predictor), strict=True):
            drawn.append((row, scene, each))
            yield each

    marking.change(evaluate={"protocols": [name], "splits": ["val"], "shuffled_split": None})
    monkeypatch.setattr(gallery, "answered", watched)
    evaluate.main(SYSTEM, DATASET)
    reading, out = PROTOCOLS[name].reading, paths.evaluation(SYSTEM, DATASET) / "gallery"
    table = pq.read_table(paths.expressions(SYSTEM, DATASET) / f"{name}-val.parquet").to_pylist()
    scored = {row["sent_id"]: row for row in table}
    told = json.loads((out / "gallery.json").read_text())
    assert [item["sent_id"] for item in told] == [row["sent_id"] for row, _, _ in drawn] != []
    for item, (row, scene, each) in zip(told, drawn, strict=True):
        truth = resized(torch.from_numpy(scene.truth)[None], reading)[0].numpy()
        mask, (height, width) = each.prediction.mask, shown_size(scene.photo, reading)
        assert mask.shape == truth.shape == (height, width)
        assert 0 < mask.sum() < mask.size
        of_table = scored[row["sent_id"]]
        assert int((mask & truth).sum()) == pytest.approx(of_table["intersection"], abs=1)  # as in the test above
        assert int((mask | truth).sum()) == pytest.approx(of_table["union"], abs=1)
        assert item["iou"] == pytest.approx(of_table["intersection"] / of_table["union"], abs=1e-5)
        scale = max(1, round(320 / max(height, width)))
        picture = Image.open(out / item["file"])
        assert picture.size == each.picture.size == (scale * width, scale * height)
        photo = np.asarray(Image.fromarray(scene.photo).resize((width, height))).repeat(scale, 0).repeat(scale, 1)
        tinted = (np.asarray(each.picture) != photo).any(axis=2)
        mask, truth = (some.repeat(scale, 0).repeat(scale, 1) for some in (mask, truth))
        edge = outline(truth, max(1, min(truth.shape) // 200))
        assert np.array_equal(tinted | edge, mask | edge)
    rows, seen, _ = zip(*drawn, strict=True)
    assert any(scene.photo.shape[0] != scene.photo.shape[1] for scene in seen)  # which can lose its aspect ratio
    for other in (replace(reading, threshold=0.45), replace(reading, upsampling="grid"), Reading()):
        if other != reading:  # any other way to read them would have been noticed
            reader = RISPredictor.from_folder(paths.model(SYSTEM, DATASET), reading=other)
            masks = [each.prediction.mask for each in answered(rows, seen, reader)]
            shown = [each.prediction.mask for _, _, each in drawn]
            assert any(a.shape != b.shape or int((a != b).sum()) > 1 for a, b in zip(masks, shown, strict=True)), other


@pytest.mark.ray
def test_bf16_is_used_and_changes_scores_by_little(marking: Workplace, ray_session: None) -> None:
    """Autocast works on a CPU too, where nothing asks for it by default."""
    job = {"job": "ours/val", "protocol": "ours", "split": "val", "seed": 0}
    params = marking.change(evaluate={"precision": "bf16"})
    found = evaluate.score(params, SYSTEM, paths.model(SYSTEM, DATASET), DATASET, [job])["ours/val"]
    expected = one_process(marking.tiny, paths.model(SYSTEM, DATASET), job)
    assert found.drop_columns(CHANGING).equals(expected.drop_columns(CHANGING))
    differences = np.abs(found["score"].to_numpy() - expected["score"].to_numpy())
    assert 1e-4 < differences.max() < 0.02  # of two runs in fp32 it would be below, see above
    means = [measured(t["intersection"].to_numpy(), t["union"].to_numpy())["mIoU"] for t in (found, expected)]
    assert means[0] == pytest.approx(means[1], abs=0.02)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_every_answer_is_computed_in_the_precision_that_was_asked_for(precision: str, prepared: Workplace) -> None:
    folders = {"model": paths.model(SYSTEM, DATASET), "shards": paths.shards(DATASET)}
    places = {name: Place(str(folder)) for name, folder in folders.items()}
    scorer = evaluate.Scorer(places, 4, precision)
    assert {end: isinstance(each, MapAnswers) and each.precision for end, each in scorer.answerers.items()} == {
        "": precision,
        "located": precision,
    }


@pytest.mark.parametrize(
    ("nodes", "gpus", "at_once", "actors"),
    [
        ([(64, 0)], "no", 1, 8),  # as many as are wanted
        ([(2, 0), (1, 0)], "no", 1, 3),
        ([(1, 0)], "no", 1, 1),
        ([(0, 0), (1, 0)], "no", 4, 1),
        ([(64, 0)], "no", 4, 8),
        ([(8, 0)], "no", 4, 2),  # the other CPUs are of the other stages
        ([(64, 1)], "yes", 1, 1),
        ([(2, 4), (1, 4)], "yes", 1, 3),
    ],
)
def test_no_more_actors_are_asked_for_than_the_cluster_holds(
    nodes: list[tuple[float, float]],
    gpus: str,
    at_once: int,
    actors: int,
    prepared: Workplace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would wait for the others for ever, or until it gives up."""

    class Asked(Exception):
        """Ends the stage where it asks."""

    class Data:
        from_items = Mock()

        @staticmethod
        def ActorPoolStrategy(size: int) -> None:
            raise Asked(size)

    monkeypatch.setattr(cluster, "connected", nullcontext)
    monkeypatch.setattr(cluster, "check_resources", lambda *_: None)
    monkeypatch.setattr(cluster, "data", Data)
    monkeypatch.setattr(cluster, "_nodes", lambda: nodes)
    monkeypatch.setenv(cluster.AT_ONCE, str(at_once))
    monkeypatch.setattr(evaluate, "PIECE", 1)
    params = prepared.change(cluster={"evaluate_actors": 8, "use_gpu": gpus})
    with pytest.raises(Asked) as asked:
        evaluate.score(params, SYSTEM, paths.model(SYSTEM, DATASET), DATASET, JOBS)
    assert asked.value.args == (actors,)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"splits": ["val", "test"]}, "shapes has no split 'test'; it has train, val, testA, testB"),
        ({"shuffled_split": "valid"}, "shapes has no split 'valid'; it has train, val, testA, testB"),
    ],
)
def test_splits_that_do_not_exist_are_refused(section: dict[str, Any], message: str, prepared: Workplace) -> None:
    prepared.change(evaluate=section)
    with pytest.raises(DataError) as told:
        evaluate.main(SYSTEM, DATASET)
    assert str(told.value).startswith(message)
    assert prepared.files() == set()


def test_a_model_for_other_shards_is_refused(prepared: Workplace) -> None:
    model = prepared.own(paths.model(SYSTEM, DATASET)) / "model.json"
    content = json.loads(model.read_text())
    content["info"]["image_size"] = 96
    model.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="cris-shapes is for images of 96 pixels, the shards hold 64: train again"):
        evaluate.main(SYSTEM, DATASET)


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_not_waited_for(prepared: Workplace, ray_session: None) -> None:
    import ray

    if ray.cluster_resources().get("GPU", 0):
        pytest.skip("this machine has a GPU")
    prepared.change(cluster={"use_gpu": "yes"})
    with pytest.raises(ClusterError, match="too small: 1 x 1 GPU wanted, the cluster has 0"):
        evaluate.main(SYSTEM, DATASET)
    assert prepared.files() == set()

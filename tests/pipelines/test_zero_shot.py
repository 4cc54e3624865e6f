"""A system that chooses among proposals on the whole road: nothing is trained, and Ray's actors find what one process finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipelines_world import DATASET, Workplace, contents, open_workplace

from pipelines import (
    cluster,
    evaluate,
    gallery,
    initialise,
    parts,
    paths,
    propose,
    scores,
    tracking,
    train,
)
from ris_core.data.proposal_store import ProposalStore, write_manifest, write_part
from ris_core.errors import WeightsError
from ris_core.evaluation import evaluator
from ris_core.evaluation.answers import BestProposals, ProposalAnswers
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.metrics import scores as measured
from ris_core.files import file_sha256
from ris_core.models.answer import Reading
from ris_core.models.contract import ProposalSystem
from ris_core.models.registry import load_model, read_description
from ris_core.options import Plain
from ris_core.predictor import RISPredictor

if TYPE_CHECKING:
    from tiny_world import Tiny

SYSTEM = "global_local"
START, MODEL, OUT = (place(SYSTEM, DATASET) for place in (paths.start, paths.model, paths.evaluation))
SPLITS = ["val", "testA", "testB"]
NAMES = ["ours", "global_local"]


@dataclass(frozen=True)
class Made:
    """A workplace in which stages `propose`, `initialise` and `train` ran; one image of val lost its proposals."""

    place: Workplace
    image_id: int

    def table(self, protocol: str, split: str) -> pa.Table:
        return pq.read_table(self.place.root / paths.expressions(SYSTEM, DATASET) / f"{protocol}-{split}.parquet")

    def metrics(self) -> Any:
        return json.loads((self.place.root / OUT / "metrics.json").read_text())


def in_this_process(
    tasks: Sequence[Plain], write: Callable[[parts.Row], parts.Row], use_gpu: bool = False, **_: object
) -> list[Plain]:
    return [json.loads(write({"task": json.dumps(task)})["done"]) for task in tasks]


def without_proposals_of(image_id: int, folder: Path) -> None:
    """Rewrite stored proposals, all of them in one part and none of one image."""
    store = ProposalStore(folder)
    rows = [row for part in store.manifest["parts"] for row in pq.read_table(folder / part).to_pylist()]
    kept = [(row["image_id"], store.masks(row["image_id"])) for row in rows]
    for part in store.manifest["parts"]:
        (folder / part).unlink()
    write_part(
        folder / "part-00000.parquet", [(name, masks[: len(masks) * (name != image_id)]) for name, masks in kept]
    )
    write_manifest(folder, {**store.manifest, "parts": ["part-00000.parquet"]})


@pytest.fixture(scope="module")
def made(tiny: Tiny, untrained: Path, migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("zero_shot")
    place = open_workplace(folder / "workplace", tiny, untrained)
    place.link("raw", "shards", "clip")
    place.change(systems=[SYSTEM], evaluate={"protocols": NAMES})
    shutil.copy(migrated_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was asked for"))
            alone.setattr(propose.parts, "run_tasks", in_this_process)
            propose.main(DATASET)
            initialise.main(SYSTEM, DATASET)
            train.main(SYSTEM, DATASET)
        store = tiny.store()
        image_id = store.row(int(store.images_of("val")[2]))["image_id"]
        without_proposals_of(image_id, paths.proposals(DATASET))
        yield Made(place, image_id)


@pytest.fixture(scope="module")
def evaluated(made: Made, ray_session: None) -> Made:
    evaluate.main(SYSTEM, DATASET)
    return made


def test_nothing_is_trained_and_the_model_loads(made: Made) -> None:
    model, described = load_model(MODEL)
    assert described.system == SYSTEM
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert contents(MODEL / "clip") == contents(START / "clip") == contents(made.place.tiny.clip)
    assert contents(MODEL)["model.safetensors"] == contents(START)["model.safetensors"]
    info, started = described.info, read_description(START).info
    assert {name for name, value in asdict(info).items() if value != asdict(started)[name]} == {"config_digest", "run"}
    assert (started.config_digest, started.run) == ("", "")
    assert info.data_digest == file_sha256(paths.shards(DATASET) / "manifest.json")
    assert info.proposals == ProposalStore(paths.proposals(DATASET)).manifest["options"]
    assert not [file for file in made.place.files() if "partial" in file or file.endswith(".tmp")]


def test_what_is_left_of_the_trainings_is_empty_but_readable(made: Made) -> None:
    place = paths.training(SYSTEM, DATASET)
    assert (place / "history.csv").read_text() == "epoch,val/mIoU\n"
    assert json.loads((place / "metrics.json").read_text()) == {}
    assert contents(paths.initialisation(SYSTEM, DATASET)) == {"metrics.json": b"{}\n"}
    assert not Path("runs").exists()


def test_its_run_is_finished_and_tells_its_parameters(made: Made) -> None:
    client = tracking.connect()
    name = read_description(MODEL).info.run
    run_id = tracking.find_run("ris", name)
    assert run_id is not None
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == name
    assert name.startswith("train-global_local-shapes-")
    assert {"global_local.short_side": "64", "global_local.box_mode": "tight"}.items() <= run.data.params.items()
    assert (run.data.tags["ris.system"], run.data.tags["ris.stage"]) == (SYSTEM, "train")
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == [DATASET]


def test_the_stages_end_the_same_when_run_again(made: Made) -> None:
    before = contents(START), contents(MODEL)
    initialise.main(SYSTEM, DATASET)
    train.main(SYSTEM, DATASET)
    assert (contents(START), contents(MODEL)) == before
    client = tracking.connect()
    assert len(client.search_runs([client.get_experiment_by_name("ris").experiment_id])) == 1


def chooser() -> ProposalSystem:
    """The model that was evaluated."""
    model, _ = load_model(MODEL)
    assert isinstance(model, ProposalSystem)
    return model


@pytest.mark.ray
def test_actors_find_what_one_process_finds(evaluated: Made) -> None:
    answers = ProposalAnswers(chooser(), paths.raw(DATASET), ProposalStore(paths.proposals(DATASET)))
    store = evaluated.place.tiny.store()
    for name in NAMES:
        for split in SPLITS:
            job = {"job": f"{name}/{split}", "protocol": name, "split": split, "seed": 0}
            queries = evaluate.job_queries(store, job)
            expected = evaluator.evaluate(answers, store, queries, PROTOCOLS[name], split=split)
            found = evaluated.table(name, split)
            assert found.schema == evaluator.TABLE_SCHEMA
            assert found.drop_columns("score").equals(expected.drop_columns("score"))
            assert found["score"].to_pylist() == pytest.approx(expected["score"].to_pylist(), abs=1e-5)
            assert found.num_rows == len(queries) > 0


@pytest.mark.ray
def test_no_choice_beats_the_best_of_the_proposals(evaluated: Made) -> None:
    metrics, store = evaluated.metrics(), evaluated.place.tiny.store()
    best = BestProposals(ProposalStore(paths.proposals(DATASET)))
    for name in NAMES:
        for split in SPLITS:
            part = metrics[name][split]
            assert part[scores.BEST]["mIoU"] >= part["mIoU"]
            assert part[scores.BEST]["mIoU"] > 0.3
            queries = evaluate.job_queries(store, {"job": "", "protocol": name, "split": split})
            bound = evaluator.evaluate(best, store, queries, PROTOCOLS[name], split=split)
            counted = scores.counted(bound, PROTOCOLS[name])
            expected = measured(counted["intersection"].to_numpy(), counted["union"].to_numpy())
            assert part[scores.BEST] == {key: round(expected[key], 5) for key in ("mIoU", "oIoU")}
            ious = [
                [row["intersection"] / row["union"] for row in table.to_pylist()]
                for table in (bound, evaluated.table(name, split))
            ]
            assert all(high >= low for high, low in zip(*ious, strict=True))


@pytest.mark.ray
def test_choosing_among_the_annotated_objects_is_scored_beside_the_controls(evaluated: Made) -> None:
    metrics, store = evaluated.metrics(), evaluated.place.tiny.store()
    controls = {*scores.SHUFFLED, scores.ORACLE}
    assert set(metrics["ours"]["val"]) >= controls
    assert not controls & {*metrics["ours"]["testA"], *metrics["global_local"]["val"]}
    oracle = ProposalAnswers(chooser(), paths.raw(DATASET))
    queries = evaluate.job_queries(store, {"job": "", "protocol": "ours", "split": "val"})
    table = evaluator.evaluate(oracle, store, queries, PROTOCOLS["ours"], split="val")
    expected = measured(table["intersection"].to_numpy(), table["union"].to_numpy())
    assert metrics["ours"]["val"]["oracle_proposals"] == {key: round(expected[key], 5) for key in ("mIoU", "oIoU")}
    assert all(table["found"].to_pylist()), "also of the image that has no proposals"


@pytest.mark.ray
def test_an_image_without_proposals_counts_0_or_is_left_out_as_the_protocol_says(evaluated: Made) -> None:
    metrics = evaluated.metrics()
    for name, skips in (("ours", False), ("global_local", True)):
        rows, part = evaluated.table(name, "val").to_pylist(), metrics[name]["val"]
        lost = [row for row in rows if row["image_id"] == evaluated.image_id]
        assert lost
        assert [row for row in rows if not row["found"]] == lost
        assert {(row["intersection"], row["area"], row["score"], row["right_object"]) for row in lost} == {
            (0, 0, 0, False)
        }
        assert part["unanswered"] == len(lost)
        counted = [row for row in rows if row["found"]] if skips else rows
        assert part["expressions"] == len(counted)
        assert part["images"] == 6 - skips
        ious = [row["intersection"] / row["union"] for row in counted]
        assert part["mIoU"] == pytest.approx(sum(ious) / len(ious), abs=1e-5)
        assert "unanswered" not in metrics[name]["testA"]


@pytest.mark.ray
@pytest.mark.parametrize("resolution", ["original", 480])
def test_the_gallery_shows_the_chosen_proposal_and_where_else_it_looked(resolution: str | int, evaluated: Made) -> None:
    store, reading = evaluated.place.tiny.store(), Reading(resolution=resolution)
    table = evaluated.table("ours", "val")
    rows = [row for row in gallery.choose(table) if row["image_id"] != evaluated.image_id]
    assert rows
    seen = gallery.scenes(rows, store, paths.raw(DATASET))
    reader = RISPredictor.from_folder(MODEL, reading=reading)
    for row, scene, each in zip(rows, seen, gallery.answered(rows, seen, reader), strict=True):
        assert each.looked is not None
        assert each.looked.size == each.picture.size
        if resolution == "original":
            counts = [int(some.sum()) for some in (each.prediction.mask & scene.truth, each.prediction.mask)]
            assert counts == [row["intersection"], row["area"]]
        else:
            assert each.prediction.mask.shape == (resolution, resolution) == each.picture.size


@pytest.mark.ray
def test_what_else_a_score_depends_on_is_recorded_beside_it(evaluated: Made) -> None:
    setting = json.loads((OUT / "setting.json").read_text())
    assert setting["proposals"] == read_description(MODEL).info.proposals
    assert (setting["noun_phrase"], setting["box_mode"], setting["short_side"]) == ("rules", "tight", 64)
    cost = json.loads((OUT / "cost.json").read_text())
    assert (cost["trained_parameters"], cost["parameters"] > 0) == (0, True)
    pictures = [item["file"] for item in json.loads((OUT / "gallery/gallery.json").read_text())]
    assert pictures
    assert all((OUT / "gallery" / name).stat().st_size for name in pictures)


@pytest.mark.parametrize(
    "change", [{"options": {"sam_weights": "sam"}}, {"options": {}}, {"data_digest": "0" * 64}], ids=str
)
def test_a_model_and_proposals_that_do_not_go_together_are_refused(
    change: Plain, made: Made, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda **_: pytest.fail("Ray was asked for"))
    workplace.link("raw", "shards")
    shutil.copytree(made.place.root / MODEL, MODEL)
    shutil.copytree(made.place.root / paths.proposals(DATASET), paths.proposals(DATASET))
    manifest = ProposalStore(paths.proposals(DATASET)).manifest
    before = {key: {**manifest[key], **value} if value and key == "options" else value for key, value in change.items()}
    write_manifest(paths.proposals(DATASET), {**manifest, **before})
    with pytest.raises(WeightsError) as told:
        evaluate.main(SYSTEM, DATASET)
    assert str(told.value) == (
        "models/global_local-shapes and data/proposals/shapes were made with other options, or of other data: run the "
        "stages propose, initialise and train again"
    )
    assert not Path("results").exists()


def test_other_proposals_or_another_clip_are_another_run(made: Made, workplace: Workplace, store: Path) -> None:
    workplace.link("raw", "shards", "clip")
    workplace.change(systems=[SYSTEM])
    seen = []
    changes: list[Plain] = [{}, {"train": {"lr": 1.0}}, {"proposals": {"felzenszwalb": {"sigma": 0.9}}}]
    for change in [*changes, {"global_local": {"model": {"alpha": 0.5}}}]:
        workplace.change(**change)
        initialise.main(SYSTEM, DATASET)
        train.main(SYSTEM, DATASET)
        info = read_description(MODEL).info
        seen.append((info.run, info.config_digest))
    assert seen[0] == seen[1]
    assert len({run for run, _ in seen[1:]}) == len({digest for _, digest in seen[1:]}) == 3
    client = tracking.connect()
    assert len(client.search_runs([client.get_experiment_by_name("ris").experiment_id])) == 3

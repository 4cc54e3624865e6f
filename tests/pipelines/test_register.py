"""Registered versions: which becomes champion, and loading one where nothing of this repository is installed."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines_world import Workplace, blocks_of, contents, export_untrained

from pipelines import cluster, evaluate, fingerprint, paths, register, tracking, versions
from pipelines.params import Params
from pipelines.predict import model_folder
from pipelines.scores import summary
from ris_core import files
from ris_core.data import masks
from ris_core.data.dataset import ShardStore
from ris_core.errors import ConfigError, DataError, WeightsError
from ris_core.evaluation.evaluator import TABLE_SCHEMA
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.evaluation.params import EvaluateParams
from ris_core.evaluation.queries import queries_of
from ris_core.predictor import RISPredictor

NAME = "ris-cris-shapes"
PARAMS = EvaluateParams(bootstrap_samples=50)


def answers_of(store: ShardStore, right: float, seed: int = 0) -> pa.Table:
    """A table as `evaluate` leaves it, of answers made up: a share of them right (IoU 0.8), the others wrong (0.1)."""
    random = np.random.default_rng(seed)
    rows = []
    for query in queries_of(store, "val", PROTOCOLS["ours"]):
        overlap = 80 if random.random() < right else 10
        named = {"image_id": store.row(query.image)["image_id"], "ref_id": query.ref_id, "sent_id": query.sent_id}
        told = {
            "split": "val",
            "text": query.text,
            "kind": "attribute",
            "object_share": 0.1,
            "right_object": overlap > 50,
        }
        blind = {"random_intersection": 20.0, "random_union": 100.0, "random_iou": 0.2}
        answer = {"intersection": overlap, "union": 100, "area": 90, "found": True, "score": 0.5}
        rows.append({**named, **told, **blind, **answer})
    return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


def evaluated(workplace: Workplace, right: float = 0.5, system: str = "cris", seed: int = 0, **scores: Any) -> None:
    """What stages `train` and `evaluate` leave; `scores` replaces what the answers give."""
    for wanted in ("model", "shards", "raw"):
        place = {"model": f"models/{system}-shapes", "shards": "data/shards/shapes", "raw": "data/raw/shapes"}[wanted]
        if not os.path.lexists(workplace.root / place):
            workplace.link(wanted)
    table = answers_of(workplace.tiny.store(), right, seed)
    summed = summary(table, PROTOCOLS["ours"], PARAMS)
    place = paths.evaluation(system, "shapes")
    files.write_json(place / "metrics.json", {"ours": {"val": {**summed, **scores}, "testA": summed}})
    (place / "gallery").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(place / "gallery" / "00-hit-size.jpg")
    folder = paths.expressions(system, "shapes")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "ours-val.parquet")


def another(workplace: Workplace, right: float, **changes: Any) -> str:
    """Register a model with other weights (by its tags) and answers; what was decided."""
    model = workplace.root / "models/cris-shapes"
    if model.is_symlink():
        workplace.own(Path("models/cris-shapes"))
    content = json.loads((model / "model.json").read_text())
    content["info"]["config_digest"] = os.urandom(8).hex()
    content["info"] |= changes
    (model / "model.json").write_text(json.dumps(content))
    evaluated(workplace, right, seed=1)
    register.main("cris", "shapes")
    return str(written()["decision"])


def written() -> dict[str, Any]:
    content = json.loads(Path("mlflow/registered/cris-shapes.json").read_text())
    assert isinstance(content, dict)
    return content


def aliases(name: str = NAME) -> dict[str, str]:
    return {alias: str(version) for alias, version in tracking.connect().get_registered_model(name).aliases.items()}


def test_only_what_is_surely_better_takes_over(workplace: Workplace, store: Path) -> None:
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    assert written()["decision"] == "champion: the first version that reached the minimum"
    assert aliases() == {"champion": "1"}
    decision = another(workplace, 0.45)  # by chance a little better
    assert re.fullmatch(
        r"challenger: mIoU \+0\.\d{4} \[-0\.\d{4}, \+0\.\d{4}\] to version 1: not surely better", decision
    )
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert another(workplace, 0.1).endswith("to version 1: not surely better")
    assert aliases() == {"champion": "1", "challenger": "3"}
    assert re.fullmatch(r"champion: mIoU \+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\] to version 1", another(workplace, 0.95))
    assert aliases() == {"champion": "4", "challenger": "3"}
    assert tracking.connect().get_model_version(NAME, "4").tags["decision"] == written()["decision"]


def test_the_comparison_is_kept_with_the_version(workplace: Workplace, store: Path) -> None:
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    another(workplace, 0.9)
    folder = versions.fetch(f"models:/{NAME}/2", versions.EVALUATION)
    found = json.loads((folder / "comparison.json").read_text())
    assert (found["champion"], found["protocol"], found["split"], found["rescored"]) == ("1", "ours", "val", None)
    low, high = found["mIoU"]["interval"]
    assert 0 < low < found["mIoU"]["difference"] < high
    for picture in found["pictures"]:
        image = Image.open(folder / picture["file"])
        assert image.width > 1.5 * image.height, "both answers in a line"
        assert abs(picture["iou"]["this version"] - picture["iou"]["the champion"]) == pytest.approx(0.7)
    assert 4 < len(found["pictures"]) <= 8
    assert (
        f"| mIoU | {found['mIoU']['difference']:+.5f} |" in tracking.connect().get_model_version(NAME, "2").description
    )
    assert pq.read_table(folder / "ours-val.parquet").equals(answers_of(workplace.tiny.store(), 0.9, seed=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_or_not_of_these_answers_is_refused(bad: float, workplace: Workplace, store: Path) -> None:
    for scores, told in (
        ({"mIoU": bad}, f"mIoU is {bad}"),
        ({"oIoU_95": [0.1, bad]}, f"oIoU_95 is {bad}"),
        ({"mIoU": 0.99}, "mIoU is 0.99, and its expressions give 0."),
    ):
        evaluated(workplace, 0.5, **scores)
        with pytest.raises(DataError, match=re.escape(told)) as refusal:
            register.main("cris", "shapes")
        assert "run the stage evaluate again" in str(refusal.value)
    assert not (workplace.root / "mlflow/registered").exists()
    assert tracking.connect().search_model_versions(f"name = '{NAME}'") == []


def test_without_alias_the_last_champion_is_the_one_to_beat(workplace: Workplace, store: Path) -> None:
    evaluated(workplace, 0.8)
    register.main("cris", "shapes")
    client = tracking.connect()
    client.delete_registered_model_alias(NAME, "champion")
    assert another(workplace, 0.3).endswith("to version 1: not surely better")
    assert aliases() == {"challenger": "2"}
    client.delete_model_version(NAME, "1")
    assert another(workplace, 0.9) == (
        "challenger: version 1, which was champion, was deleted: choose with `ris registry promote`"
    )
    assert aliases() == {"challenger": "3"}


def test_a_champion_of_other_data_is_scored_again(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    asked: list[Any] = []

    def scored(params: Params, system: str, folder: Path, dataset: str, wanted: list[Any]) -> dict[str, pa.Table]:
        asked.append((system, folder.name, dataset, [job["job"] for job in wanted]))
        return {"ours/val": answers_of(workplace.tiny.store(), 0.2)}

    monkeypatch.setattr(evaluate, "score", scored)
    assert re.fullmatch(r"champion: mIoU \+0\.\d+ .* to version 1", another(workplace, 0.9, data_digest="e" * 64))
    assert asked == [("cris", "model", "shapes", ["ours/val"])]
    assert "version 1 was scored with another data_digest: it is scored again, on shapes val" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "check_fit", refuse)
    decision = another(workplace, 0.95, data_digest="f" * 64)
    assert decision == "challenger: version 2 cannot be compared with: it is for other images"
    assert aliases() == {"champion": "2", "challenger": "3"}


def refuse(*_: Any) -> None:
    raise WeightsError("it is for other images")


def test_a_version_from_before_the_gate_is_scored_again(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no tags, and came without its answers."""
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    client = tracking.connect()
    version = client.get_model_version(NAME, "1")
    for tag in version.tags:
        client.delete_model_version_tag(NAME, "1", tag)
    monkeypatch.setattr(evaluate, "score", lambda *_: {"ours/val": answers_of(workplace.tiny.store(), 0.2)})
    assert re.fullmatch(r"champion: mIoU \+0\.\d+ .* to version 1", another(workplace, 0.9))


def test_the_champion_is_really_scored_again(workplace: Workplace, store: Path) -> None:
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "connected", nullcontext)
        patch.setattr(evaluate, "score", in_process)
        assert another(workplace, 0.95, data_digest="e" * 64).startswith("champion: mIoU +0.")
    found = json.loads((versions.fetch(f"models:/{NAME}/2", versions.EVALUATION) / "comparison.json").read_text())
    assert found["rescored"] == "version 1 was scored with another data_digest"


def in_process(params: Params, system: str, folder: Path, dataset: str, wanted: list[Any]) -> dict[str, pa.Table]:
    """Score as the actors do, without Ray."""
    (job,) = wanted
    scorer = evaluate.Scorer(
        {name: Here(place) for name, place in (("model", folder), ("shards", paths.shards(dataset)))}, 4, "fp32"
    )
    tables = [scorer(pa.Table.from_pylist([piece])) for piece in evaluate.pieces(scorer.store, [job])]
    return {job["job"]: pa.concat_tables(tables).drop_columns(["job", "position"])}


@dataclass(frozen=True)
class Here:
    """A place on this machine, as `transport.Place` gives it."""

    place: Path

    def local(self) -> Path:
        return self.place


def test_a_score_below_the_minimum_is_never_promoted(workplace: Workplace, store: Path) -> None:
    workplace.change(register={"minimum": 0.4})
    evaluated(workplace, 0.1)
    register.main("cris", "shapes")
    assert re.fullmatch(r"not promoted: 0\.\d+ is below the minimum 0.4", written()["decision"])
    assert aliases() == {}
    assert another(workplace, 0.9) == "champion: the first version that reached the minimum"


def test_two_at_once_end_on_the_better_whoever_is_last(workplace: Workplace, store: Path) -> None:
    """Each waits for the other's whole registration: the second meets the first one's version."""
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    order: list[str] = []
    client = tracking.connect()
    versions.ensure(client, NAME)

    def one(name: str) -> None:
        with versions.alone(client, NAME):
            order.append(f"{name} in")
            time.sleep(0.2)
            order.append(f"{name} out")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(one, "abc"))
    assert [step.split()[1] for step in order] == ["in", "out"] * 3


def test_a_version_carries_its_lineage(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(workplace)
    (workplace.root / "dvc.lock").write_text("schema: '2.0'\n")
    files.write_json(paths.watched("train-cris"), {"train": {"epochs": 2}})
    monkeypatch.setattr(fingerprint, "git_commit", lambda: "abc")
    register.main("cris", "shapes")
    shown = capsys.readouterr()
    val = json.loads((paths.evaluation("cris", "shapes") / "metrics.json").read_text())["ours"]["val"]
    score = f"{val['mIoU']:.5f}"
    assert (
        shown.out == f"models:/ris-cris-shapes/1  val mIoU {val['mIoU']:.3f}: champion: the first version that reached "
        "the minimum\n"
    )
    assert "the run that trained models/cris-shapes is not in sqlite:" in shown.err
    client = tracking.connect()
    version = client.get_model_version_by_alias(NAME, "champion")
    info = json.loads((workplace.trained / "model.json").read_text())["info"]
    told = {key: value for key, value in version.tags.items() if "/" not in key}
    scored = {"protocol": "ours", "split": "val", "metric": "mIoU", "score": score}
    assert told == scored | {
        "decision": "champion: the first version that reached the minimum",
        "git_commit": "abc",
        "code_digest": fingerprint.served_code("cris"),
        "data_digest": info["data_digest"],
        "clip_digest": info["clip_digest"],
        "config_digest": info["config_digest"],
        "weights_sha256": files.file_sha256(workplace.trained / "model.safetensors"),
        "threads": str(torch.get_num_threads()),
        "dvc_lock_sha256": files.file_sha256(workplace.root / "dvc.lock"),
    }
    low, high = val["mIoU_95"]
    assert version.tags["val/mIoU"] == f"{score} [{low:.5f}, {high:.5f}]"
    assert {key for key in version.tags if "/" in key} == {
        f"{split}/{measure}" for split in ("val", "testA") for measure in ("mIoU", "oIoU")
    }
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/val/Pr_0.5"] == val["Pr@0.5"]
    assert run.data.metrics["test/testA/mIoU"] == val["mIoU"]
    assert [item.path for item in client.list_artifacts(version.run_id, "gallery")] == ["gallery/00-hit-size.jpg"]
    expected = {"model": NAME, "protocol": "ours", "score": val["mIoU"], "version": "1", "decision": told["decision"]}
    assert written() == expected
    folder = versions.fetch(f"models:/{NAME}@champion", versions.EVALUATION)
    assert {path.name for path in folder.iterdir()} == {
        "card.md",
        "dvc.lock",
        "lineage.json",
        "metrics.json",
        "ours-val.parquet",
        "params.yaml",
    }
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["values"] == {"train-cris": {"train": {"epochs": 2}}}
    assert lineage["tags"] == {key: value for key, value in version.tags.items() if key != "decision"}
    assert lineage["run"] == info["run"]
    card = (folder / "card.md").read_text()
    assert version.description == card, "short enough to be the description"
    for part in ("# ris-cris-shapes", "## Intended use", f"| val | {val['expressions']} | {score} [", "## Licences"):
        assert part in card
    assert f"- weights: `{told['weights_sha256']}`" in card


def test_the_same_weights_are_registered_once_and_in_the_run_that_trained_them(
    workplace: Workplace, store: Path
) -> None:
    run_id = tracking.open_run("ris", "train-cris-shapes-aaaa", {}, {})
    evaluated(workplace)
    model = workplace.own(Path("models/cris-shapes"))
    content = json.loads((model / "model.json").read_text())
    content["info"]["run"] = "train-cris-shapes-aaaa"
    (model / "model.json").write_text(json.dumps(content))
    register.main("cris", "shapes")
    register.main("cris", "shapes")
    client = tracking.connect()
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.run_id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert written()["decision"] == "already champion"
    client.delete_registered_model_alias(NAME, "champion")
    register.main("cris", "shapes")
    assert written()["decision"] == "registered before (champion: the first version that reached the minimum)"
    assert aliases() == {}, "whoever took the alias away had a reason"


def test_what_evaluate_did_not_leave_is_told(workplace: Workplace, store: Path) -> None:
    workplace.link("model")
    with pytest.raises(DataError, match=r"metrics.json does not exist: run the evaluate stage"):
        register.main("cris", "shapes")
    evaluated(workplace)
    answers = paths.expressions("cris", "shapes") / "ours-val.parquet"
    answers.rename(answers.with_name("elsewhere"))
    with pytest.raises(DataError, match=r"ours-val.parquet does not exist: run the stage evaluate"):
        register.main("cris", "shapes")
    answers.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"ours-val.parquet cannot be read \("):
        register.main("cris", "shapes")
    workplace.change(register={"split": "testB"})
    with pytest.raises(ConfigError, match=r"register.split is 'testB', but only val, testA were evaluated"):
        register.main("cris", "shapes")
    assert not (workplace.root / "mlflow/registered").exists()


CLEAN = """
import importlib.util, json, sys
# This environment has the repository installed in editable mode, which a stranger's has not.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("ris_core") is None and importlib.util.find_spec("pipelines") is None

import base64
from pathlib import Path
import mlflow, numpy as np, pandas as pd

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ris-cris-shapes@champion")
opened = mlflow.pyfunc.load_model("models:/ris-cris-shapes@champion", model_config={"allow_paths": True})
path = sys.argv[2]
content = Path(path).read_bytes()
text = base64.b64encode(content).decode()
pixels = np.load(sys.argv[3])

def answer(images, texts, model=model, **params):
    return model.predict(pd.DataFrame({"image": images, "text": texts}), params=params or None).to_dict("records")

def refusal(images, texts, model=model, **params):
    try:
        answer(images, texts, model, **params)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps({
    "two": answer([text, text], ["the red star", "the big circle"]),
    "bytes": answer([content], ["the red star"]),
    "array": answer([pixels], ["the red star"]),
    "path": opened.predict(pd.DataFrame({"image": [path], "text": ["the red star"]})).to_dict("records"),
    "threshold": answer([text], ["the red star"], threshold=0.52),
    "path_refused": answer([path], ["the red star"]),
    "accents": answer(["stra\\u00dfe.jpg"], ["the red star"]),
    "path_asked_for": answer([path], ["the red star"], allow_paths=True),
    "no_path": answer(["no/where.png"], ["the red star"], model=opened),
    "all_rows": answer([text, "x!y", text, base64.b64encode(b"no picture").decode()], ["the red star", "left", " ", "left"]),
    "no_threshold": [refusal([text], ["left"], threshold=value) for value in (7.0, -1.0, float("nan"))],
    "code": sorted(module.__file__ for name, module in sys.modules.items() if "ris_core" in name and "." not in name),
    "pipelines": "pipelines" in sys.modules,
}))
"""


@dataclass(frozen=True)
class Served:
    """What a clean process got from the registered champion, and what the library answers itself."""

    answers: dict[str, Any]
    predictor: RISPredictor
    store: Path
    size: tuple[int, int]

    def expected(self, text: str, threshold: float = 0.5) -> dict[str, Any]:
        (prediction,) = self.predictor.predict([text], threshold=threshold)
        height, width = prediction.mask.shape
        return {"counts": masks.encode(prediction.mask), "height": height, "width": width}


@pytest.fixture
def served(workplace: Workplace, store: Path, tmp_path: Path) -> Served:
    evaluated(workplace)
    register.main("cris", "shapes")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(elsewhere / "street.png")
    np.save(elsewhere / "street.npy", pixels)
    arguments = [tracking.uri(), str(elsewhere / "street.png"), str(elsewhere / "street.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, *arguments], cwd=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    predictor = RISPredictor.from_folder(workplace.trained)
    predictor.set_image(pixels)
    return Served(json.loads(done.stdout.splitlines()[-1]), predictor, store, (50, 70))


def test_the_champion_answers_in_a_clean_process(served: Served) -> None:
    answers = served.answers
    (code,) = answers["code"]  # the packaged copy of the library, under the name of its content
    assert Path(code).is_relative_to(served.store / "artifacts")
    assert re.fullmatch(r"ris_core_[0-9a-f]{12}", Path(code).parent.name)
    assert answers["pipelines"] is False
    star, circle = served.expected("the red star"), served.expected("the big circle")
    assert [{key: row[key] for key in star} for row in answers["two"]] == [star, circle]
    assert (star["height"], star["width"]) == served.size
    assert star["counts"] != circle["counts"]
    (prediction,) = served.predictor.predict(["the red star"])
    assert answers["two"][0]["score"] == pytest.approx(prediction.score, abs=1e-5)
    for given in ("bytes", "array", "path"):
        assert answers[given] == answers["two"][:1], given
    (stricter,) = answers["threshold"]
    assert stricter["counts"] == served.expected("the red star", 0.52)["counts"] != star["counts"]
    for refused in ("path_refused", "path_asked_for", "accents"):
        (row,) = answers[refused]
        assert row["error"].endswith("is not base64 of an encoded image"), refused
        assert row["counts"] is row["score"] is None
    assert answers["no_path"][0]["error"] == "no image at no/where.png"
    first, *others = answers["all_rows"]
    assert first == {**answers["two"][0], "error": None}, "a bad row spoils no other"
    assert [row["error"].split(";")[0][:40] for row in others] == [
        "an image text of 3 characters is not bas",
        "the text must not be blank",
        "an image of 10 bytes cannot be used: it ",
    ]
    assert all(told.startswith("BadRequest: the threshold is ") for told in answers["no_threshold"])


def test_a_registered_model_is_a_model_folder_too(workplace: Workplace, store: Path) -> None:
    folder = workplace.root / "models/cris-shapes"
    (folder / "clip").mkdir(parents=True)
    names = ("model.json", "model.safetensors", "clip/clip.json")
    for name in names:  # as DVC lays it out where its cache is linked
        (folder / name).symlink_to(workplace.trained / name)
    evaluated(workplace)
    register.main("cris", "shapes")
    folder = model_folder(f"models:/{NAME}@champion")
    assert [(folder / name).read_bytes() for name in names] == [(workplace.trained / n).read_bytes() for n in names]


def test_a_frozen_clip_is_registered_with_its_system(workplace: Workplace, store: Path) -> None:
    model = Path("models/risclip-shapes")
    export_untrained(workplace.tiny, model, "risclip")
    evaluated(workplace, system="risclip")
    register.main("risclip", "shapes")
    registered = contents(model_folder("models:/ris-risclip-shapes@champion"))
    assert registered == contents(model)
    assert {"clip/clip.json", "clip/clip.safetensors"} <= registered.keys()
    example = mlflow.pyfunc.load_model("models:/ris-risclip-shapes@champion")
    assert example.predict(example.input_example)["height"].tolist() == [48]


def test_a_zero_shot_system_answers_from_the_registry(workplace: Workplace, store: Path) -> None:
    model = Path("models/global_local-shapes")
    export_untrained(workplace.tiny, model, "global_local")
    evaluated(workplace, system="global_local")
    register.main("global_local", "shapes")
    photo = workplace.tiny.raw / workplace.tiny.records()[0].file_name
    served = mlflow.pyfunc.load_model("models:/ris-global_local-shapes@champion")
    image = base64.b64encode(photo.read_bytes()).decode()
    texts = ["the red star", "the big circle", "left"]
    found = served.predict(pd.DataFrame({"image": [image] * 3, "text": texts})).to_dict("records")
    predictor = RISPredictor.from_folder(model)
    predictor.set_image(photo)
    for row, prediction in zip(found, predictor.predict(texts), strict=True):
        assert masks.encode(prediction.mask) == row["counts"]
        assert row["score"] == pytest.approx(prediction.score, abs=1e-5)
        assert prediction.mask.any()


def test_other_code_is_another_version_and_is_shipped(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(workplace)
    register.main("cris", "shapes")
    monkeypatch.setattr(fingerprint, "served_code", lambda system: "other")
    register.main("cris", "shapes")
    found = tracking.connect().search_model_versions(f"name = '{NAME}'")
    assert sorted((version.version, version.tags["code_digest"] == "other") for version in found) == [
        (1, False),
        (2, True),
    ]
    assert written()["decision"] == "champion: version 1 with other code, every answer the same"
    assert aliases() == {"champion": "2"}, "what was mended must not stay out of service"
    evaluated(workplace, 0.3, seed=1)  # other answers
    monkeypatch.setattr(fingerprint, "served_code", lambda system: "third")
    register.main("cris", "shapes")
    assert aliases() == {"champion": "2", "challenger": "3"}


@pytest.mark.parametrize("digest", ["clip_digest", "config_digest", "data_digest"])
def test_what_differs_without_other_weights_is_another_version(digest: str, workplace: Workplace, store: Path) -> None:
    """All weights of a zero-shot system are its CLIP's, so those that training changes are always the same: none."""
    folder = Path("models/global_local-shapes")
    export_untrained(workplace.tiny, folder, "global_local")
    evaluated(workplace, system="global_local")
    seen = []
    for _ in range(2):
        register.main("global_local", "shapes")
        seen.append(json.loads(Path("mlflow/registered/global_local-shapes.json").read_text())["version"])
        content = json.loads((folder / "model.json").read_text())
        content["info"][digest] = "0" * 64
        (folder / "model.json").write_text(json.dumps(content))
    assert seen == ["1", "2"]


def test_a_notice_goes_with_the_version(workplace: Workplace, store: Path) -> None:
    export_untrained(workplace.tiny, Path("models/lts-shapes"), "lts")
    evaluated(workplace, system="lts")
    register.main("lts", "shapes")
    version = tracking.connect().get_model_version_by_alias("ris-lts-shapes", "champion")
    assert version.description.startswith("Patent notice.")


def test_the_example_of_a_version_is_a_picture(workplace: Workplace, store: Path) -> None:
    evaluated(workplace)
    register.main("cris", "shapes")
    model = mlflow.models.get_model_info(f"models:/{NAME}@champion")
    assert [column.name for column in model.signature.outputs] == ["counts", "height", "width", "score", "error"]
    example = mlflow.pyfunc.load_model(f"models:/{NAME}@champion").input_example
    assert Image.open(io.BytesIO(base64.b64decode(example["image"][0]))).size == (64, 48)


def test_the_readmes_lines_for_the_registry_do_what_they_say(
    workplace: Workplace, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlflow").mkdir()
    shutil.copy(migrated_store, "mlflow/mlflow.db")
    evaluated(workplace, 0.5)
    register.main("cris", "shapes")
    shutil.copy(workplace.tiny.raw / workplace.tiny.records()[0].file_name, "street.jpg")
    (_, registry_lines) = blocks_of("README.md", "python")
    head, _, call = registry_lines.partition("model.predict(")
    names: dict[str, Any] = {}
    exec(compile(f"{head}found = model.predict({call}", "README.md", "exec"), names)
    (row,) = names["found"].to_dict("records")
    assert (row["height"], row["width"]) == np.asarray(Image.open("street.jpg")).shape[:2]
    assert masks.decode(row["counts"], row["height"], row["width"]).shape == (row["height"], row["width"])
    assert not row["error"]

"""Registered versions: which becomes champion, and loading one where nothing of this repository is installed."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pipelines_world import Workplace, contents, export_untrained

from pipelines import fingerprint, register, registry, tracking
from pipelines.predict import model_folder
from ris_core import files
from ris_core.data import masks
from ris_core.errors import ConfigError, DataError
from ris_core.predictor import RISPredictor

NAME = "ris-cris-shapes"
SCORES = {"mIoU": 0.41, "oIoU": 0.52, "Pr@0.5": 0.4, "expressions": 46, "mIoU_95": [0.3, 0.5]}
TAGS = {"protocol": "ours", "split": "val", "metric": "mIoU", "data_digest": "d" * 64}


def candidate(
    score: float, minimum: float = 0.0, alias: str = "champion", tags: dict[str, str] | None = None
) -> dict[str, str]:
    """Register a version that holds nothing but its tags, and ask for its promotion."""
    client = tracking.connect()
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    all_tags = {**TAGS, "score": f"{score:.5f}", **(tags or {})}
    version = client.create_model_version(NAME, "file:///nowhere", tags=all_tags).version
    return registry.promote(NAME, str(version), alias, all_tags, minimum)


def champion() -> str:
    return str(tracking.connect().get_model_version_by_alias(NAME, "champion").version)


def test_the_first_version_becomes_champion_and_a_better_one_takes_over(store: Path) -> None:
    assert candidate(0.40) == {"version": "1", "decision": "champion"}
    assert candidate(0.39) == {"version": "2", "decision": "challenger: version 1 has 0.40000"}
    assert candidate(0.40)["decision"] == "challenger: version 1 has 0.40000"  # as good is not better
    assert champion() == "1"
    assert candidate(0.41) == {"version": "4", "decision": "champion"}
    assert champion() == "4"
    again = {**TAGS, "score": "0.41000"}
    assert registry.promote(NAME, "4", "champion", again, 0.0) == {"version": "4", "decision": "already champion"}


@pytest.mark.parametrize(
    ("tag", "value"), [("protocol", "cris"), ("split", "testA"), ("metric", "oIoU"), ("data_digest", "e" * 64)]
)
def test_scores_of_another_kind_are_not_compared(tag: str, value: str, store: Path) -> None:
    candidate(0.40)
    decision = candidate(0.90, tags={tag: value})["decision"]
    assert decision == f"challenger: version 1 was scored with another {tag}; not comparable"
    assert champion() == "1"


def test_a_score_below_the_minimum_is_never_promoted(store: Path) -> None:
    assert candidate(0.30, minimum=0.4)["decision"] == "not promoted: 0.3 is below the minimum 0.4"
    assert tracking.connect().get_registered_model(NAME).aliases == {}
    assert candidate(0.40, minimum=0.4)["decision"] == "champion"


def test_aliases_are_independent(store: Path) -> None:
    candidate(0.40)
    assert candidate(0.30, alias="candidate")["decision"] == "candidate"
    assert tracking.connect().get_registered_model(NAME).aliases == {"champion": 1, "candidate": 2}


def evaluated(workplace: Workplace, **scores: Any) -> None:
    """What stages `train` and `evaluate` leave."""
    if not (workplace.root / "models").exists():
        workplace.link("model")
    folder = workplace.root / "results/evaluate/cris-shapes"
    files.write_json(folder / "metrics.json", {"ours": {"val": {**SCORES, **scores}, "testA": SCORES}})
    (folder / "gallery").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "gallery" / "00-hit-size.jpg")


def test_a_version_carries_its_lineage(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(workplace)
    (workplace.root / "dvc.lock").write_text("schema: '2.0'\n")
    monkeypatch.setattr(fingerprint, "git_commit", lambda: "abc")
    register.main("cris", "shapes")
    shown = capsys.readouterr()
    assert shown.out == "models:/ris-cris-shapes/1  val mIoU 0.410: champion\n"
    assert "the run that trained models/cris-shapes is not in sqlite:" in shown.err
    client = tracking.connect()
    version = client.get_model_version_by_alias(NAME, "champion")
    info = json.loads((workplace.trained / "model.json").read_text())["info"]
    scored = {"protocol": "ours", "split": "val", "metric": "mIoU", "score": "0.41000"}
    assert version.tags == scored | {
        "git_commit": "abc",
        "code_digest": fingerprint.served_code("cris"),
        "data_digest": info["data_digest"],
        "clip_digest": info["clip_digest"],
        "config_digest": info["config_digest"],
        "weights_sha256": files.file_sha256(workplace.trained / "model.safetensors"),
        "dvc_lock_sha256": files.file_sha256(workplace.root / "dvc.lock"),
    }
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/val/Pr_0.5"] == 0.4
    assert run.data.metrics["test/testA/mIoU"] == 0.41
    assert [item.path for item in client.list_artifacts(version.run_id, "gallery")] == ["gallery/00-hit-size.jpg"]
    written = json.loads((workplace.root / "mlflow/registered/cris-shapes.json").read_text())
    expected = {"model": NAME, "protocol": "ours", "score": 0.41, "version": "1", "decision": "champion"}
    assert written == expected


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
    decision = json.loads((workplace.root / "mlflow/registered/cris-shapes.json").read_text())["decision"]
    assert decision == "already champion"


def test_what_evaluate_did_not_leave_is_told(workplace: Workplace, store: Path) -> None:
    workplace.link("model")
    with pytest.raises(DataError, match=r"metrics.json does not exist: run the evaluate stage"):
        register.main("cris", "shapes")
    evaluated(workplace)
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

import ris_core
print(json.dumps({
    "two": answer([text, text], ["the red star", "the big circle"]),
    "bytes": answer([content], ["the red star"]),
    "array": answer([pixels], ["the red star"]),
    "path": opened.predict(pd.DataFrame({"image": [path], "text": ["the red star"]})).to_dict("records"),
    "threshold": answer([text], ["the red star"], threshold=0.52),
    "path_refused": refusal([path], ["the red star"]),
    "accents": refusal(["stra\\u00dfe.jpg"], ["the red star"]),
    "path_asked_for": refusal([path], ["the red star"], allow_paths=True),
    "no_path": refusal(["no/where.png"], ["the red star"], model=opened),
    "all_rows": refusal([text, "x y", text, None], ["the red star", "left", " ", "left"]),
    "no_image": refusal([base64.b64encode(b"no picture").decode()], ["the red star"]),
    "blank": refusal([text], ["  "]),
    "code": ris_core.__file__,
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
    assert Path(answers["code"]).is_relative_to(served.store / "artifacts")  # the packaged copy of the library
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
    refusal = "DataError: this request cannot be answered (1 problem):\n  - row 0: "
    assert answers["path_refused"].startswith(f"{refusal}the image text ")
    assert answers["path_asked_for"] is None or answers["path_asked_for"].startswith(f"{refusal}the image text ")
    assert answers["accents"].startswith(f"{refusal}the image text 'straße.jpg' is not base64")
    assert answers["no_path"] == f"{refusal}no image at no/where.png"
    assert answers["no_image"].startswith(
        f"{refusal}an image of 10 bytes cannot be used: it is none of the image formats"
    )
    assert answers["blank"] == f"{refusal}the text must not be blank; got '  '"
    assert [line[:9] for line in answers["all_rows"].splitlines()[1:]] == ["  - row 1", "  - row 2", "  - row 3"]


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
    files.write_json(Path("results/evaluate/risclip-shapes/metrics.json"), {"ours": {"val": SCORES}})
    register.main("risclip", "shapes")
    registered = contents(model_folder("models:/ris-risclip-shapes@champion"))
    assert registered == contents(model)
    assert {"clip/clip.json", "clip/clip.safetensors"} <= registered.keys()
    example = mlflow.pyfunc.load_model("models:/ris-risclip-shapes@champion")
    assert example.predict(example.input_example)["height"].tolist() == [48]


def test_a_zero_shot_system_answers_from_the_registry(workplace: Workplace, store: Path) -> None:
    model = Path("models/global_local-shapes")
    export_untrained(workplace.tiny, model, "global_local")
    files.write_json(Path("results/evaluate/global_local-shapes/metrics.json"), {"ours": {"val": SCORES}})
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
    versions = tracking.connect().search_model_versions(f"name = '{NAME}'")
    assert sorted((version.version, version.tags["code_digest"] == "other") for version in versions) == [
        (1, False),
        (2, True),
    ]
    decision = json.loads((workplace.root / "mlflow/registered/cris-shapes.json").read_text())["decision"]
    assert decision == "champion", "what was mended must not stay out of service"
    assert tracking.connect().get_model_version_by_alias(NAME, "champion").version == 2
    evaluated(workplace, mIoU=0.40)
    monkeypatch.setattr(fingerprint, "served_code", lambda system: "third")
    register.main("cris", "shapes")
    assert tracking.connect().get_model_version_by_alias(NAME, "champion").version == 2, (
        "a lower score does not take over"
    )


@pytest.mark.parametrize("digest", ["clip_digest", "config_digest", "data_digest"])
def test_what_differs_without_other_weights_is_another_version(digest: str, workplace: Workplace, store: Path) -> None:
    """All weights of a zero-shot system are its CLIP's, so those that training changes are always the same: none."""
    folder = Path("models/global_local-shapes")
    export_untrained(workplace.tiny, folder, "global_local")
    files.write_json(Path("results/evaluate/global_local-shapes/metrics.json"), {"ours": {"val": SCORES}})
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
    files.write_json(Path("results/evaluate/lts-shapes/metrics.json"), {"ours": {"val": SCORES}})
    register.main("lts", "shapes")
    version = tracking.connect().get_model_version_by_alias("ris-lts-shapes", "champion")
    assert version.description.startswith("Patent notice.")


def test_the_example_of_a_version_is_a_picture(workplace: Workplace, store: Path) -> None:
    evaluated(workplace)
    register.main("cris", "shapes")
    model = mlflow.models.get_model_info(f"models:/{NAME}@champion")
    assert [column.name for column in model.signature.outputs] == ["counts", "height", "width", "score"]
    example = mlflow.pyfunc.load_model(f"models:/{NAME}@champion").input_example
    assert Image.open(io.BytesIO(base64.b64decode(example["image"][0]))).size == (64, 48)

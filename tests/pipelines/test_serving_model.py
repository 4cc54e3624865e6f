"""The packaged model as a server calls it: from several threads, with requests of any mixture, none seeing another's."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowException
from PIL import Image
from pipelines_world import export_untrained
from tiny_world import Tiny

from pipelines.serving_model import RISModel
from ris_core.errors import ConfigError
from ris_core.predictor import EncodedImage

TEXTS = ["the red star", "the big circle", "left", "the blue ring next to the star"]


def picture(seed: int, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(seed, 40 + 8 * seed, 64 + 16 * (seed % 3)) for seed in range(6)]


def served(folder: Path, **config: Any) -> RISModel:
    model = RISModel()
    context: Any = SimpleNamespace(artifacts={"model": str(folder)}, model_config=config or None)
    model.load_context(context)
    return model


def ask(model: RISModel, images: list[Any], texts: list[Any], **params: Any) -> list[dict[str, Any]]:
    answers = model.predict(None, pd.DataFrame({"image": images, "text": texts}), params)
    return answers.to_dict("records")


@pytest.fixture(scope="module", params=["cris", "risclip", "lts", "global_local"])
def folder(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / request.param
    export_untrained(tiny, place, request.param)
    return place


def test_threads_get_the_answers_they_would_get_alone(folder: Path) -> None:
    model = served(folder)
    wanted = [(i % len(PICTURES), i % len(TEXTS)) for i in range(96)]
    alone = {pair: ask(model, [PICTURES[pair[0]]], [TEXTS[pair[1]]]) for pair in set(wanted)}
    assert len({answer[0]["counts"] for answer in alone.values()}) > len(PICTURES) // 2
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda pair: ask(model, [PICTURES[pair[0]]], [TEXTS[pair[1]]]), wanted))
    assert answers == [alone[pair] for pair in wanted]


def test_equal_images_of_a_request_are_encoded_once_wherever_they_stand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(folder)
    encoded: list[Any] = []
    encode = model.predictor.encode

    def counting(image: Any) -> EncodedImage:
        encoded.append(image)
        return encode(image)

    monkeypatch.setattr(model.predictor, "encode", counting)
    two = [base64.b64encode(content) for content in PICTURES[:2]]
    images = [bytes(two[i % 2]).decode() for i in range(16)]  # equal texts, each an object of its own
    texts = [TEXTS[i % len(TEXTS)] for i in range(16)]
    answers = ask(model, images, texts)
    assert len(encoded) == 2
    for i, answer in enumerate(answers):
        (alone,) = ask(model, [images[i]], [texts[i]])
        assert answer["counts"] == alone["counts"]
        assert answer["score"] == pytest.approx(alone["score"], abs=1e-5)
    encoded.clear()
    pixels = np.asarray(Image.open(io.BytesIO(PICTURES[0])))
    ask(model, [pixels, PICTURES[1], pixels.copy(), bytes(bytearray(PICTURES[1]))], TEXTS)
    assert len(encoded) == 2


@pytest.mark.parametrize("nothing", [None, float("nan"), 7])
def test_nothing_of_a_request_is_there_for_the_next(nothing: Any, tiny: Tiny, tmp_path: Path) -> None:
    export_untrained(tiny, tmp_path / "cris", "cris")
    model = served(tmp_path / "cris")
    ask(model, [PICTURES[0]], TEXTS[:1])
    (refused,) = ask(model, [nothing], TEXTS[:1])
    assert refused["error"].startswith("an image is a path, encoded bytes, an array or a PIL image; got")
    (alone,) = ask(model, [PICTURES[0]], TEXTS[:1])
    assert ask(model, [PICTURES[0], nothing], TEXTS[:2]) == [alone, refused], "a bad row spoils no other"


def test_a_bad_row_spoils_no_other_and_json_can_hold_the_answers(tiny: Tiny, tmp_path: Path) -> None:
    export_untrained(tiny, tmp_path / "cris", "cris")
    model = served(tmp_path / "cris")
    good = base64.b64encode(PICTURES[0]).decode()
    broken = base64.b64encode(PICTURES[0][:200]).decode()
    images = [good, broken, good, "no base64!", good, base64.encodebytes(PICTURES[0]).decode()]
    texts = [TEXTS[0], TEXTS[0], " ", TEXTS[0], TEXTS[1], TEXTS[0]]
    answers = ask(model, images, texts)
    (alone,) = ask(model, [good], TEXTS[:1])
    assert [answer["error"] is None for answer in answers] == [True, False, False, False, True, True]
    for same in (answers[0], answers[5]):
        assert {**same, "score": 0} == {**alone, "score": 0}
    assert all(answer["counts"] is None and answer["height"] is None for answer in answers[1:4])
    assert json.loads(json.dumps(answers, allow_nan=False)) == answers
    assert str(tmp_path) not in json.dumps(answers)


def test_a_request_without_its_columns_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    export_untrained(tiny, tmp_path / "cris", "cris")
    with pytest.raises(MlflowException, match=r"^columns are missing: image, text$"):
        served(tmp_path / "cris").predict(None, pd.DataFrame({"picture": ["x"]}))  # type: ignore[arg-type]


def test_a_path_is_read_only_for_whoever_loaded_the_model_so(tiny: Tiny, tmp_path: Path) -> None:
    export_untrained(tiny, tmp_path / "cris", "cris")
    (tmp_path / "photo.png").write_bytes(PICTURES[0])
    there, absent = str(tmp_path / "photo.png"), str(tmp_path / "none.png")
    closed, opened = served(tmp_path / "cris"), served(tmp_path / "cris", allow_paths=True)
    assert ask(opened, [there], TEXTS[:1]) == ask(closed, [PICTURES[0]], TEXTS[:1])
    for path in (there, absent):
        (refused,) = ask(closed, [path], TEXTS[:1], allow_paths=True)
        told = f"an image text of {len(path)} characters is not base64 of an encoded image"
        assert refused["error"] == told, "which files exist is not told"
    (missing,) = ask(opened, [absent], TEXTS[:1])
    assert missing["error"] == f"no image at {absent}"


@pytest.mark.parametrize("threshold", [float("nan"), 7.0, -1.0, "high", None])
def test_a_threshold_that_is_no_probability_is_refused(threshold: Any, tiny: Tiny, tmp_path: Path) -> None:
    export_untrained(tiny, tmp_path / "cris", "cris")
    with pytest.raises(ConfigError) as refusal:
        ask(served(tmp_path / "cris"), [PICTURES[0]], TEXTS[:1], threshold=threshold)
    assert isinstance(refusal.value, MlflowException), "then servers tell its reason"
    assert "use 0 to 1" in str(refusal.value) or "float" in str(refusal.value)

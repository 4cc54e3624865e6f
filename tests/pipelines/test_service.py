"""The service answers as the predictor does, to many at once, and refuses within its limits what it cannot answer."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pipelines_world import export_untrained
from pycocotools import mask as coco
from service_world import (
    PICTURES,
    SEGMENT,
    TEXTS,
    Gate,
    asked,
    dumped,
    inside,
    listening,
    picture,
    post_json,
    raw,
    told,
)
from tiny_world import Tiny

from benchmarks import fuzz_service
from pipelines.service.app import create_app
from pipelines.service.engine import Engine, Served
from pipelines.service.limits import MAX_TEXT, Limits
from pipelines.service.schema import Answered, Models
from ris_core.errors import ConfigError, WeightsError
from ris_core.predictor import RISPredictor

SYSTEMS = ["cris", "risclip", "lts", "global_local"]
SMALL = Limits(max_body=200_000, max_expressions=8, max_pixels=20_000)


@pytest.fixture(scope="module")
def folders(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("served")
    for system in SYSTEMS:
        export_untrained(tiny, place / system, system)
    return {system: place / system for system in SYSTEMS}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    """A service of all four systems."""
    with inside(create_app([Served(name, folder) for name, folder in folders.items()])) as found:
        yield found


@pytest.fixture(scope="module")
def small(folders: dict[str, Path]) -> Iterator[TestClient]:
    """A service of one system with small limits."""
    with inside(create_app([Served("cris", folders["cris"])], SMALL)) as found:
        yield found


def engine(client: TestClient, name: str = "cris") -> Engine:
    found: Engine = client.app.state.desk.engines[name]  # type: ignore[attr-defined]
    return found


def decoded(answer: dict[str, Any]) -> np.ndarray:
    """The mask of an answer in RLE, bool (H, W)."""
    return np.asarray(coco.decode(answer["mask"]).astype(bool))


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("system", SYSTEMS)
def test_answers_are_those_of_the_predictor(system: str, client: TestClient, folders: dict[str, Path]) -> None:
    predictor = RISPredictor.from_folder(folders[system])
    expected = predictor.answer(predictor.encode(PICTURES[0]), TEXTS)
    response = client.post(SEGMENT, json=asked(PICTURES[0], *TEXTS, model=system, location=True))
    assert response.status_code == 200, response.text
    content = Answered.model_validate_json(response.content)
    assert (content.image.height, content.image.width) == expected[0].mask.shape
    assert content.model.system == system
    for number, (answer, alone) in enumerate(zip(response.json()["answers"], expected, strict=True)):
        assert answer["index"] == number
        assert np.array_equal(decoded(answer), alone.mask)
        assert answer["area"] == alone.mask.sum()
        assert answer["score"] == pytest.approx(alone.score, abs=1e-5)
        assert answer["cut"] == alone.cut
        assert (answer["location"] is None) == (alone.location is None)
        if alone.location is not None:
            looked = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["location"]["png"]))))
            assert list(looked.shape) == answer["location"]["size"] == list(alone.mask.shape)
            assert np.abs(looked / 255 - alone.location).max() < 0.003


def test_masks_in_all_forms_are_the_same(client: TestClient) -> None:
    found = {
        form: client.post(SEGMENT, json=asked(PICTURES[1], TEXTS[0], masks=form)).json()["answers"][0]["mask"]
        for form in ("rle", "polygons", "png")
    }
    mask = coco.decode(found["rle"]).astype(bool)
    assert mask.any()
    assert not mask.all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(found["png"]["png"])))) > 0, mask)
    height, width = found["polygons"]["size"]
    drawn = coco.decode(coco.merge(coco.frPyObjects(found["polygons"]["polygons"], height, width))).astype(bool)
    assert (drawn != mask).mean() < 0.05
    assert found["rle"]["size"] == found["png"]["size"] == [height, width]


def test_an_image_comes_in_any_base64_or_as_a_file(client: TestClient) -> None:
    content = PICTURES[2]
    plain = base64.b64encode(content).decode()
    forms = {
        "plain": plain,
        "line ends": base64.encodebytes(content).decode(),
        "windows line ends": base64.encodebytes(content).decode().replace("\n", "\r\n"),
        "trailing newline": plain + "\n",
        "data URI": "data:image/png;base64," + plain,
        "URL-safe": base64.urlsafe_b64encode(content).decode(),
        "unpadded": plain.rstrip("="),
        "data URI, URL-safe, unpadded": "data:;base64," + base64.urlsafe_b64encode(content).decode().rstrip("="),
    }
    answers = {
        name: client.post(SEGMENT, json={"image": text, "expression": TEXTS[0]}).json() for name, text in forms.items()
    }
    fields = [("expression", (None, TEXTS[0]))]
    answers["file"] = client.post(SEGMENT, files=[("image", ("a.png", content)), *fields]).json()
    answers["file without a type"] = client.post(SEGMENT, files=[("image", ("x", content, "")), *fields]).json()
    assert {json.dumps(answer["answers"]) for answer in answers.values()} == {json.dumps(answers["plain"]["answers"])}
    assert "error" not in answers["plain"]["answers"][0]


def test_a_form_says_all_that_json_does(client: TestClient) -> None:
    fields = {"model": "lts", "threshold": "0.3", "masks": "png", "location": "true", "expression": TEXTS}
    sent = client.post(SEGMENT, files={"image": PICTURES[0]}, data=fields)
    same = client.post(SEGMENT, json=asked(PICTURES[0], *TEXTS, model="lts", threshold=0.3, masks="png", location=True))
    assert sent.status_code == 200
    assert sent.json() == same.json()


def test_a_picture_is_turned_upright(client: TestClient) -> None:
    turned, exif = Image.open(io.BytesIO(picture(7, 40, 96))).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right when it is shown
    stored = fuzz_service.saved(turned, "PNG", exif=exif)
    found, upright = (client.post(SEGMENT, json=asked(each, *TEXTS)).json() for each in (stored, picture(7, 40, 96)))
    assert found["image"] == {"height": 40, "width": 96}
    assert found["answers"] == upright["answers"]


def test_the_threshold_is_the_requests_own(client: TestClient) -> None:
    areas = [
        client.post(SEGMENT, json=asked(PICTURES[0], TEXTS[0], **given)).json()["answers"][0]["area"]
        for given in ({}, {"threshold": 0.5}, {"threshold": 0}, {"threshold": 1}, {"threshold": 0.5})
    ]
    assert areas[0] == areas[1] == areas[4]
    assert areas[2] > areas[0] > areas[3] == 0


def test_one_expression_spoils_no_other(client: TestClient) -> None:
    texts = ["the red star", " \n", "x" * (MAX_TEXT + 1), "left", ""]
    response = client.post(SEGMENT, json=asked(PICTURES[0], *texts))
    assert response.status_code == 200
    answers = response.json()["answers"]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        None,
        "blank_expression",
        "long_expression",
        None,
        "blank_expression",
    ]
    alone = client.post(SEGMENT, json=asked(PICTURES[0], "left")).json()["answers"][0]
    assert answers[3]["mask"] == alone["mask"]
    assert [a["error"]["code"] for a in client.post(SEGMENT, json=asked(PICTURES[0], "")).json()["answers"]] == [
        "blank_expression"
    ]


def test_a_cut_expression_is_told(client: TestClient) -> None:
    found = client.post(SEGMENT, json=asked(PICTURES[0], "the star " * 9, "the star")).json()["answers"]
    assert [answer["cut"] for answer in found] == [True, False]


# ------------------------------------------------------------------ many at once


def test_requests_about_one_image_are_answered_in_one_call(client: TestClient) -> None:
    alone = {text: client.post(SEGMENT, json=asked(PICTURES[3], text)).json()["answers"][0] for text in TEXTS}
    other = client.post(SEGMENT, json=asked(PICTURES[4], "left")).json()["answers"]
    with ThreadPoolExecutor(8) as threads, Gate(engine(client)) as gate:
        first = threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], "first"))
        assert gate.reached.wait(30)
        waiting = [threads.submit(client.post, SEGMENT, json=asked(PICTURES[3], text)) for text in TEXTS]
        apart = threads.submit(client.post, SEGMENT, json=asked(PICTURES[4], "left"))
        lower = threads.submit(client.post, SEGMENT, json=asked(PICTURES[3], "left", threshold=0.0))
        _until(lambda: len(engine(client)._waiting) == 6)
        gate.opened.set()
        assert first.result().status_code == 200
        for text, request in zip(TEXTS, waiting, strict=True):
            (answer,) = request.result().json()["answers"]
            assert answer["mask"] == alone[text]["mask"]
            assert answer["score"] == pytest.approx(alone[text]["score"], abs=1e-5)
        assert apart.result().json()["answers"] == other
        assert lower.result().json()["answers"][0]["area"] > alone["left"]["area"]
    assert gate.calls[0] == ["first"]
    assert sorted(map(sorted, gate.calls[1:])) == sorted([sorted(TEXTS), ["left"], ["left"]])


@pytest.mark.parametrize("system", SYSTEMS)
def test_many_threads_get_what_each_would_get_alone(system: str, client: TestClient) -> None:
    wanted = [(i % len(PICTURES), i % len(TEXTS)) for i in range(60)]

    def ask(pair: tuple[int, int]) -> Any:
        response = client.post(SEGMENT, json=asked(PICTURES[pair[0]], TEXTS[pair[1]], model=system))
        assert response.status_code == 200, response.text
        return response.json()["answers"][0]

    alone = {pair: ask(pair) for pair in set(wanted)}
    assert len({answer["mask"]["counts"] for answer in alone.values()}) >= len(PICTURES)
    with ThreadPoolExecutor(12) as threads:
        for pair, answer in zip(wanted, threads.map(ask, wanted), strict=True):
            assert answer["mask"] == alone[pair]["mask"]
            assert answer["score"] == pytest.approx(alone[pair]["score"], abs=1e-5)


def test_what_spoils_a_request_spoils_no_other_of_its_batch(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = engine(client).encodings
    assert encodings is not None
    answer = encodings.predictor.answer

    def failing(encoded: Any, texts: Any, threshold: Any = None) -> Any:
        if "poison" in texts:
            raise RuntimeError("something in /work of no RISError")
        return answer(encoded, texts, threshold)

    with ThreadPoolExecutor(4) as threads, Gate(engine(client)) as gate:
        gate._answer = failing
        first = threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], "first"))
        assert gate.reached.wait(30)
        requests = [
            threads.submit(client.post, SEGMENT, json=asked(PICTURES[3], t)) for t in ("left", "poison", "star")
        ]
        _until(lambda: len(engine(client)._waiting) == 3)
        gate.opened.set()
        statuses = [request.result().status_code for request in (first, *requests)]
    assert statuses == [200, 200, 500, 200]
    assert told(requests[1].result()) == "internal"
    assert "/work" not in requests[1].result().text
    assert requests[1].result().headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/ready").status_code == 200


def test_a_bad_image_is_refused_alone(client: TestClient) -> None:
    whole = picture(9, 160, 240, "JPEG")
    cut = whole[: len(whole) // 2]  # its header is fine, so it is found out when its turn has come
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda content: client.post(SEGMENT, json=asked(content, "left")), [whole, cut] * 6))
    assert [response.status_code for response in found] == [200, 422] * 6
    assert {told(response) for response in found[1::2]} == {"bad_image"}


def test_images_are_encoded_once(client: TestClient) -> None:
    encodings = engine(client).encodings
    assert encodings is not None
    content = picture(11)
    before = encodings.misses, encodings.hits
    for text in TEXTS:
        client.post(SEGMENT, json=asked(content, text))
        client.post(SEGMENT, files={"image": content}, data={"expression": text})
    assert (encodings.misses - before[0], encodings.hits - before[1]) == (1, 7)


def test_large_images_are_answered_a_few_expressions_at_a_time(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.service.engine.PIXELS_AT_ONCE", 3 * 48 * 64 + 5)
    content = picture(12)
    with Gate(engine(client)) as gate:
        gate.opened.set()
        response = client.post(SEGMENT, json=asked(content, *(f"star {i}" for i in range(8))))
    assert [len(call) for call in gate.calls] == [3, 3, 2]
    assert [answer["index"] for answer in response.json()["answers"]] == list(range(8))


def test_two_services_in_one_process(folders: dict[str, Path]) -> None:
    with (
        inside(create_app([Served("a", folders["cris"])])) as one,
        inside(create_app([Served("b", folders["lts"])])) as two,
    ):
        for _ in range(3):
            assert one.post(SEGMENT, json=asked(PICTURES[0], "left")).json()["model"]["name"] == "a"
        assert two.post(SEGMENT, json=asked(PICTURES[0], "left")).json()["model"]["name"] == "b"
        counted = [each.get("/metrics").text for each in (one, two)]
    assert 'ris_requests_total{path="/v1/segment",status="200"} 3.0' in counted[0]
    assert 'ris_requests_total{path="/v1/segment",status="200"} 1.0' in counted[1]
    assert 'ris_cache_hits_total{model="a"} 2.0' in counted[0]
    assert 'model="b"' not in counted[0]


# ------------------------------------------------------------------ limits


def test_beyond_the_queue_is_429_at_once(folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], replace(SMALL, queue=3))
    with inside(app) as client, ThreadPoolExecutor(3) as threads, Gate(engine(client)) as gate:
        held = [threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], text)) for text in TEXTS[:3]]
        _until(lambda: app.state.desk.inside == 3)
        refused = client.post(SEGMENT, json=asked(PICTURES[0], "left"))
        assert (refused.status_code, told(refused), refused.headers["Retry-After"]) == (429, "queue_full", "1")
        assert client.get("/ready").status_code == client.get("/health").status_code == 200
        assert "ris_requests_inside 3.0" in client.get("/metrics").text
        gate.opened.set()
        assert [each.result().status_code for each in held] == [200] * 3
        assert client.post(SEGMENT, json=asked(PICTURES[0], "left")).status_code == 200
    assert app.state.desk.inside == 0


def test_what_is_overdue_is_503_and_not_computed(folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], replace(SMALL, timeout=0.5))
    with inside(app) as client, ThreadPoolExecutor(2) as threads, Gate(engine(client)) as gate:
        held = threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], "held"))
        assert gate.reached.wait(30)
        waiting = threads.submit(client.post, SEGMENT, json=asked(PICTURES[1], "never asked"))
        for response in (held.result(), waiting.result()):
            assert (response.status_code, told(response)) == (503, "overdue")
            assert int(response.headers["Retry-After"]) > 0
        gate.opened.set()
        _until(lambda: client.post(SEGMENT, json=asked(PICTURES[0], "after")).status_code == 200)
    assert ["never asked"] not in gate.calls


def test_a_client_that_has_gone_is_not_answered(folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], SMALL)
    with listening(app) as client, Gate(app.state.desk.engines["cris"]) as gate:
        with ThreadPoolExecutor(1) as threads:
            held = threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], "held"))
            assert gate.reached.wait(30)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(client.base_url.join(SEGMENT), json=asked(PICTURES[1], "impatient"), timeout=0.3)
            _until(lambda: app.state.desk.inside == 1)
            gate.opened.set()
            assert held.result().status_code == 200
        assert client.post(SEGMENT, json=asked(PICTURES[1], "after")).status_code == 200
    assert gate.calls == [["held"], ["after"]]


def test_a_body_is_counted_as_it_comes(folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], replace(SMALL, timeout=1.0))
    body = dumped(asked(PICTURES[0], "left"))
    large = body + b" " * SMALL.max_body
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    with listening(app) as client:
        said = client.post(SEGMENT, **post_json(large))
        assert (said.status_code, told(said)) == (413, "body_too_large")
        unsaid = raw(client, chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(large), large))
        assert unsaid.startswith(b"HTTP/1.1 413")
        endless = raw(client, chunked + b"%x\r\n%b\r\n" % (len(large), large))  # its end never comes
        assert endless.startswith(b"HTTP/1.1 413")
        whole = raw(client, chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert whole.startswith(b"HTTP/1.1 200")
        lying = raw(client, head + b"Content-Length: %d\r\n\r\n%b" % (len(body) + 99, body))  # the rest never comes
        assert lying.startswith(b"HTTP/1.1 408")
        assert b"too_slow" in lying
        short = raw(client, head + b"Content-Length: %d\r\n\r\n%b" % (len(body) - 9, body))
        assert short.startswith(b"HTTP/1.1 400")
        huge = raw(client, head + b"Content-Length: 99999999999999999999999\r\n\r\n{}")
        assert huge.split(b" ")[1] in (b"400", b"413", b"408")
        assert client.post(SEGMENT, **post_json(body)).status_code == 200


def test_pixels_and_expressions_are_limited(small: TestClient) -> None:
    many = small.post(SEGMENT, json=asked(PICTURES[0], *["left"] * 9))
    assert (many.status_code, told(many)) == (422, "invalid")
    assert "9 expressions were given; 8 are the most at once" in many.text
    pixels = small.post(SEGMENT, json=asked(picture(0, 160, 160), "left"))
    assert (pixels.status_code, told(pixels)) == (422, "bad_image")
    assert "160x160 pixels; 0.02 million are the most" in pixels.text
    assert small.post(SEGMENT, json=asked(picture(0, 120, 120), *["left"] * 8)).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "status", "code", "words"),
    [
        ({"threshold": 7}, 422, "invalid", "threshold: Input should be less than or equal to 1"),
        ({"threshold": -1}, 422, "invalid", "threshold: Input should be greater than or equal to 0"),
        ({"threshold": "0.3"}, 422, "invalid", "threshold: Input should be a valid number"),
        ({"threshold": True}, 422, "invalid", "threshold: "),
        ({"masks": "bitmap"}, 422, "invalid", "masks: Input should be 'rle', 'polygons' or 'png'"),
        ({"location": 1}, 422, "invalid", "location: Input should be a valid boolean"),
        ({"treshold": 0.3}, 422, "invalid", "treshold: Extra inputs are not permitted"),
        ({"expressions": "left"}, 422, "invalid", "expressions: Input should be a valid array"),
        ({"expressions": ["left", None]}, 422, "invalid", "expressions.1: Input should be a valid string"),
        ({"expressions": []}, 422, "invalid", "give `expressions`, a list of one or more texts"),
        ({"expression": "left"}, 422, "invalid", "give `expressions`, a list of one or more texts"),
        ({"image": None}, 422, "invalid", "image: Input should be a valid string"),
        ({"image": "!"}, 422, "bad_image", "is not base64 of an encoded image"),
        ({"image": "aGVsbG8="}, 422, "bad_image", "it is none of the image formats read here"),
        ({"model": "lisa"}, 404, "unknown_model", "no model 'lisa' is served; there are cris"),
    ],
)
def test_what_is_wrong_is_told(wrong: dict[str, Any], status: int, code: str, words: str, small: TestClient) -> None:
    response = small.post(SEGMENT, json=asked(PICTURES[0], "left") | wrong)
    assert (response.status_code, told(response)) == (status, code)
    assert words in response.json()["error"]["message"] + str(response.json()["error"].get("problems"))


def test_all_that_is_wrong_is_told_at_once(small: TestClient) -> None:
    response = small.post(SEGMENT, json={"expressions": [1], "threshold": 9, "x": 0})
    assert [problem.split(":")[0] for problem in response.json()["error"]["problems"]] == [
        "expressions.0",
        "threshold",
        "image",
        "x",
    ]
    fields = {"threshold": "NaN", "masks": "x", "location": "maybe", "expression": "left"}
    form = small.post(SEGMENT, files={"image": PICTURES[0]}, data=fields)
    assert [problem.split(":")[0] for problem in form.json()["error"]["problems"]] == ["threshold", "masks", "location"]
    form = small.post(SEGMENT, files={"expression": b"a file"}, data={"colour": "red", "model": ["cris", "lts"]})
    assert len(form.json()["error"]["problems"]) == 4


@pytest.mark.parametrize("name", ["NaN", "twins", "a deep twin", "deep lists", "not UTF-8", "many fields"])
def test_crafted_json_is_refused(name: str, client: TestClient) -> None:
    (sent,) = (each for each in fuzz_service.crafted_requests(PICTURES[0]) if each.name == name)
    assert client.post(SEGMENT, **post_json(sent.body)).status_code in (400, 422)


def test_nothing_of_what_was_sent_comes_back_at_length(client: TestClient) -> None:
    secret = "S3CRET" * 100
    for content in (
        {secret: 1},
        {"image": secret},
        asked(PICTURES[0], "x", model=secret),
        asked(PICTURES[0], "x", masks=secret),
    ):
        text = client.post(SEGMENT, json=content).text
        assert len(text) < 1500
        assert "S3CRET" * 12 not in text


def test_addresses_methods_and_types(client: TestClient) -> None:
    assert told(client.get("/nothing")) == "not_found"
    assert told(client.get(SEGMENT)) == "method_not_allowed"
    assert client.get(SEGMENT).headers["allow"] == "POST"
    for content_type in ("text/plain", "image/png", ""):
        response = client.post(SEGMENT, content=b"{}", headers={"content-type": content_type})
        assert (response.status_code, told(response)) == (415, "unsupported_media_type")
    squeezed = client.post(
        SEGMENT, content=b"{}", headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    assert squeezed.status_code == 415


# ------------------------------------------------------------------ around it


def test_the_token_is_asked_for(folders: dict[str, Path]) -> None:
    with inside(create_app([Served("cris", folders["cris"])], SMALL, token="open-sesame")) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            response = client.get(path)
            assert (response.status_code, told(response)) == (401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for given in ("Bearer open-sesam", "Bearer ", "Basic open-sesame", "open-sesame", "Bearer öpen-sesame"):
            header = {"Authorization": given.encode()}
            assert client.post(SEGMENT, json=asked(PICTURES[0], "x"), headers=header).status_code == 401  # type: ignore[arg-type]
        for path in ("/", "/page.js", "/page.css", "/health", "/ready"):
            assert client.get(path).status_code == 200
        right = {"Authorization": "Bearer open-sesame"}
        assert client.post(SEGMENT, json=asked(PICTURES[0], "x"), headers=right).status_code == 200
        assert client.get("/v1/models", headers=right).status_code == 200


def test_models_are_listed_as_they_were_loaded(client: TestClient, folders: dict[str, Path]) -> None:
    found = Models.model_validate_json(client.get("/v1/models").content).models
    assert [model.name for model in found] == SYSTEMS
    assert [model.uses_threshold for model in found] == [True, True, True, False]
    described = json.loads((folders["lts"] / "model.json").read_text())
    assert found[2].weights_sha256 == described["weights_sha256"]
    assert str(folders["lts"].parent) not in client.get("/v1/models").text


def test_the_description_names_what_there_is(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {SEGMENT, "/v1/models", "/health", "/ready", "/metrics"}
    operation = document["paths"][SEGMENT]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "503"} <= set(operation["responses"])
    assert "`queue_full`" in operation["responses"]["429"]["description"]


def test_metrics_count(folders: dict[str, Path]) -> None:
    with inside(create_app([Served("cris", folders["cris"])], SMALL)) as client:
        client.post(SEGMENT, json=asked(PICTURES[0], *TEXTS))
        client.post(SEGMENT, json=asked(PICTURES[0], "left"))
        client.post(SEGMENT, json={})
        client.get("/" + "x" * 99)
        text = client.get("/metrics").text
    for line in (
        'ris_requests_total{path="/v1/segment",status="200"} 2.0',
        'ris_requests_total{path="/v1/segment",status="422"} 1.0',
        'ris_requests_total{path="other",status="404"} 1.0',
        'ris_request_seconds_count{path="/v1/segment"} 3.0',
        'ris_batch_expressions_sum{model="cris"} 5.0',
        'ris_batch_expressions_count{model="cris"} 2.0',
        'ris_cache_hits_total{model="cris"} 1.0',
        'ris_cache_misses_total{model="cris"} 1.0',
        "ris_requests_inside 0.0",
    ):
        assert line in text.splitlines()
    assert "process_resident_memory_bytes" in text


def test_until_models_are_loaded_it_lives_but_is_not_ready(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go = RISPredictor.from_folder, threading.Event()

    def slow(folder: Path) -> RISPredictor:
        assert go.wait(30)
        return load(folder)

    monkeypatch.setattr(RISPredictor, "from_folder", staticmethod(slow))
    with TestClient(create_app([Served("cris", folders["cris"])], SMALL)) as client:
        assert client.get("/health").status_code == 200
        for response in (client.get("/ready"), client.post(SEGMENT, json=asked(PICTURES[0], "left"))):
            assert (response.status_code, told(response)) == (503, "not_ready")
            assert int(response.headers["Retry-After"]) > 0
        go.set()
        _until(lambda: client.get("/ready").status_code == 200)
        assert client.post(SEGMENT, json=asked(PICTURES[0], "left")).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no model"):
        create_app([Served("none", tmp_path)])
    with pytest.raises(ConfigError, match="two models are named a"):
        create_app([Served("a", folders["cris"]), Served("a", folders["lts"])])
    with pytest.raises(ConfigError, match=r"wrong \(2 problems\)"):
        Limits(queue=0, timeout=float("nan"))


def test_the_end_is_told_to_those_that_wait(folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], SMALL)
    with inside(app) as client, ThreadPoolExecutor(2) as threads:
        found = engine(client)
        with Gate(found) as gate:
            held = threads.submit(client.post, SEGMENT, json=asked(PICTURES[0], "held"))
            assert gate.reached.wait(30)
            waiting = threads.submit(client.post, SEGMENT, json=asked(PICTURES[1], "waiting"))
            _until(lambda: len(found._waiting) == 1)
            ending = threading.Thread(target=found.stop)
            ending.start()
            assert (waiting.result().status_code, told(waiting.result())) == (503, "shutting_down")
            gate.opened.set()
            assert held.result().status_code == 200
            ending.join(30)
        assert told(client.post(SEGMENT, json=asked(PICTURES[0], "late"))) == "shutting_down"
        assert client.get("/ready").status_code == 503


def test_headers_let_a_browser_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/page.js", "/page.css", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text
        assert "http://" not in text
        assert "https://" not in text


# ------------------------------------------------------------------ fuzz


@pytest.mark.parametrize("made", [fuzz_service.images, fuzz_service.requests])
def test_nothing_that_is_sent_makes_a_fault(made: Any, client: TestClient, capfd: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks.serving --fuzz` sends thousands, to a service behind a real port."""

    def send(sent: fuzz_service.Sent) -> tuple[int, bytes]:
        headers = sent.headers | ({"content-type": sent.content_type} if sent.content_type else {})
        response = client.request(sent.method, sent.path, content=sent.body, headers=headers)
        return response.status_code, response.content

    counts, faults = fuzz_service.tried(send, made(20261126, 300))
    assert faults == []
    assert sum(counts.values()) == 300
    assert counts[200] > 5
    assert counts[422] > 50
    assert client.get("/ready").status_code == 200


def _until(what: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)

"""The clock is read around whole answers, after a warm-up; a time never stands without the floor of its machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import IMAGE_SIZE, Tiny
from torch import nn

from benchmarks.models import matmul_rate
from benchmarks.waiting import device_name, waiting
from ris_core.errors import DataError
from ris_core.evaluation.cost import cost
from ris_core.models.clip import load_saved_clip
from ris_core.models.registry import ModelInfo, build_model, export_model
from ris_core.predictor import Prediction, RISPredictor

CPU = torch.device("cpu")
KEYS = {"ms_first", "ms_next", "device", "gflop_per_s_matmul", "floor_ms_first"}
RGB = np.zeros((6, 8, 3), np.uint8)


class Fake:
    """Each pixel through the image layer, each letter of an expression through the text layer."""

    def __init__(self, image: nn.Module, text: nn.Module):
        self.model, self.calls = nn.ModuleDict({"image": image, "text": text}), list[str]()

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self.calls.append("image")
        self.model["image"](torch.from_numpy(image).float())

    @torch.inference_mode()
    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.calls += texts
        assert len(texts) == 1
        self.model["text"](torch.zeros(len(texts[0]), 4))
        return [Prediction(np.zeros((6, 8), bool), 0.0, np.zeros((6, 8)))]


def fake() -> Fake:
    return Fake(nn.Linear(3, 5), nn.Linear(4, 4, bias=False))


@pytest.fixture(autouse=True)
def small_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix product measures a floor as well, here."""
    monkeypatch.setattr("benchmarks.models.MATMUL_SIDE", {"cpu": 100, "cuda": 8192})


def test_timing_takes_the_expressions_in_turn_after_a_warm_up() -> None:
    asked = fake()
    waiting(asked, CPU, RGB, ["a", "bb", "ccc"], 2)
    counted, timed = asked.calls[:4], asked.calls[4:]
    assert counted == ["image", "a", "bb", "ccc"]
    assert timed == ["image", "a", "bb", "image", "bb", "ccc", "image", "ccc", "a"]


def test_the_best_is_of_the_repeats_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says how long each step took: the warm-up half a second, then first answers of 5, 1 and 3 seconds."""
    steps = iter([0.5, 0.05, 5.0, 0.4, 1.0, 0.2, 3.0, 0.1] + [0.25] * 5)
    now, running = 0.0, False

    def clock() -> float:
        nonlocal now, running
        now, running = now + (next(steps) if running else 0), not running
        return now

    monkeypatch.setattr("benchmarks.waiting.time.perf_counter", clock)
    found = waiting(fake(), CPU, RGB, ["abc"], 3)
    assert next(steps, None) is None
    assert (found["ms_first"], found["ms_next"]) == (pytest.approx(1000), pytest.approx(100))
    assert found["gflop_per_s_matmul"] == pytest.approx(2e6 / 0.25 / 1e9)
    assert found["floor_ms_first"] == pytest.approx(1e3 * (2 * 6 * 8 * 3 * 5 + 2 * 3 * 16) / (2e6 / 0.25))


def test_what_takes_no_operations_has_no_floor() -> None:
    assert waiting(Fake(nn.Identity(), nn.Identity()), CPU, RGB, ["a"], 1)["floor_ms_first"] == 0


def test_the_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, words in ((1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert device_name(CPU) == words
    assert waiting(fake(), CPU, RGB, ["a"], 1)["device"] == "cpu, 2 threads"


def test_errors_are_told() -> None:
    for nothing in ((), "the red star"):
        with pytest.raises(DataError, match="cost needs a list of at least one expression to ask; got "):
            waiting(fake(), CPU, RGB, nothing)
    with pytest.raises(DataError, match="the best of 0 repeats cannot be taken: use 1 or more"):
        waiting(fake(), CPU, RGB, ["a"], 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    assert device_name(device) == torch.cuda.get_device_name(0)
    assert math.isfinite(matmul_rate("cuda", torch.float32, "wall"))


@pytest.mark.parametrize("system", ["cris", "risclip", "lts"])
def test_a_real_model_can_be_timed(system: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.params().of(system).model
    clip = tiny.clip_vit if system == "risclip" else tiny.clip
    model = build_model(system, config, load_saved_clip(clip))
    export_model(tmp_path, system, model.state_dict(), config, clip, ModelInfo(IMAGE_SIZE, word_len=12))
    predictor, texts = RISPredictor.from_folder(tmp_path, "cpu"), ["the red star", "left"]
    found = waiting(predictor, predictor.device, RGB, texts, 1)
    assert set(found) == KEYS
    assert found["device"].startswith("cpu, ")
    times = [found["ms_first"], found["ms_next"], found["gflop_per_s_matmul"], found["floor_ms_first"]]
    assert all(math.isfinite(value) and value > 0 for value in times)
    operations = cost(predictor, RGB, texts)
    gflop = operations["gflop_image"] + operations["gflop_expression"]
    assert found["floor_ms_first"] == pytest.approx(1e3 * gflop / found["gflop_per_s_matmul"])

"""What is timed is what a client asks for; the floors beside it are the same pass on prepared tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipelines_world import export_untrained
from tiny_world import Tiny

from benchmarks import predict
from benchmarks.measure import Report
from ris_core.predictor import RISPredictor

TEXTS = [f"star {number}" for number in range(predict.MANY)]


def test_rounds_go_through_all_and_the_first_two_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    clock = iter([*[0.0] * 4, *(t for n in (1, 2, 3) for t in (0.0, n, 0.0, 10.0 * n))])
    monkeypatch.setattr(predict.time, "perf_counter", lambda: next(clock))
    functions = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    found = predict.quantiles(functions, 3, lambda: None)
    assert called == ["a", "b"] * 5
    assert {name: round(median) for name, (median, _) in found.items()} == {"a": 2000, "b": 20000}
    assert found["a"][1] == pytest.approx(2900)


@pytest.mark.parametrize("system", ["cris", "lts", "global_local"])
def test_the_floor_does_what_an_answer_does_but_for_the_picture(
    system: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_untrained(tiny, tmp_path / "model", system)
    photo = tiny.raw / tiny.records()[0].file_name
    predictor = RISPredictor.from_folder(tmp_path / "model")
    calls: list[str] = []
    for name in ("encode_image", "encode_proposals", "segment", "score", "located"):
        if method := getattr(predictor.model, name, None):
            monkeypatch.setattr(
                predictor.model, name, lambda *a, _name=name, _of=method: calls.append(_name) or _of(*a)
            )
    with torch.inference_mode():
        asked, alone = predict.answers(predictor, photo, TEXTS), predict.passes(predictor, photo, TEXTS)
        for name, function in alone.items():
            calls.clear()
            function()
            floor = list(calls)
            calls.clear()
            asked[name]()
            assert calls == floor, name
            assert ("encode" in calls[0]) == name.startswith("first")
    assert set(asked) - set(alone) == {f"first, {predict.MANY} calls", f"cached, {predict.MANY} calls"}
    monkeypatch.setattr(predict, "PROFILED", 1)
    found = predict.measure(tmp_path / "model", photo, TEXTS, 1, torch.get_num_threads())
    assert set(found.waits) == {*asked, *(f"{predict.FORWARD}{name}" for name in alone)}
    assert set(found.kernels) == set(alone)
    assert min(found.kernels.values()) > 0


def test_the_table_tells_what_was_asked_for() -> None:
    names = ("first, 1", "cached, 1", "first, 16", "cached, 16", "first, 16 calls", "cached, 16 calls")
    waits = dict(
        zip(names, [(8.0, 9.0), (2.0, 3.0), (12.0, 13.0), (6.0, 7.0), (120.0, 130.0), (24.0, 25.0)], strict=True)
    )
    waits |= {f"{predict.FORWARD}{name}": (1.5, 2.0) for name in names[:4]}
    report = Report("predict", {}, machine={})
    predict.report_system(report, "cris", predict.Found(waits, dict.fromkeys(names[:4], 1.0)))
    rows = {row.what: (row.value, row.ratio) for row in report.rows}
    assert rows["cris: first, 1, p50"] == (8.0, 8.0)
    assert rows["cris: first, 1, the forward pass alone, p50"] == (1.5, 1.5)
    assert rows["cris: first, 1, p95"] == (9.0, None)
    assert rows["cris: 1 expression, image encoded before"] == (4.0, 4.0 / 2.5)
    assert rows["cris: 16 in one call, first"] == (10.0, 2.0)
    assert rows["cris: 16 in one call, cached"] == (4.0, 0.8)

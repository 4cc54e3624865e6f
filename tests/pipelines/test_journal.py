"""Metrics that reach MLflow beside the training: none lost, none twice, and nothing held up by a server that is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowException

from pipelines import journal, tracking
from pipelines.journal import Journal


@pytest.fixture
def run_id(store: Path) -> str:
    return tracking.open_run("ris", "train-cris-shapes-000000000000", {}, {})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "AGAIN_AFTER", 0.05)
    monkeypatch.setattr(tracking, "AGAIN_AFTER", 0.05)


def steps(run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    history = tracking.connect().get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_everything_arrives(run_id: str) -> None:
    log = Journal(run_id)
    for step in range(20, 101, 20):
        log({"train/loss": 1 / step, "lr": 0.1}, step)
    log({"val/mIoU": 0.5, "val/Pr@0.5": 0.25}, 100)
    log.close()
    assert steps(run_id) == [(step, 1 / step) for step in range(20, 101, 20)]
    assert (steps(run_id, "val/mIoU"), steps(run_id, "val/Pr_0.5")) == ([(100, 0.5)], [(100, 0.25)])


def test_what_a_worker_says_again_after_an_interruption_is_logged_once(run_id: str) -> None:
    for seen in ((20, 40, 60), (20, 40, 60, 80)):
        log = Journal(run_id)
        for step in seen:
            log({"train/loss": 1 / step}, step)
        log.close()
    assert [step for step, _ in steps(run_id)] == [20, 40, 60, 80]


def test_a_server_that_is_away_holds_up_nobody_and_loses_nothing(
    run_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, asked = tracking.log_points, []

    def away(*arguments: object) -> None:
        asked.append(arguments)
        time.sleep(0.1)
        if len(asked) < 4:
            raise MlflowException("API request failed: connection refused")
        whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tracking, "log_points", away)
    log = Journal(run_id)
    began = time.monotonic()
    for step in range(1, 200):
        log({"train/loss": float(step)}, step)
    assert time.monotonic() - began < 0.1
    deadline = time.monotonic() + 20
    while len(steps(run_id)) < 199 and time.monotonic() < deadline:
        time.sleep(0.05)
    log.close()
    assert steps(run_id) == [(step, float(step)) for step in range(1, 200)]
    assert capsys.readouterr().err.count("metrics wait for the MLflow store, training goes on") == 1


def test_an_answer_that_was_lost_on_its_way_back_logs_nothing_twice(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failed = tracking.log_points, []

    def lost(*arguments: object) -> None:
        whole(*arguments)  # type: ignore[arg-type]
        if not failed:
            failed.append(True)
            raise MlflowException("timed out")

    monkeypatch.setattr(tracking, "log_points", lost)
    log = Journal(run_id)
    log({"train/loss": 1.0}, 20)
    log.close()
    assert failed
    assert steps(run_id) == [(20, 1.0)]


def test_a_worker_that_ends_does_not_wait_for_a_server_that_is_away(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_points", away)
        log = Journal(run_id)
        log({"train/loss": 1.0}, 20)
        began = time.monotonic()
        log.close()
        assert time.monotonic() - began < 5  # its driver logs what is missing, from the last checkpoint
    points = [{"step": 20, "train/loss": 1.0}, {"step": 40, "train/loss": 0.5}]
    for _ in range(2):
        tracking.log_points(run_id, points, tracking.logged(run_id))
    assert steps(run_id) == [(20, 1.0), (40, 0.5)]


def test_a_store_is_waited_for_aloud_and_not_for_ever(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [MlflowException("refused"), MlflowException("refused"), 7]

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, MlflowException):
            raise answer
        return answer

    assert tracking.patiently(ask) == 7
    assert capsys.readouterr().err.count("does not answer: waiting for it") == 1

    def away() -> None:
        raise MlflowException("refused")

    with pytest.raises(tracking.ClusterError, match=r"cannot be used: refused"):
        tracking.patiently(away, seconds=0.1)

    began = time.monotonic()  # that there is no such run is an answer
    with pytest.raises(MlflowException):
        tracking.patiently(lambda: tracking.connect().get_run("0" * 32))
    assert time.monotonic() - began < 5

"""Stages side by side: in DVC's order, no more than asked at a time, and what a failure leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import cluster, repro
from pipelines.repro import in_order, outdated, reproduce
from ris_core.errors import ConfigError

ROOT = Path(__file__).parents[2]
STAGES = {"data": [], "clip": ["data"], "shards": ["data"], "train": ["clip", "shards"], "report": ["train"]}


def test_a_stage_begins_after_those_it_waits_for_and_beside_the_others() -> None:
    together = threading.Barrier(2, timeout=30)  # breaks if the two are not at work at the same time
    done: list[str] = []

    def work(stage: str) -> bool:
        assert set(STAGES[stage]) <= set(done)
        if stage in ("clip", "shards"):
            together.wait()
        done.append(stage)
        return True

    assert in_order(STAGES, work, 2) == []
    assert sorted(done) == sorted(STAGES)


def test_no_more_stages_at_a_time_than_asked() -> None:
    alone = threading.Lock()

    def work(stage: str) -> bool:
        assert alone.acquire(blocking=False)
        try:
            return not threading.Event().wait(0.01)
        finally:
            alone.release()

    assert in_order(STAGES, work, 1) == []


def test_after_a_failure_nothing_begins_and_what_runs_ends() -> None:
    begun: list[str] = []
    ended: list[str] = []
    failed = threading.Event()

    def work(stage: str) -> bool:
        begun.append(stage)
        if stage == "clip":
            failed.set()
            return False
        if stage == "shards":
            failed.wait(30)
        ended.append(stage)
        return True

    assert in_order({**STAGES, "more": ["data"], "most": ["shards"]}, work, 2) == ["clip"]
    assert begun == ["data", "clip", "shards"]
    assert ended == ["data", "shards"]


def test_after_an_interruption_nothing_begins() -> None:
    begun: list[str] = []

    def work(stage: str) -> bool:
        begun.append(stage)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order({"a": [], "b": [], "c": []}, work, 1)
    assert begun == ["a"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages that each wait for the other's sign of life, and a third that adds their outputs."""
    wait = "touch {0}.here; for i in $(seq 300); do test -e {1}.here && break; sleep 0.1; done; test -e {1}.here"
    (tmp_path / "dvc.yaml").write_text(
        f"""
stages:
  a: {{cmd: "{wait.format("a", "b")} && cat in > a", deps: [in], outs: [a]}}
  b: {{cmd: "{wait.format("b", "a")} && cat in > b", deps: [in], outs: [b]}}
  c: {{cmd: "cat a b > c", deps: [a, b], outs: [c]}}
"""
    )
    (tmp_path / "in").write_text("1\n")
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")
    return tmp_path


def dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dvc_takes_stages_side_by_side_and_finds_them_up_to_date(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "other.dvc").write_text(
        "outs: [{path: other, md5: d41d8cd98f00b204e9800998ecf8427e, hash: md5, size: 0}]\n"
    )
    assert outdated() == {"a": [], "b": [], "c": ["a", "b"]}  # and not what lies beside dvc.yaml
    assert in_order(outdated(), lambda stage: reproduce(stage, 1, {"NAME": "x"}, set()), 2) == []
    assert (repository / "c").read_text() == "1\n1\n"
    assert "c | > cat a b > c" in capfd.readouterr().out
    assert outdated() == {}
    (repository / "a").unlink()
    assert outdated() == {"a": [], "c": ["a"]}


def test_a_stage_that_fails_says_why(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "in").unlink()
    assert not reproduce("a", 1, {}, set())
    assert "a | ERROR: failed to reproduce 'a'" in capfd.readouterr().out


def test_what_dvc_cannot_read_is_told_as_its_message(repository: Path) -> None:
    (repository / "dvc.yaml").write_text("stages: [")
    with pytest.raises(ConfigError, match=r"dvc stage list --name-only failed: './dvc\.yaml' is invalid"):
        outdated()


def test_a_stopped_run_takes_its_stages_with_it(repository: Path) -> None:
    """SIGTERM to the parent alone: the stage ends, DVC's lock is free, and another run goes on."""
    (repository / "dvc.yaml").write_text(
        "stages: {a: {cmd: 'echo $$ > pid; exec sleep 300', deps: [in], outs: [a]}, b: {cmd: 'touch b', outs: [b]}}"
    )
    code = (
        "from pipelines.repro import *\n"
        "with stopped_together() as children: in_order({'a': [], 'b': []}, lambda s: reproduce(s, 1, {}, children), 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        for _ in range(600):
            if (repository / "pid").exists() and (repository / "pid").read_text().strip():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((repository / "pid").read_text()), 0)
    assert not (repository / "b").exists()
    assert set(outdated()) == {"a", "b"}


@pytest.fixture
def resolving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage `resolve` that copies a line each of params.yaml to the files that two others depend on."""
    (tmp_path / "resolve.py").write_text(
        "import pathlib\n"
        "pathlib.Path('resolved').mkdir(exist_ok=True)\n"
        "for line in open('params.yaml'):\n"
        "    name, value = line.split(': ')\n"
        "    pathlib.Path('resolved', name).write_text(str(int(value)))\n"
        "open('runs', 'a').write('resolve ')\n"
    )
    (tmp_path / "dvc.yaml").write_text(
        f"""
stages:
  resolve:
    cmd: {sys.executable} resolve.py
    deps: [resolve.py]
    params: [params.yaml: ]
    outs: [resolved: {{cache: false, persist: true}}]
  a: {{cmd: "cp resolved/a out_a && printf 'a ' >> runs", deps: [resolved/a], outs: [out_a]}}
  b: {{cmd: "cp resolved/b out_b && printf 'b ' >> runs", deps: [resolved/b], outs: [out_b]}}
"""
    )
    (tmp_path / "params.yaml").write_text("a: 1\nb: 1\n")
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")

    @contextmanager
    def shared() -> Iterator[dict[str, str]]:
        yield {}

    monkeypatch.setattr(cluster, "shared", shared)
    monkeypatch.setattr(cluster, "total_cpus", lambda: 2)
    monkeypatch.setattr(cluster, "has_gpu", lambda wish: False)
    return tmp_path


def ran(place: Path) -> list[str]:
    """What ran since this was asked before."""
    log = place / "runs"
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def test_values_are_resolved_before_dvc_is_asked_what_has_changed(
    resolving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repro.main()
    first, *others = ran(resolving)
    assert (first, sorted(others)) == ("resolve", ["a", "b"])
    repro.main()
    assert capsys.readouterr().out.endswith("everything is up to date\n")
    assert ran(resolving) == []
    (resolving / "params.yaml").write_text("a: 1\nb: 2\n")
    repro.main()
    assert ran(resolving) == ["resolve", "b"]
    assert (resolving / "out_b").read_text() == "2"


def test_parameters_that_cannot_be_used_begin_nothing(
    resolving: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "shared", lambda: pytest.fail("Ray was asked for"))
    repro.resolve()
    assert ran(resolving) == ["resolve"]
    (resolving / "params.yaml").write_text("a: 2\nb: many\n")
    with pytest.raises(ConfigError, match=r"^the parameters cannot be used, for the reason above$"):
        repro.main()
    assert "invalid literal for int() with base 10: 'many" in capfd.readouterr().err
    assert ran(resolving) == []
    assert (resolving / "resolved" / "b").read_text() == "1"  # what was resolved last stays

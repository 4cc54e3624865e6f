"""`ris serve`: which models it means, where it listens, and how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pipelines_world import REPOSITORY, Workplace
from service_world import PICTURES, SEGMENT, asked, wait_ready

from pipelines import cli, serve, tracking
from ris_core.errors import ClusterError, ConfigError


def ris(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit code and stderr of `ris serve`, in this process."""
    monkeypatch.setattr(sys, "argv", ["ris", "serve", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.app()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(number: int, workplace: Workplace) -> None:
    workplace.link("model")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0"],
        cwd=workplace.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RIS_TOKEN": "open-sesame"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"listening at (http://127\.0\.0\.1:\d+)/", line)
        assert address, line
        with httpx.Client(base_url=address[1], headers={"Authorization": "Bearer open-sesame"}, timeout=60) as client:
            wait_ready(client)
            answer = client.post(SEGMENT, json=asked(PICTURES[0], "left"))
            assert answer.status_code == 200
            assert answer.json()["model"]["name"] == workplace.trained.name
            process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read() == f"{workplace.trained.name} is ready (from a folder)\n"
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_one_clear_error(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, shown = ris(monkeypatch, capsys, "--port", port)
    assert code == 1
    assert shown.startswith(f"error: --host 127.0.0.1 --port {port} cannot be listened at: Address already in use")
    code, shown = ris(monkeypatch, capsys, "--host", "nowhere.invalid")
    assert (code, "--host nowhere.invalid" in shown) == (1, True)


def test_who_listens_for_everybody_is_warned(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    ended: list[str] = []
    monkeypatch.setattr(serve, "_run", lambda server, listener: ended.append(listener.getsockname()[0]))
    for token, warned in (("", True), ("open-sesame", False)):
        if token:
            monkeypatch.setenv("RIS_TOKEN", token)
        code, shown = ris(monkeypatch, capsys, "--host", "0.0.0.0", "--port", "0")
        assert (code, "WARNING: everybody who reaches" in shown) == (0, warned)
    code, shown = ris(monkeypatch, capsys, "--port", "0")
    assert "WARNING" not in shown
    assert ended == ["0.0.0.0", "0.0.0.0", "127.0.0.1"]


@pytest.mark.parametrize("token", ["", " ", "two words", "tökén", "a\tb"])
def test_a_token_that_is_none(
    token: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    monkeypatch.setenv("RIS_TOKEN", token)
    code, shown = ris(monkeypatch, capsys)
    assert (code, "RIS_TOKEN is set, but is no token" in shown) == (1, True)
    assert "two words" not in shown


def test_mistakes_are_told_before_anything_starts(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ((), "models/cris-shapes holds no model"),
        (("nowhere",), "nowhere holds no model"),
        (("a b=nowhere",), "'a b' cannot name a model"),
        (("--queue", "0", "--timeout", "nan"), "the limits of the service are wrong (2 problems)"),
    ):
        code, shown = ris(monkeypatch, capsys, *arguments)
        assert (code, message in shown) == (1, True), shown
    workplace.link("model")
    code, shown = ris(monkeypatch, capsys, "models/cris-shapes", "models/cris-shapes")
    assert (code, "two models are named" in shown) == (1, True)


def test_a_model_that_does_not_load_ends_it(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    place = workplace.own(Path("models/cris-shapes"))
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, shown = ris(monkeypatch, capsys, "--port", "0")
    assert code == 1
    assert "error: models/cris-shapes/model.safetensors" in shown


def test_an_alias_means_the_version_that_has_it_now(store: Path, untrained: Path, tmp_path: Path) -> None:
    client = tracking.connect()
    client.create_registered_model("ris-cris-shapes")
    for number in ("1", "2"):
        source = tmp_path / number / "artifacts" / "model"
        shutil.copytree(untrained, source)
        client.create_model_version("ris-cris-shapes", str(tmp_path / number))
    client.set_registered_model_alias("ris-cris-shapes", "champion", "1")
    first = serve.find("models:/ris-cris-shapes@champion")
    client.set_registered_model_alias("ris-cris-shapes", "champion", "2")
    second = serve.find("best=models:/ris-cris-shapes@champion")
    assert (first.name, first.uri) == ("ris-cris-shapes", "models:/ris-cris-shapes/1")
    assert (second.name, second.uri) == ("best", "models:/ris-cris-shapes/2")
    assert (first.folder / "model.json").exists()
    assert first.folder != second.folder
    with pytest.raises(ClusterError, match="has no ris-cris-shapes@challenger; versions of ris-cris-shapes: 1, 2"):
        serve.find("models:/ris-cris-shapes@challenger")
    with pytest.raises(ConfigError, match="cannot name a model"):
        serve.find("=models:/ris-cris-shapes@champion")

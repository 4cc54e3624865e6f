"""What the tests of the stages share: working directories, and a tracking store that is migrated once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pipelines_world import REPOSITORY, Workplace, export_untrained, open_workplace

from pipelines import inputs, tracking

if TYPE_CHECKING:
    from tiny_world import Tiny

URI = "MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def tracking_uri_as_before() -> Iterator[None]:
    """Leave the environment of the next test alone: MLflow writes the store that it is told of into it."""
    before = os.environ.get(URI)
    yield
    if before is None:
        os.environ.pop(URI, None)
    else:
        os.environ[URI] = before


@pytest.fixture(scope="session")
def untrained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights. Tests must not change it."""
    folder = tmp_path_factory.mktemp("untrained") / "model"
    export_untrained(tiny, folder)
    return folder


@pytest.fixture
def workplace(tiny: Tiny, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """An empty directory with params.yaml, which is the working directory during the test."""
    place = open_workplace(tmp_path / "workplace", tiny, untrained)
    monkeypatch.chdir(place.root)
    return place


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that holds nothing yet. To make one takes seconds, to copy it none."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        tracking.connect()
    return database


@pytest.fixture
def store(migrated_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's own MLflow store, to which MLFLOW_TRACKING_URI points."""
    folder = tmp_path / "tracking"
    folder.mkdir()
    shutil.copy(migrated_store, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of this repository's code, of which fingerprints are taken during the test."""
    root = tmp_path / "sources"
    for package in ("ris_core", "pipelines"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(inputs, "ROOT", root)
    inputs.code.cache_clear()
    yield root
    inputs.code.cache_clear()

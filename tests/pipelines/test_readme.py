"""README.md's blocks do what they say: run as they are written, or, one by one, run by another test that is named."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines_world import REPOSITORY, Workplace, blocks_of

from pipelines import cli
from ris_core.data.text import SEVERAL

PREDICT = "ris predict data/raw/shapes/images/mscoco/images/train2014/COCO_train2014_000001100001.jpg"
# What is not run here, because it takes minutes, never ends, or is another program's.
ELSEWHERE = {
    "make repro": "tests/pipelines/test_repro.py",
    "make test": ".ci/run",
    ". .venv/bin/activate": "Makefile",
    "dvc metrics show": "dvc.yaml",
    "dvc exp run -S train.lr=5e-4": "tests/pipelines/test_dvc.py",
    "mlflow ui --backend-store-uri sqlite:///mlflow/mlflow.db": "tests/pipelines/test_tracking.py",
    "ris serve models/cris-shapes models/lts-shapes": "tests/pipelines/test_serve.py",
    "ris predict-batch photos/ --expressions list.txt --out answers": "tests/pipelines/test_predict_batch.py",
    "ris registry list": "tests/pipelines/test_registry_verbs.py",
}


def lines() -> list[str]:
    """Every command, without its comment."""
    found = [line for block in blocks_of("README.md", "bash") for line in block.splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in found if line.strip()]


def test_every_command_is_run_here_or_where_it_is_said() -> None:
    left = [line for line in lines() if not line.startswith(PREDICT)]
    assert [line.replace("'", "") for line in left] == list(ELSEWHERE)
    for line, place in ELSEWHERE.items():
        text = (REPOSITORY / place).read_text()
        assert any(word in text for word in line.split()[:2]), f"{place} does not know `{line}`"


def test_the_picture_is_there() -> None:
    (picture,) = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("![")]
    assert (REPOSITORY / picture.partition("](")[2].rstrip(")")).is_file()


@pytest.fixture
def street(workplace: Workplace) -> Workplace:
    """A workplace with a model, a photo of one's own, and the dataset's first photo of val by its name in the README."""
    workplace.link("model", "shards")
    photo = workplace.tiny.raw / workplace.tiny.records()[0].file_name
    shutil.copy(photo, workplace.root / "street.jpg")
    (command,) = [line for line in lines() if line.startswith(PREDICT)]
    place = Path(shlex.split(command)[2])
    place.parent.mkdir(parents=True)
    shutil.copy(photo, place)
    return workplace


def test_the_photo_is_answered(street: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [line for line in lines() if line.startswith(PREDICT)]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        cli.app()
    assert not ended.value.code
    assert min(Image.open("overlay.png").size) > 0


def test_ten_lines_predict(street: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (library, _) = blocks_of("README.md", "python")
    assert len([line for line in library.splitlines() if line]) <= 10
    names: dict[str, object] = {}
    exec(compile(library, "README.md", "exec"), names)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    height, width = np.asarray(Image.open("street.jpg")).shape[:2]
    assert all(line.startswith(f"({height}, {width}) ") for line in told)


def test_the_scores_are_those_of_the_results() -> None:
    """Of split val, mIoU, its interval and oIoU, to three digits."""
    text = (REPOSITORY / "README.md").read_text()
    titles = {"cris": "CRIS", "risclip": "RISCLIP", "lts": "LTS", "global_local": "Global-Local"}
    for system, title in titles.items():
        place = REPOSITORY / "results/evaluate" / f"{system}-shapes" / "metrics.json"
        part = json.loads(place.read_text())["ours"]["val"]
        low, high = part["mIoU_95"]
        assert f"| {title} val | **{part['mIoU']:.3f}** [{low:.3f}, {high:.3f}] | **{part['oIoU']:.3f}** |" in text
        assert SEVERAL not in part["by_kind"]

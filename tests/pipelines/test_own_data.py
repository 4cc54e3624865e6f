"""docs/own-data.md, executed as it is written, on photos made here."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines import params, stage
from ris_core.data.records import read_records
from ris_core.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
HOW_TO = (ROOT / "docs/own-data.md").read_text()


def block(kind: str, holding: str) -> str:
    found = [
        text for text in re.findall(rf"^```{kind}\n(.*?)^```", HOW_TO, re.DOTALL | re.MULTILINE) if holding in text
    ]
    assert len(found) == 1
    return str(found[0])


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose params.yaml names the dataset of the how-to, laid out as that says."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "data/raw/zoo"
    (place / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, 6):
        name = f"cage{number}.jpg"
        Image.new("RGB", (64, 48), (30 * number, 90, 60)).save(place / "images" / name)
        images.append({"id": number, "file_name": f"upload/{number}/{name}", "height": 48, "width": 64})
        for ann_id in (10 * number, 10 * number + 1):
            x = 4 + 30 * (ann_id % 2)
            outline = [x, 4, x + 20, 4, x + 20, 24, x, 24]
            annotations.append({"id": ann_id, "image_id": number, "category_id": 1, "segmentation": [outline]})
    tables = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "animal"}]}
    (place / "instances.json").write_text(json.dumps(tables))
    (place / "dataset.yaml").write_text(block("yaml", "expressions:"))
    (place / "expressions.csv").write_text(block("csv", "image,annotation,text"))
    datasets = block("yaml", "datasets:")
    text = re.sub(r"^datasets:.*\n", datasets, (ROOT / "params.yaml").read_text(), flags=re.MULTILINE)
    assert datasets in text
    (tmp_path / "params.yaml").write_text(text)
    return place


def test_the_how_to_works_as_it_is_written(zoo: Path) -> None:
    command = shlex.split(block("bash", "pipelines.prepare"))
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "data/records/zoo.parquet: 5 images\n"), done.stderr
    records = read_records("data/records/zoo.parquet")
    assert sum(len(ref.sentences) for record in records for ref in record.refs) == 7
    splits = [ref.split for record in records for ref in record.refs]
    assert {split: len(set(splits)) for split in splits} == dict.fromkeys(("train", "val", "test"), 3)
    audit = json.loads(Path("results/audit/zoo.json").read_text())
    assert audit["problems"] == {}


def test_a_name_without_a_description_is_told_where_that_belongs(zoo: Path) -> None:
    assert stage.check_names("zoo").splits == ("train", "val", "test")
    for path in ("../raw/zoo", "zoo/", "./zoo", ""):
        with pytest.raises(DataError, match="there is no dataset"):
            stage.check_names(path)
    (zoo / "dataset.yaml").unlink()
    with pytest.raises(DataError, match=r"there is no dataset 'zoo': .*dataset\.yaml in its folder, data/raw/<name>"):
        stage.check_names("zoo")
    with pytest.raises(ConfigError, match="datasets: there is no dataset 'zoo'"):
        params.load_params()

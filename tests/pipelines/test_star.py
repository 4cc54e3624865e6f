"""`shapes*` on the whole road: drawn, prepared, and learned, scored, registered and shown by all four systems."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pipelines_world import Workplace

from pipelines import (
    compare,
    evaluate,
    initialise,
    paths,
    prepare,
    preprocess,
    propose,
    register,
    report,
    synthesize,
    tracking,
    train,
    versions,
)
from ris_core.data.dataset import ShardStore
from ris_core.data.text import NONE, SEVERAL
from ris_core.predictor import RISPredictor

STAR = "shapes*"
SYSTEMS = ["cris", "risclip", "lts", "global_local"]
SPLITS = ["val", "testA", "testB"]


@pytest.mark.ray
def test_all_four_systems_walk_the_road(workplace: Workplace, store: Path, ray_session: None) -> None:
    workplace.link("clip", "clip_vit")
    workplace.change(
        systems=SYSTEMS,
        datasets=[STAR],
        synthetic_datasets=[STAR],
        train={"epochs": 1},
        synthesize={"refs_per_image": 5},
    )
    for stage in (synthesize, prepare, preprocess, propose):
        stage.main(STAR)
    audit = json.loads(paths.audit(STAR).read_text())
    assert audit["problems"] == {}
    assert audit["refs"]["bad"] == 0
    assert audit["refs"]["no_target"] > 20
    assert audit["refs"]["several_targets"] > 60
    assert ShardStore(paths.shards(STAR)).is_generalised
    for system in SYSTEMS:
        for stage in (initialise, train, evaluate, register):
            stage.main(system, STAR)
        check_scores(system)
        check_registered(system)
    compare.main(STAR)
    compared = json.loads((paths.comparison(STAR) / "comparison.json").read_text())
    assert compared["protocol"] == "grefcoco"
    assert len(compared["splits"]["val"]["pairs"]) == 6
    report.main()
    page = (paths.REPORT / "index.html").read_text()
    assert "<h3>shapes*, protocol “grefcoco”</h3>" in page
    assert "<th>N-acc</th><th>T-acc</th>" in page
    assert "cris-shapes%2A/gallery/" in page


def check_scores(system: str) -> None:
    out = paths.evaluation(system, STAR)
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["grefcoco", "ours"]  # the first decides
    for split in SPLITS:
        part = metrics["grefcoco"][split]
        assert 0 <= part["mIoU"] <= 1
        assert 0 < part["no_target"] == part["by_kind"][NONE]["count"] < part["by_kind"][SEVERAL]["count"]
        assert part["by_kind"][NONE]["mIoU"] == part["N_acc"]  # an IoU of 1 for each empty answer, else 0
        assert sum(part["by_size"][size]["count"] for size in ("small", "medium", "large")) == (
            part["expressions"] - part["no_target"]
        )
        assert metrics["ours"][split]["by_kind"][NONE]["mIoU"] == 0
        assert "N_acc" not in metrics["ours"][split]
    if system == "global_local":
        assert (metrics["grefcoco"]["val"]["N_acc"], metrics["grefcoco"]["val"]["T_acc"]) == (0.0, 1.0)
    else:
        history = (paths.training(system, STAR) / "history.csv").read_text().splitlines()
        assert len(history) == 2
    behaved = json.loads((out / "behaviour.json").read_text())
    assert behaved["mirror"]["cases"] + behaved["mirror"]["cases_plain"] > 0
    table = pq.read_table(paths.expressions(system, STAR) / "grefcoco-val.parquet")
    assert {SEVERAL, NONE} < set(table["kind"].to_pylist())
    RISPredictor.from_folder(paths.model(system, STAR))


def check_registered(system: str) -> None:
    name = f"ris-{system}-shapesstar"
    told = json.loads(paths.registration(system, STAR).read_text())
    assert (told["model"], told["protocol"]) == (name, "grefcoco")
    assert told["decision"].startswith("champion: ")
    (version,) = versions.known(tracking.connect(), name)
    assert version.tags["protocol"] == "grefcoco"
    assert "Of expressions that refer to nothing" in version.description

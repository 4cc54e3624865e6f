"""A run without orchestration: in one process, and under torchrun with two that share one batch and one validation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny_world import DATASET, IMAGE_SIZE, Tiny

from ris_core.errors import ConfigError, DataError
from ris_core.evaluation.evaluator import evaluate, queries_of
from ris_core.evaluation.metrics import PROTOCOLS, scores
from ris_core.models.systems import load_model
from ris_core.training import checkpoint as checkpoints
from ris_core.training import run
from ris_core.training.run import make_trainer, make_validation
from ris_core.training.runtime import LocalRuntime

ROOT = Path(__file__).parents[3]


def arguments(tiny: Tiny, out: Path) -> list[str]:
    paths = {"params": tiny.params_file, "shards": tiny.shards, "clip": tiny.clip, "out": out, "device": "cpu"}
    return [part for name, value in paths.items() for part in (f"--{name}", str(value))]


def whole_validation(tiny: Tiny, model: torch.nn.Module) -> dict[str, float]:
    """Scores of the validation split, all at once and in this process."""
    store, protocol = tiny.store(), PROTOCOLS["ours"]
    table = evaluate(model, store, queries_of(store, "val", protocol), protocol, word_len=12, split="val")
    return scores(table["intersection"].to_numpy(), table["union"].to_numpy())


def test_one_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *arguments(tiny, tmp_path)])
    run.main()
    model, info = load_model(tmp_path / "model")
    assert info == {"word_len": 12, "image_size": IMAGE_SIZE, "resample": "opencv4", "system": "cris"}
    position = checkpoints.load(tmp_path / "checkpoint").position
    assert position.epoch == 2
    score = whole_validation(tiny, model)
    best = position.history[position.best_epoch - 1]
    assert (best["val/mIoU"], best["val/oIoU"]) == (pytest.approx(score["mIoU"]), pytest.approx(score["oIoU"]))
    printed = f"{tmp_path}/model: best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}\n"
    assert capsys.readouterr().out == printed


def test_two_processes_under_torchrun(tiny: Tiny, tmp_path: Path) -> None:
    """They finish, and their sums count each validation image once: the score is that of one process over all."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "ris_core.training.run", *arguments(tiny, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    position = checkpoints.load(tmp_path / "checkpoint").position
    assert [row["epoch"] for row in position.history] == [1, 2]
    assert done.stderr.count("epoch 2/2") == 1, "one process speaks"
    model, _ = load_model(tmp_path / "model")
    score = whole_validation(tiny, model)
    best = position.history[position.best_epoch - 1]
    assert (best["val/mIoU"], best["val/oIoU"]) == (pytest.approx(score["mIoU"]), pytest.approx(score["oIoU"]))


class Rank(LocalRuntime):
    """One of several processes, as far as sharing out the images is concerned."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.device = rank, world, torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 4, 9])
@pytest.mark.parametrize("limit", [None, 4])
def test_every_validation_image_is_on_exactly_one_rank(
    world: int, limit: int | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, store = tiny.params(), tiny.store()
    params.train.validate_images = limit
    asked: list[int] = []

    def counted(model: object, store: object, queries: list, *_: object, **__: object) -> pa.Table:
        asked.extend(query.sent_id for query in queries)
        return pa.table({"intersection": pa.array([1] * len(queries)), "union": pa.array([4] * len(queries))})

    monkeypatch.setattr(run, "evaluate", counted)
    monkeypatch.setattr(run, "sum_over_ranks", lambda values: torch.ones(4))
    for rank in range(world):
        make_validation(store, params, Rank(rank, world))(torch.nn.Identity())
    images = store.images_of("val")[:limit]
    expected = [query.sent_id for query in queries_of(store, "val", PROTOCOLS["ours"], images.tolist())]
    assert sorted(asked) == sorted(expected)
    assert len(set(asked)) == len(asked)


def test_validation_follows_its_protocol(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    params, store = tiny.params(), tiny.store()
    params.train.validate_protocol = "cris_val"
    counts = []

    def counted(model: object, store: object, queries: list, protocol: object, **_: object) -> pa.Table:
        counts.append((len(queries), protocol))
        return pa.table({"intersection": [1, 3], "union": [4, 4]})

    monkeypatch.setattr(run, "evaluate", counted)
    found = make_validation(store, params, Rank(0, 1))(torch.nn.Identity())
    assert found == {"val/mIoU": 0.5, "val/oIoU": 0.5}
    assert counts == [(store.manifest["splits"]["val"]["refs"], PROTOCOLS["cris_val"])]


def test_new_layers_depend_on_the_seed_alone(tiny: Tiny, tmp_path: Path) -> None:
    made = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        params = tiny.params()
        params.train = replace(params.train, seed=seed)
        trainer = make_trainer(params, "cris", tiny.shards, tiny.clip, LocalRuntime(tmp_path, "cpu"))
        made.append(trainer.model.state_dict()["proj.txt.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_wrong_wishes_are_named(tiny: Tiny, tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path, "cpu")
    params = tiny.params()
    params.train.validate_split = "test"
    with pytest.raises(DataError, match=f"{DATASET} has no split 'test'; it has testA, testB, train, val"):
        make_trainer(params, "cris", tiny.shards, tiny.clip, runtime)
    narrow = tiny.params()
    object.__setattr__(narrow.cris, "vis_dim", 64)
    with pytest.raises(ConfigError, match="vis_dim is 64, but the CLIP's text is 32 wide"):
        make_trainer(narrow, "cris", tiny.shards, tiny.clip, runtime)

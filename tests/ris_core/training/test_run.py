"""A run without orchestration: in one process, and under torchrun with two that share one batch and one validation.

RISCLIP is trained in two stages; each starts from what the one before left, and resumes as any other.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tiny_world import DATASET, IMAGE_SIZE, Tiny

from ris_core.config import Params
from ris_core.errors import ConfigError, DataError, WeightsError
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS, scores
from ris_core.evaluation.queries import queries_of
from ris_core.models.clip import load_saved_clip
from ris_core.models.systems import build_model, export_model, load_model
from ris_core.training import checkpoint as checkpoints
from ris_core.training import run
from ris_core.training.checkpoint import Checkpoint
from ris_core.training.loop import Trainer
from ris_core.training.run import (
    check_start,
    first_stage_trainer,
    initial_model,
    make_trainer,
    make_validation,
    trainer_from,
)
from ris_core.training.runtime import LocalRuntime

ROOT = Path(__file__).parents[3]


def arguments(tiny: Tiny, out: Path, system: str = "cris") -> list[str]:
    clip = {"cris": tiny.clip, "risclip": tiny.clip_vit}[system]
    paths = {"system": system, "params": tiny.params_file, "shards": tiny.shards, "clip": clip, "out": out}
    paths["device"] = "cpu"
    return [part for name, value in paths.items() for part in (f"--{name}", str(value))]


def whole_validation(tiny: Tiny, model: torch.nn.Module) -> dict[str, float]:
    """Scores of the validation split, all at once and in this process."""
    store, protocol = tiny.store(), PROTOCOLS["ours"]
    table = evaluate(MapAnswers(model, 12), store, queries_of(store, "val", protocol), protocol, split="val")
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


@pytest.mark.parametrize("system", ["cris", "risclip"])
def test_two_processes_under_torchrun(system: str, tiny: Tiny, tmp_path: Path) -> None:
    """They finish, and their sums count each validation image once: the score is that of one process over all."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "ris_core.training.run", *arguments(tiny, tmp_path, system)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    position = checkpoints.load(tmp_path / "checkpoint").position
    assert [row["epoch"] for row in position.history] == [1, 2]
    assert done.stderr.count("epoch 2/2") == (1 if system == "cris" else 2), "one process speaks, in each stage"
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
    params.cris.train.validate_images = limit
    asked: list[int] = []

    def counted(answer: object, store: object, queries: list, *_: object, **__: object) -> pa.Table:
        asked.extend(query.sent_id for query in queries)
        return pa.table({"intersection": pa.array([1] * len(queries)), "union": pa.array([4] * len(queries))})

    monkeypatch.setattr(run, "evaluate", counted)
    monkeypatch.setattr(run, "sum_over_ranks", lambda values: torch.ones(4))
    for rank in range(world):
        make_validation(store, params.cris.train, Rank(rank, world))(torch.nn.Identity())
    images = store.images_of("val")[:limit]
    expected = [query.sent_id for query in queries_of(store, "val", PROTOCOLS["ours"], images.tolist())]
    assert sorted(asked) == sorted(expected)
    assert len(set(asked)) == len(asked)


def test_validation_follows_its_protocol(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    params, store = tiny.params(), tiny.store()
    params.cris.train.validate_protocol = "cris_val"
    counts = []

    def counted(answer: MapAnswers, store: object, queries: list, protocol: object, **_: object) -> pa.Table:
        counts.append((len(queries), protocol, answer.word_len))
        return pa.table({"intersection": [1, 3], "union": [4, 4]})

    monkeypatch.setattr(run, "evaluate", counted)
    found = make_validation(store, params.cris.train, Rank(0, 1))(torch.nn.Identity())
    assert found == {"val/mIoU": 0.5, "val/oIoU": 0.5}
    assert counts == [(store.manifest["splits"]["val"]["refs"], PROTOCOLS["cris_val"], 12)]


def test_new_layers_depend_on_the_seed_alone(tiny: Tiny) -> None:
    made = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        params = tiny.params()
        params.train = replace(params.train, seed=seed)
        made.append(initial_model(params, "cris", tiny.clip, None)["proj.txt.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_wrong_wishes_are_named(tiny: Tiny, tmp_path: Path) -> None:
    runtime, store = LocalRuntime(tmp_path, "cpu"), tiny.store()
    params = tiny.params()
    model = build_model("cris", params.cris.model, load_saved_clip(tiny.clip))
    with pytest.raises(DataError, match=f"{DATASET} has no split 'test'; it has testA, testB, train, val"):
        make_trainer(model, replace(params.cris.train, validate_split="test"), store, runtime)
    with pytest.raises(ConfigError, match=r"train\.word_len is 33, but the model's CLIP reads at most 32 tokens"):
        make_trainer(model, replace(params.cris.train, word_len=33), store, runtime)
    object.__setattr__(params.cris.model, "vis_dim", 64)
    with pytest.raises(ConfigError, match="vis_dim is 64, but the CLIP's text is 32 wide"):
        initial_model(params, "cris", tiny.clip, None)


# Two stages


def start_folder(tiny: Tiny, folder: Path, system: str, first: dict[str, torch.Tensor] | None, **other: Any) -> Path:
    """What a training starts from; `other` are dimensions that differ from the parameters."""
    params = tiny.params()
    section = getattr(params, system)
    section.model = replace(section.model, **other)
    clip = {"rn": tiny.clip, "vit": tiny.clip_vit}[section.clip]
    info = {"word_len": section.train.word_len, "image_size": IMAGE_SIZE, "resample": "opencv4"}
    export_model(folder, system, initial_model(params, system, clip, first), section.model, clip, info)
    return folder


def stage(tiny: Tiny, number: int, start: Path, runtime: LocalRuntime, **train: Any) -> Trainer:
    """The trainer of RISCLIP's first or second stage."""
    params = tiny.params()
    name = ("initialise", "train")[number - 1]
    setattr(params.risclip, name, replace(getattr(params.risclip, name), **train))
    make = (first_stage_trainer, trainer_from)[number - 1]
    return make(params, "risclip", tiny.shards, start, runtime)


@dataclass(frozen=True)
class TwoStages:
    """Final checkpoints of both stages, and the folder in between."""

    first: Checkpoint
    start: Path
    second: Checkpoint


@pytest.fixture(scope="module")
def two_stages(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TwoStages:
    folder = tmp_path_factory.mktemp("two_stages")
    first = stage(tiny, 1, tiny.clip_vit, LocalRuntime(folder / "first", "cpu"))
    first.fit()
    start = start_folder(tiny, folder / "start", "risclip", first.best)
    second = stage(tiny, 2, start, LocalRuntime(folder / "second", "cpu"))
    second.fit()
    return TwoStages(final(first), start, final(second))


def final(trainer: Trainer) -> Checkpoint:
    made = trainer.checkpoint()
    assert made is not None
    return made


def part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() != set()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def test_the_second_stage_trains_the_decoder_and_keeps_the_locator(two_stages: TwoStages, tiny: Tiny) -> None:
    first, second = two_stages.first.best, two_stages.second.best
    assert first is not None
    assert second is not None
    started = load_model(two_stages.start)[0].state_dict()
    assert same(part(started, "locator"), first)
    assert same(part(second, "locator"), first)
    assert same(part(two_stages.second.model, "locator"), first), "nor did the weights beside the average move"
    decoder, before = part(second, "decoder"), part(started, "decoder")
    assert {"head.weight", "head.bias"} <= differing(decoder, before)
    assert {key.split(".")[0] for key in second} == {"locator", "decoder"}
    fresh = part(initial_model(tiny.params(), "risclip", tiny.clip_vit, None), "locator")
    assert same(
        part(started, "decoder"), part(initial_model(tiny.params(), "risclip", tiny.clip_vit, first), "decoder")
    )
    assert {"logit_bias", "logit_scale", "cfe.0.image_out.1.weight"} <= differing(first, fresh), "stage 1 trained it"


def test_both_stages_leave_clip_as_it_was(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    before = load_saved_clip(tiny.clip_vit).state_dict()
    for number, start in ((1, tiny.clip_vit), (2, two_stages.start)):
        trainer = stage(tiny, number, start, LocalRuntime(tmp_path / str(number), "cpu"), epochs=1)
        trainer.fit()
        locator: Any = trainer.model if number == 1 else trainer.model.locator
        assert same(locator.clip.clip.state_dict(), before)
        assert trainer.average is not None
        average: Any = trainer.average.module if number == 1 else trainer.average.module.locator
        assert average.clip.clip.visual.proj.data_ptr() == locator.clip.clip.visual.proj.data_ptr(), "held once"


def test_each_stage_has_its_own_settings(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    runtimes = [LocalRuntime(tmp_path / name, "cpu") for name in ("first", "second")]
    first = stage(tiny, 1, tiny.clip_vit, runtimes[0])
    second = stage(tiny, 2, two_stages.start, runtimes[1])
    assert (first.params.lr, second.params.lr) == (5e-3, 1e-3)
    assert {row["epoch"] for row in two_stages.first.position.history} == {1, 2}
    assert first.batches.stride == second.batches.stride == 8
    trained = {id(parameter) for parameter in second.trained}
    decoder: Any = second.model
    assert trained == {id(parameter) for parameter in decoder.decoder.parameters()}


class Crash(Exception):
    """The process dies here."""


class Crashing(LocalRuntime):
    """Dies after the n-th checkpoint is in place."""

    def __init__(self, folder: Path, after: int):
        super().__init__(folder, "cpu")
        self.left = after

    def report(self, metrics: dict[str, float], checkpoint: Checkpoint | None) -> None:
        super().report(metrics, checkpoint)
        self.left -= 1
        if not self.left:
            raise Crash


@pytest.mark.parametrize("number", [1, 2])
def test_both_stages_resume_to_the_weights_of_an_undisturbed_run(
    number: int, tiny: Tiny, two_stages: TwoStages, tmp_path: Path
) -> None:
    start, expected = (tiny.clip_vit, two_stages.first) if number == 1 else (two_stages.start, two_stages.second)
    with pytest.raises(Crash):  # after the second step of the second epoch
        stage(tiny, number, start, Crashing(tmp_path, after=3), checkpoint_every_steps=2).fit()
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = stage(tiny, number, start, LocalRuntime(tmp_path, "cpu"), checkpoint_every_steps=2)
    assert (resumed.position.epoch, resumed.position.step) == (1, 2)
    resumed.fit()
    found = final(resumed)
    assert same(found.model, expected.model)
    assert found.best is not None
    assert expected.best is not None
    assert same(found.best, expected.best)
    assert found.position == expected.position
    assert not [name for name in found.model if "clip" in name]  # checkpoints are small


def test_risclip_from_a_clip_to_a_model_in_one_process(
    tiny: Tiny, two_stages: TwoStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *arguments(tiny, tmp_path, "risclip")])
    run.main()
    model, info = load_model(tmp_path / "model")
    assert info == {"word_len": 12, "image_size": IMAGE_SIZE, "resample": "opencv4", "system": "risclip"}
    assert two_stages.second.best is not None
    assert same(dict(model.state_dict()), two_stages.second.best)
    position = checkpoints.load(tmp_path / "checkpoint").position
    score = whole_validation(tiny, model)
    assert position.history[position.best_epoch - 1]["val/mIoU"] == pytest.approx(score["mIoU"])
    assert len(checkpoints.load(tmp_path / "first_stage/checkpoint").position.history) == 2


def test_a_two_stage_system_without_its_first_starts_from_clip_itself(tiny: Tiny, tmp_path: Path) -> None:
    start = start_folder(tiny, tmp_path / "start", "risclip", None)
    trainer = stage(tiny, 2, start, LocalRuntime(tmp_path, "cpu"), epochs=1)
    trainer.fit()
    assert trainer.best is not None
    assert same(part(trainer.best, "locator"), part(load_model(start)[0].state_dict(), "locator"))


def test_a_first_stage_of_other_dimensions_is_refused(tiny: Tiny, two_stages: TwoStages) -> None:
    params: Params = tiny.params()
    params.risclip.model = replace(params.risclip.model, cfe_dim=32)
    with pytest.raises(WeightsError, match="The first stage does not fit this RISCLIP") as caught:
        initial_model(params, "risclip", tiny.clip_vit, two_stages.first.best)
    assert "shape of cfe.0.image_in.1.weight: [16, 32] in the weights, [32, 32] in the model" in str(caught.value)


def test_a_start_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="nowhere holds no model to start from: run the stage initialise for it first"
    ):
        check_start(tmp_path / "nowhere", "cris", tiny.params().cris.model)


def test_a_start_of_another_system(tiny: Tiny, two_stages: TwoStages) -> None:
    with pytest.raises(ConfigError, match="start holds a risclip, not the cris to be trained"):
        check_start(two_stages.start, "cris", tiny.params().cris.model)


def test_a_start_of_other_dimensions_names_every_difference(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    wanted = tiny.params().risclip.model
    check_start(two_stages.start, "risclip", wanted)  # also where JSON made lists of tuples
    other = replace(wanted, ske_blocks=2, decoder_channels=(16,), adapters="none")
    with pytest.raises(ConfigError) as caught:
        check_start(two_stages.start, "risclip", other)
    assert str(caught.value).splitlines() == [
        f"{two_stages.start} is another risclip (3 problems):",
        f"  - adapters is 'late' in {two_stages.start}, 'none' in the parameters",
        f"  - ske_blocks is 1 in {two_stages.start}, 2 in the parameters",
        f"  - decoder_channels is [8] in {two_stages.start}, [16] in the parameters",
        "Run the stage initialise again, or change back.",
    ]
    start = start_folder(tiny, tmp_path / "cris", "cris", None, ffn_dim=48)
    with pytest.raises(ConfigError, match=r"ffn_dim is 48 in .*/cris, 32 in the parameters"):
        trainer_from(tiny.params(), "cris", tiny.shards, start, LocalRuntime(tmp_path, "cpu"))

"""A run without orchestration: in one process, and under torchrun with two that share one batch and one validation.

RISCLIP is trained in two stages; each starts from what the one before left, and resumes as any other.
"""

from __future__ import annotations

import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from tiny_world import ARCHITECTURE, DATASET, IMAGE_SIZE, Tiny

from ris_core import train
from ris_core.data.dataset import ShardStore
from ris_core.data.records import Sentence
from ris_core.data.shards import ShardOptions, write_manifest, write_shard
from ris_core.errors import ClusterError, ConfigError, DataError, WeightsError
from ris_core.evaluation.answers import MapAnswers
from ris_core.evaluation.evaluator import evaluate
from ris_core.evaluation.metrics import PROTOCOLS, scores
from ris_core.evaluation.queries import queries_of
from ris_core.files import file_sha256
from ris_core.models.clip import load_saved_clip, save_clip
from ris_core.models.contract import MapSystem, System
from ris_core.models.registry import WEIGHTS, Description, ModelInfo, build_model, export_model, load_model
from ris_core.storage import Storage
from ris_core.training import run
from ris_core.training.checkpoint import Checkpoint, Checkpoints
from ris_core.training.loop import Trainer
from ris_core.training.params import SystemSection, TrainParams
from ris_core.training.run import (
    check_start,
    first_stage_model,
    initial_model,
    make_trainer,
    make_validation,
    starting_model,
)
from ris_core.training.runtime import LocalRuntime

ROOT = Path(__file__).parents[3]


def arguments(tiny: Tiny, out: Path, system: str = "cris") -> list[str]:
    clip = tiny.clip_vit if system == "risclip" else tiny.clip
    paths = {"system": system, "params": tiny.params_file, "shards": tiny.shards, "clip": clip, "out": out}
    paths["device"] = "cpu"
    return [part for name, value in paths.items() for part in (f"--{name}", str(value))]


def plain(folder: Path) -> LocalRuntime:
    """One process with its checkpoints in a folder."""
    return LocalRuntime(Checkpoints(Storage(folder)), "cpu")


def trained(out: Path, stage: str = "train") -> Checkpoint:
    """The newest checkpoint of the only training of a stage that the plain runner did in a folder."""
    (place,) = (out / "checkpoints").glob(f"{stage}-*")
    found = Checkpoints(Storage(place)).load()
    assert found is not None
    return found


def section_of(tiny: Tiny, system: str) -> SystemSection:
    """A section of the small world's parameters, to be changed as a test likes."""
    return tiny.params().of(system)


def cris_training(tiny: Tiny, **changed: Any) -> TrainParams:
    """How CRIS is trained, but for what is `changed`."""
    params = section_of(tiny, "cris").train
    assert params is not None
    return replace(params, **changed)


def cris_model(tiny: Tiny) -> MapSystem:
    """A CRIS that has not been trained."""
    model = build_model("cris", section_of(tiny, "cris").model, load_saved_clip(tiny.clip))
    assert isinstance(model, MapSystem)
    return model


def whole_validation(tiny: Tiny, model: System) -> dict[str, float]:
    """Scores of the validation split, all at once and in this process."""
    assert isinstance(model, MapSystem)
    store, protocol = tiny.store(), PROTOCOLS["ours"]
    table = evaluate(MapAnswers(model, 12), store, queries_of(store, "val", protocol), protocol, split="val")
    return scores(table["intersection"].to_numpy(), table["union"].to_numpy())


def test_one_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path)])
    train.main()
    model, described = load_model(tmp_path / "model")
    info, digest = ModelInfo(IMAGE_SIZE, "opencv4", word_len=12), file_sha256(tmp_path / "model" / WEIGHTS)
    assert described == Description("cris", section_of(tiny, "cris").model, info, digest)
    position = trained(tmp_path).position
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
    command = [*launch, "-m", "ris_core.train", *arguments(tiny, tmp_path, system)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    position = trained(tmp_path).position
    assert [row["epoch"] for row in position.history] == [1, 2]
    assert done.stderr.count("epoch 2/2") == (1 if system == "cris" else 2), "one process speaks, in each stage"
    model, _ = load_model(tmp_path / "model")
    score = whole_validation(tiny, model)
    best = position.history[position.best_epoch - 1]
    assert (best["val/mIoU"], best["val/oIoU"]) == (pytest.approx(score["mIoU"]), pytest.approx(score["oIoU"]))


# The command, called again


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, out: Path, **other: Path
) -> tuple[bytes, str, str]:
    """Run the command; the weights that it leaves, and what it says on stdout and stderr."""
    given = [part for name, value in other.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, out), *given])
    capsys.readouterr()
    train.main()
    return (out / "model" / WEIGHTS).read_bytes(), *capsys.readouterr()


def changed_params(tiny: Tiny, place: Path, **train: object) -> Path:
    """A params.yaml in which these options of the training are others."""
    lines = "".join(f"  {name}: {value}\n" for name, value in train.items())
    text = tiny.params_file.read_text()
    for name in train:
        assert f"\n  {name}: " not in text.partition("\ntrain:\n")[2].partition("\ncris:\n")[0]
    place.write_text(text.replace("\ntrain:\n", f"\ntrain:\n{lines}"))
    return place


def other_shards(tiny: Tiny, folder: Path) -> Path:
    """The same data with one image less to train on."""
    records = tiny.records()
    left_out = next(record for record in records if {ref.split for ref in record.refs} == {"train"})
    folder.mkdir()
    options = ShardOptions(IMAGE_SIZE)
    kept = [record for record in records if record is not left_out]
    write_manifest(folder, DATASET, options, [write_shard(folder / "part-00000.arrow", kept, tiny.raw, options)])
    return folder


def other_clip(tiny: Tiny, folder: Path) -> Path:
    clip = load_saved_clip(tiny.clip)
    with torch.no_grad():
        clip.ln_final.weight *= 1.01
    save_clip(clip, folder, ARCHITECTURE, {})
    return folder


def test_called_again_it_trains_nothing_and_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, said, _ = call(monkeypatch, capsys, tiny, tmp_path)
    (name,) = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    faster = changed_params(tiny, tmp_path / "faster.yaml", loader_workers=1, checkpoint_every_steps=1)
    for other in ({}, {"params": faster}):  # what decides no result makes no other training
        again, said_again, told = call(monkeypatch, capsys, tiny, tmp_path, **other)
        assert (again, said_again) == (weights, said)
        assert f"{name} was trained to its end before: nothing is left to do\n" in told
        assert "train/loss" not in told
    (tmp_path / "model" / WEIGHTS).unlink()
    assert call(monkeypatch, capsys, tiny, tmp_path)[:2] == (weights, said), "the model is made of the checkpoint"


@pytest.mark.parametrize("what", ["options", "seed", "seed of new layers", "data", "clip", "code"])
def test_with_other_inputs_the_same_folder_holds_another_training(
    what: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins afresh, the new model is the one reported, and the first one is still known."""
    weights, said, told = call(monkeypatch, capsys, tiny, tmp_path / "out")
    assert told.count("epoch 1/2") == 1
    other: dict[str, Path] = {}
    with monkeypatch.context() as patched:
        if what == "options" or what.startswith("seed"):
            options = {"clip_grad_norm": 0.1} if what == "options" else {"seed": 3}
            params = changed_params(tiny, tmp_path / "other.yaml", **options)
            if what == "seed of new layers":  # and the training keeps its own
                params.write_text(params.read_text().replace("\ncris:\n", "\ncris:\n  train: {seed: 0}\n"))
            other = {"params": params}
        elif what == "data":
            other = {"shards": other_shards(tiny, tmp_path / "shards")}
        elif what == "clip":
            other = {"clip": other_clip(tiny, tmp_path / "clip")}
        else:
            patched.setattr(train, "library_digest", lambda: "of other code")
        others, said_then, told = call(patched, capsys, tiny, tmp_path / "out", **other)
    assert "resuming" not in told
    assert "nothing is left to do" not in told
    assert told.count("epoch 1/2") == told.count("epoch 2/2") == 1
    position = max(trained_all(tmp_path / "out"), key=lambda found: found[0])[1].position
    assert said_then.endswith(f"best epoch {position.best_epoch}, val mIoU {position.best_score:.3f}\n")
    assert (others == weights) == (what == "code"), "other code did the same here"
    assert call(monkeypatch, capsys, tiny, tmp_path / "out")[:2] == (weights, said)


def trained_all(out: Path) -> list[tuple[float, Checkpoint]]:
    """The newest checkpoints of all trainings in a folder, each with the time at which it was made."""
    found = []
    for place in (out / "checkpoints").iterdir():
        checkpoint = Checkpoints(Storage(place)).load()
        assert checkpoint is not None
        found.append((max(path.stat().st_mtime_ns for path in place.rglob("state.json")), checkpoint))
    return found


@pytest.mark.parametrize("system", ["cris", "risclip"])
def test_killed_and_called_again_it_leaves_the_same_model(
    system: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"params": changed_params(tiny, tmp_path / "often.yaml", checkpoint_every_steps=1)}
    given = [*arguments(tiny, tmp_path / "killed", system), "--params", str(often["params"])]
    process = subprocess.Popen([sys.executable, "-m", "ris_core.train", *given], cwd=ROOT, stderr=subprocess.PIPE)
    for _ in range(6000):
        if process.poll() is not None or any((tmp_path / "killed/checkpoints").glob("*/*/state.json")):
            break
        time.sleep(0.01)
    process.kill()
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told.decode()
    monkeypatch.setattr(sys, "argv", ["train", *given])
    train.main()
    assert "resuming at epoch" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path / "undisturbed", system)])
    train.main()
    models = [(tmp_path / out / "model" / WEIGHTS).read_bytes() for out in ("killed", "undisturbed")]
    assert models[0] == models[1]


def test_damaged_shards_are_found_before_anything_is_trained(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.shards, tmp_path / "shards")
    shard = tmp_path / "shards/part-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    given = [*arguments(tiny, tmp_path / "out"), "--shards", str(tmp_path / "shards")]
    monkeypatch.setattr(sys, "argv", ["train", *given])
    with pytest.raises(DataError, match=r"part-00001\.arrow"):
        train.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:'ris_core.train' found in sys.modules")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"system": "global_local"}, "global_local is zero-shot: there is nothing to train"),
        (
            {"shards": "nowhere"},
            "nowhere/manifest.json does not exist: run the preprocess stage for this dataset first",
        ),
        (
            {"out": "file/out"},
            "/file/out/checkpoints cannot be written (Not a directory): make room, or set --out to a",
        ),
    ],
)
def test_errors_that_are_expected_are_one_line(
    changed: dict[str, str], message: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    given = [part for name, value in changed.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("ris_core.train", run_name="__main__")
    said = str(caught.value.code)
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("at", ["start", "model"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_model_that_the_disk_does_not_take(
    error: Exception, at: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told, and with room again only what is missing is done."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path)])
    export = train.export_model

    def limited(folder: Path, *given: Any) -> None:
        if folder.name == at:
            raise error
        export(folder, *given)

    with monkeypatch.context() as patched:
        patched.setattr(train, "export_model", limited)
        with pytest.raises(
            ClusterError, match=rf"{at} could not be written \(.*No space left on device\): make room, then"
        ):
            train.main()
    assert len(list((tmp_path / "checkpoints").glob("*/*/state.json"))) == (0 if at == "start" else 2)
    train.main()
    load_model(tmp_path / "model")


class Rank(LocalRuntime):
    """One of several processes, as far as sharing out the images is concerned."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.device = rank, world, torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 4, 9])
@pytest.mark.parametrize("limit", [None, 4])
def test_every_validation_image_is_on_exactly_one_rank(
    world: int, limit: int | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, store = cris_training(tiny, validate_images=limit), tiny.store()
    asked: list[int] = []

    def counted(answer: object, store: object, queries: list, *_: object, **__: object) -> pa.Table:
        asked.extend(query.sent_id for query in queries)
        return pa.table({"intersection": pa.array([1] * len(queries)), "union": pa.array([4] * len(queries))})

    monkeypatch.setattr(run, "evaluate", counted)
    monkeypatch.setattr(run, "sum_over_ranks", lambda values: torch.ones(4))
    model = cris_model(tiny)
    for rank in range(world):
        make_validation(store, params, Rank(rank, world))(model)
    images = store.images_of("val")[:limit]
    expected = [query.sent_id for query in queries_of(store, "val", PROTOCOLS["ours"], images.tolist())]
    assert sorted(asked) == sorted(expected)
    assert len(set(asked)) == len(asked)


def test_validation_follows_its_protocol(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    params, store = cris_training(tiny, validate_protocol="cris_val"), tiny.store()
    counts = []

    def counted(answer: MapAnswers, store: object, queries: list, protocol: object, **_: object) -> pa.Table:
        counts.append((len(queries), protocol, answer.word_len))
        return pa.table({"intersection": [1, 3], "union": [4, 4]})

    monkeypatch.setattr(run, "evaluate", counted)
    found = make_validation(store, params, Rank(0, 1))(cris_model(tiny))
    assert found == {"val/mIoU": 0.5, "val/oIoU": 0.5}
    assert counts == [(store.manifest["splits"]["val"]["refs"], PROTOCOLS["cris_val"], 12)]


def test_new_layers_depend_on_the_seed_alone(tiny: Tiny) -> None:
    made = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        made.append(initial_model(section_of(tiny, "cris"), "cris", tiny.clip, None, seed)["proj.txt.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_wrong_wishes_are_named(tiny: Tiny, tmp_path: Path) -> None:
    runtime, store = plain(tmp_path), tiny.store()
    model = cris_model(tiny)
    with pytest.raises(DataError, match=f"{DATASET} has no split 'test'; it has testA, testB, train, val"):
        make_trainer(model, cris_training(tiny, validate_split="test"), store, runtime)
    with pytest.raises(ConfigError, match=r"train\.word_len is 33, but the model's CLIP reads at most 32 tokens"):
        make_trainer(model, cris_training(tiny, word_len=33), store, runtime)
    section = section_of(tiny, "cris")
    object.__setattr__(section.model, "vis_dim", 64)
    with pytest.raises(ConfigError, match="vis_dim is 64, but the CLIP's text is 32 wide"):
        initial_model(section, "cris", tiny.clip, None, 0)


def test_a_zero_shot_system_is_not_trained(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path, "global_local")])
    with pytest.raises(ConfigError, match="global_local is zero-shot: there is nothing to train"):
        train.main()
    assert list(tmp_path.iterdir()) == []


def shouted(sentence: Sentence) -> Sentence:
    return replace(sentence, raw=sentence.sent.upper())


@pytest.mark.parametrize("text", ["sent", "raw"])
def test_a_training_reads_the_field_that_is_named_in_the_systems_own_tokens(
    text: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    shards = tmp_path / "shards"
    records = [
        replace(record, refs=tuple(replace(ref, sentences=tuple(map(shouted, ref.sentences))) for ref in record.refs))
        for record in tiny.records()
    ]
    options = ShardOptions(IMAGE_SIZE)
    write_manifest(shards, DATASET, options, [write_shard(shards / "part-0.arrow", records, tiny.raw, options)])
    store = ShardStore(shards)

    def tokenize(self: MapSystem, texts: Sequence[str], length: int) -> torch.Tensor:
        heard.extend(texts)
        return torch.full((len(texts), length), 7)

    model = cris_model(tiny)
    monkeypatch.setattr(type(model), "tokenize", tokenize)
    params = cris_training(tiny, text=text)
    batch = make_trainer(model, params, store, plain(tmp_path)).batches.epoch(0)[0]
    assert torch.equal(batch["tokens"], torch.full((8, 12), 7))
    assert len(heard) == 8
    assert all(said.isupper() == (text == "raw") for said in heard)


# Two stages


def start_folder(tiny: Tiny, folder: Path, system: str, first: dict[str, torch.Tensor] | None, **other: Any) -> Path:
    """What a training starts from; `other` are dimensions that differ from the parameters."""
    section = section_of(tiny, system)
    section.model = replace(section.model, **other)
    clip = {"rn": tiny.clip, "vit": tiny.clip_vit}[section.clip]
    assert section.train is not None
    info = ModelInfo(IMAGE_SIZE, "opencv4", section.train.word_len)
    export_model(folder, system, initial_model(section, system, clip, first, 0), section.model, clip, info)
    return folder


def stage(tiny: Tiny, number: int, start: Path, runtime: LocalRuntime, **changed: Any) -> Trainer:
    """The trainer of RISCLIP's first or second stage."""
    section = section_of(tiny, "risclip")
    name = ("initialise", "train")[number - 1]
    setattr(section, name, replace(getattr(section, name), **changed))
    model = (first_stage_model, starting_model)[number - 1](section, "risclip", start)
    params = (section.initialise, section.train)[number - 1]
    assert params is not None
    return make_trainer(model, params, tiny.store(), runtime)


@dataclass(frozen=True)
class TwoStages:
    """Final checkpoints of both stages, the weights that each leaves, and the folder in between."""

    first: Checkpoint
    first_best: dict[str, torch.Tensor]
    start: Path
    second: Checkpoint
    second_best: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def two_stages(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TwoStages:
    folder = tmp_path_factory.mktemp("two_stages")
    first = stage(tiny, 1, tiny.clip_vit, plain(folder / "first"))
    first.fit()
    start = start_folder(tiny, folder / "start", "risclip", first.best_weights())
    second = stage(tiny, 2, start, plain(folder / "second"))
    second.fit()
    return TwoStages(final(first), first.best_weights(), start, final(second), second.best_weights())


def final(trainer: Trainer) -> Checkpoint:
    found = trainer.runtime.load()
    assert found is not None
    return found


def part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() != set()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def test_the_second_stage_trains_the_decoder_and_keeps_the_locator(two_stages: TwoStages, tiny: Tiny) -> None:
    first, second = two_stages.first_best, two_stages.second_best
    started = load_model(two_stages.start)[0].state_dict()
    assert same(part(started, "locator"), first)
    assert same(part(second, "locator"), first)
    assert part(two_stages.second.model, "locator") == {}, "what does not change is in no checkpoint"
    decoder, before = part(second, "decoder"), part(started, "decoder")
    assert {"head.weight", "head.bias"} <= differing(decoder, before)
    assert {key.split(".")[0] for key in second} == {"locator", "decoder"}
    section = section_of(tiny, "risclip")
    fresh = part(initial_model(section, "risclip", tiny.clip_vit, None, 0), "locator")
    assert same(part(started, "decoder"), part(initial_model(section, "risclip", tiny.clip_vit, first, 0), "decoder"))
    assert {"logit_bias", "logit_scale", "cfe.0.image_out.1.weight"} <= differing(first, fresh), "stage 1 trained it"


def test_both_stages_leave_clip_as_it_was(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    before = load_saved_clip(tiny.clip_vit).state_dict()
    for number, start in ((1, tiny.clip_vit), (2, two_stages.start)):
        trainer = stage(tiny, number, start, plain(tmp_path / str(number)), epochs=1)
        trainer.fit()
        locator: Any = trainer.model if number == 1 else trainer.model.locator
        assert same(locator.clip.clip.state_dict(), before)
        assert trainer.average is not None
        average: Any = trainer.average.module if number == 1 else trainer.average.module.locator
        assert average.clip.clip.visual.proj.data_ptr() == locator.clip.clip.visual.proj.data_ptr(), "held once"


def test_each_stage_has_its_own_settings(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    runtimes = [plain(tmp_path / name) for name in ("first", "second")]
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
        super().__init__(Checkpoints(Storage(folder)), "cpu")
        self.left = after

    def save(self, checkpoint: Checkpoint) -> None:
        super().save(checkpoint)
        self.left -= 1
        if not self.left:
            self.checkpoints.wait()
            raise Crash


@pytest.mark.parametrize("number", [1, 2])
def test_both_stages_resume_to_the_weights_of_an_undisturbed_run(
    number: int, tiny: Tiny, two_stages: TwoStages, tmp_path: Path
) -> None:
    start, expected = (tiny.clip_vit, two_stages.first) if number == 1 else (two_stages.start, two_stages.second)
    with pytest.raises(Crash):  # after the second step of the second epoch
        stage(tiny, number, start, Crashing(tmp_path, after=3), checkpoint_every_steps=2).fit()
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = stage(tiny, number, start, plain(tmp_path), checkpoint_every_steps=2)
    assert (resumed.position.epoch, resumed.position.step) == (1, 2)
    resumed.fit()
    found = final(resumed)
    for name in ("model", "average", "best"):
        assert same(getattr(found, name), getattr(expected, name))
    assert found.position.history == expected.position.history
    assert same(resumed.best_weights(), two_stages.first_best if number == 1 else two_stages.second_best)
    assert not [name for name in found.model if "clip" in name]  # checkpoints are small


def test_risclip_from_a_clip_to_a_model_in_one_process(
    tiny: Tiny, two_stages: TwoStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tiny, tmp_path, "risclip")])
    train.main()
    model, described = load_model(tmp_path / "model")
    info, digest = ModelInfo(IMAGE_SIZE, "opencv4", word_len=12), file_sha256(tmp_path / "model" / WEIGHTS)
    assert described == Description("risclip", section_of(tiny, "risclip").model, info, digest)
    assert same(dict(model.state_dict()), two_stages.second_best)
    position = trained(tmp_path).position
    score = whole_validation(tiny, model)
    assert position.history[position.best_epoch - 1]["val/mIoU"] == pytest.approx(score["mIoU"])
    assert len(trained(tmp_path, "initialise").position.history) == 2


def test_a_two_stage_system_without_its_first_starts_from_clip_itself(tiny: Tiny, tmp_path: Path) -> None:
    start = start_folder(tiny, tmp_path / "start", "risclip", None)
    trainer = stage(tiny, 2, start, plain(tmp_path), epochs=1)
    trainer.fit()
    assert same(part(trainer.best_weights(), "locator"), part(load_model(start)[0].state_dict(), "locator"))


def test_a_first_stage_of_other_dimensions_is_refused(tiny: Tiny, two_stages: TwoStages) -> None:
    section: Any = section_of(tiny, "risclip")
    section.model = replace(section.model, cfe_dim=32)
    with pytest.raises(WeightsError, match="The first stage does not fit this RISCLIP") as caught:
        initial_model(section, "risclip", tiny.clip_vit, two_stages.first_best, 0)
    assert "shape of cfe.0.image_in.1.weight: [16, 32] in the weights, [32, 32] in the model" in str(caught.value)


def test_a_start_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="nowhere holds no model to start from: run the stage initialise for it first"
    ):
        check_start(tmp_path / "nowhere", "cris", section_of(tiny, "cris").model)


def test_a_start_of_another_system(tiny: Tiny, two_stages: TwoStages) -> None:
    with pytest.raises(ConfigError, match="start holds a risclip, not the cris to be trained"):
        check_start(two_stages.start, "cris", section_of(tiny, "cris").model)


def test_a_start_of_other_dimensions_names_every_difference(tiny: Tiny, two_stages: TwoStages, tmp_path: Path) -> None:
    wanted: Any = section_of(tiny, "risclip").model
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
        starting_model(section_of(tiny, "cris"), "cris", start)

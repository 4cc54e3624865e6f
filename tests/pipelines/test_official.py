"""Official CRIS checkpoints: what the authors' training writes becomes a model folder, and the same again, byte for byte."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pipelines_world import contents, export_untrained

from pipelines import cli, export_checkpoint, import_checkpoint, official
from ris_core.errors import ConfigError, WeightsError
from ris_core.evaluation.metrics import PROTOCOLS
from ris_core.models.clip import build_clip
from ris_core.models.cris.system import CRIS, CRISConfig
from ris_core.models.registry import ModelInfo, load_model
from ris_core.predictor import RISPredictor

if TYPE_CHECKING:
    from tiny_world import Tiny

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "cris_tiny_A.npz")
OFFICIAL = {key.removeprefix("sd/"): torch.from_numpy(ARRAYS[key]) for key in ARRAYS.files if key.startswith("sd/")}
GEOMETRY = ("--image-size", "128", "--word-len", "12", "--num-heads", "4")


def trained(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All that the authors' train.py saves after its third epoch."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35], 0.1)
    return {
        "epoch": 3,
        "cur_iou": 0.625,
        "best_iou": 0.5,
        "prec": {"Pr@50": 0.7},
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixture of the official code as its training would save it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save(trained(OFFICIAL), "best_model.pth")
    return Path("best_model.pth")


def ris(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the console script, in this process."""
    monkeypatch.setattr(sys, "argv", ["ris", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.app()
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def test_an_imported_checkpoint_answers_as_the_official_code(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("import-checkpoint", str(checkpoint), "--out", "models/official", *GEOMETRY)
    code, out, err = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "of protocol `cris`: threshold 0.35" in out
    assert "it knows 256 tokens, CLIP's tokenizer gives more: it cannot be asked in words" in err
    model, described = load_model("models/official")
    assert isinstance(model, CRIS)
    assert described.info == ModelInfo(128, word_len=12, epoch=3, val_mIoU=0.625)
    assert described.info.resample == "opencv4"
    with torch.no_grad():
        logits = model(torch.from_numpy(ARRAYS["image"]), torch.from_numpy(ARRAYS["word"]))
    torch.testing.assert_close(logits, torch.from_numpy(ARRAYS["logits_eval"]), atol=1e-4, rtol=0)
    predictor = RISPredictor.from_folder("models/official", reading=PROTOCOLS["cris"].reading)
    assert (predictor.reading.threshold, predictor.reading.upsampling) == (0.35, "corners")
    assert [path.name for path in Path("models").iterdir()] == ["official"]


def test_there_and_back_gives_the_same_tensors(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_checkpoint.main(checkpoint, Path("one"), 128, 12, 4)
    capsys.readouterr()
    code, out, err = ris("export-checkpoint", "one", "--out", "back.pth", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "320 tensors for the official test.py" in out
    sizes = "fpn_in: [32, 64, 96], fpn_out: [48, 128, 80], num_layers: 2, num_head: 4, dim_ffn: 192"
    assert f"input_size: 128, word_len: 12, word_dim: 96, vis_dim: 128, {sizes}" in out
    back = torch.load("back.pth", weights_only=True)
    assert (back["epoch"], back["best_iou"]) == (3, 0.625)
    stripped = {key.removeprefix("module."): value for key, value in back["state_dict"].items()}
    assert stripped.keys() == OFFICIAL.keys()
    assert all(key.startswith("module.") for key in back["state_dict"])
    for key, value in OFFICIAL.items():
        assert (stripped[key].dtype, stripped[key].shape) == (value.dtype, value.shape), key
        assert stripped[key].numpy().tobytes() == value.numpy().tobytes(), key
    import_checkpoint.main(Path("back.pth"), Path("two"), 128, 12, 4)
    assert contents(Path("one")) == contents(Path("two"))


@pytest.mark.parametrize(("architecture", "keys"), [("RN50-quickgelu", "r50"), ("RN101-quickgelu", "r101")])
def test_checkpoints_of_the_published_sizes_have_the_official_keys(architecture: str, keys: str) -> None:
    with torch.device("meta"):
        model = CRIS(build_clip(architecture), CRISConfig())
    content = official.checkpoint_of(model.state_dict(), ModelInfo(416, word_len=17))
    lines = (GOLDEN / f"cris_{keys}_keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    found = {key: (list(value.shape), value.dtype) for key, value in content["state_dict"].items()}
    assert found == {f"module.{key}": (json.loads(shape), getattr(torch, dtype)) for key, shape, dtype, _ in rows}
    expected = {"fpn_in": [512, 1024, 1024 if keys == "r50" else 512], "fpn_out": [256, 512, 1024], "num_head": 8}
    assert official.recipe(model, ModelInfo(416, word_len=17)).items() >= expected.items()


def saved(content: object) -> Path:
    torch.save(content, "other.pth")
    return Path("other.pth")


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in OFFICIAL.items() if name != key}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (
            {"visual.conv1.weight": torch.zeros(3)},
            ["no checkpoint of CRIS", "it is a CLIP, which CRIS is trained from"],
        ),
        ({"locator.a": torch.zeros(3), "segmenter.b": torch.zeros(3)}, ["it is a model of LTS"]),
        ({"locator.a": torch.zeros(3)}, ["it is a model of RISCLIP"]),
        ({"fc.weight": torch.zeros(3)}, ["no checkpoint of CRIS", "its names are fc"]),
        ({"epoch": 3, "optimizer": {}}, ["holds no state dict"]),
        (
            {**without("proj.vis.4.bias"), "extra": torch.zeros(1)},
            ["2 problems", "missing: proj.vis.4.bias [64]", "not part of the model: extra [1]"],
        ),
        ({**OFFICIAL, "proj.txt.bias": torch.full((577,), torch.nan)}, ["proj.txt.bias is not finite in 577 of 577"]),
        (without("decoder.norm.weight"), ["This is not a CRIS state dict", "decoder.norm.weight"]),
        ({f"neck.{n}": torch.zeros(1) for n in range(99)}, ["This is not a CRIS state dict"]),
    ],
)
def test_what_is_no_official_checkpoint_is_refused(
    content: dict[str, Any], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as error:
        import_checkpoint.main(saved(content), Path("model"), 128, 12, 4)
    for message in messages:
        assert message in str(error.value)
    assert len(str(error.value)) < 3000
    assert [path.name for path in Path().iterdir()] == ["other.pth"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "page.pth"
    place.write_text("<!doctype html><title>404</title>")
    with pytest.raises(WeightsError, match="is a saved web page, not weights"):
        import_checkpoint.main(place, tmp_path / "model", 416, 17, 8)
    with pytest.raises(WeightsError, match="is missing"):
        import_checkpoint.main(tmp_path / "none.pth", tmp_path / "model", 416, 17, 8)


def test_all_wrong_options_are_told_at_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there").mkdir()
    wrong = ("--out", "there", "--image-size", "0", "--word-len", "2", "--num-heads", "0")
    code, _, err = ris("import-checkpoint", str(checkpoint), *wrong, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    for told in ("4 problems", "--image-size 0", "--word-len 2", "--num-heads 0", "--out there exists already"):
        assert told in err
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*--image-size 100: .*--word-len 17: .* at most 16 tokens"):
        import_checkpoint.main(checkpoint, Path("new"), 100, 17, 4)
    with pytest.raises(WeightsError, match="num_heads is 7: it must divide vis_dim 128"):
        import_checkpoint.main(checkpoint, Path("new"), 128, 12, 7)
    assert sorted(path.name for path in Path().iterdir()) == ["best_model.pth", "there"]


@pytest.mark.parametrize("verb", ["import-checkpoint", "export-checkpoint"])
def test_nothing_is_written_where_something_is_or_nothing_can_be(
    verb: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_checkpoint.main(checkpoint, Path("model"), 128, 12, 4)
    given = (str(checkpoint), *GEOMETRY) if verb == "import-checkpoint" else ("model",)
    Path("link").symlink_to("nowhere")
    Path("full").symlink_to("/dev/full")
    before = contents(Path())
    for out, message in {
        "model": "exists already, and nothing is overwritten",
        "model/model.safetensors": "exists already",
        "link": "exists already",
        "full": "exists already",
        "best_model.pth/x": "best_model.pth' is no folder",
        "/proc/new": "cannot be written",
    }.items():
        code, _, err = ris(verb, *given, "--out", out, monkeypatch=monkeypatch, capsys=capsys)
        assert (code, message in err, "Traceback" in err) == (1, True, False), err
    assert contents(Path()) == before


@pytest.mark.parametrize("verb", ["import-checkpoint", "export-checkpoint"])
def test_a_disk_that_is_full_leaves_nothing(
    verb: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as the largest file that a process may write is a small disk."""
    import_checkpoint.main(checkpoint, Path("model"), 128, 12, 4)
    given = (str(checkpoint), *GEOMETRY) if verb == "import-checkpoint" else ("model",)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        code, _, err = ris(verb, *given, "--out", "below/new", monkeypatch=monkeypatch, capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert err.startswith("error: --out below/new cannot be written: ")
    assert "File too large" in err
    assert err.count("\n") == 1
    assert not list(Path("below").iterdir())


def test_models_without_an_official_counterpart_are_refused(tiny: Tiny, untrained: Path, tmp_path: Path) -> None:
    other = tmp_path / "lts"
    export_untrained(tiny, other, "lts")
    with pytest.raises(WeightsError, match="is a model of lts: only CRIS has official checkpoints"):
        export_checkpoint.main(str(other), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"text_cfg.heads of its CLIP is 2: the official code would read 1"):
        export_checkpoint.main(str(untrained), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds no model"):
        export_checkpoint.main(str(tmp_path), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()

"""`ris <verb>`: quick help, and errors that are one message with exit code 1."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines_world import Workplace, python

from pipelines import cli
from ris_core.data.images import read_image
from ris_core.evaluation.figures import overlay
from ris_core.predictor import RISPredictor

MAKING = ["resolve", "synthesize", "prepare", "preprocess", "propose", "pretrain-clip", "initialise", "train"]
USING = [
    "predict",
    "predict-batch",
    "serve",
    "registry",
    "reproduce",
    "import-checkpoint",
    "export-checkpoint",
    "fetch",
]
ALONE = {"predict", "score", "tabulate", "import-checkpoint", "export-checkpoint"}  # with the library and nothing else
VERBS = [*MAKING, "evaluate", "score", "tabulate", "register", "compare", "report", *USING, "submit"]
HEAVY = ["torch", "torchvision", "ray", "mlflow", "pandas", "numpy", "pyarrow", "open_clip", "matplotlib"]
HELP = f"""
import sys
from pipelines.cli import app
sys.argv = ["ris", "--help"]
try:
    app()
except SystemExit as end:
    assert end.code == 0, end.code
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules])
"""
WITHOUT = """
import sys
from pipelines.cli import app
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = ["ris", *sys.argv[2:]]
app()
"""


def ris(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of the console script, in this process."""
    monkeypatch.setattr(sys, "argv", ["ris", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.app()
    code = end.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "offered"),
    [
        (("ray", "mlflow", "fastapi", "requests"), ALONE),
        (("ray",), {*ALONE, "fetch", "serve", "registry", "reproduce"}),
        ((), set(VERBS)),
    ],
)
def test_the_verbs_that_can_work_are_offered(
    missing: tuple[str, ...], offered: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in missing else name)
    assert set(cli.Verbs(name="ris").list_commands(None)) == offered  # type: ignore[arg-type]


def test_help_comes_without_heavy_libraries_and_tells_what_verbs_do(tmp_path: Path) -> None:
    done = python("-c", HELP, cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("heavy: []")
    for verb in VERBS:
        (line,) = (line for line in done.stdout.splitlines() if line.strip("│ ").startswith(f"{verb} "))
        assert cli.VERBS[verb] in line


@pytest.mark.parametrize("verb", VERBS)
def test_what_help_says_of_a_verb_is_what_its_module_says(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"pipelines.{verb.replace('-', '_')}")
    assert module.main.__doc__.strip().splitlines()[0] == cli.VERBS[verb]
    monkeypatch.setattr(sys, "argv", ["ris", verb, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.app()
    assert end.value.code == 0
    assert f"ris {verb} [OPTIONS]" in capsys.readouterr().out


def test_a_verb_says_which_library_it_lacks(workplace: Workplace) -> None:
    """As where the library alone is installed, or `ris[serve]`."""
    workplace.link("shards", "start", "model")
    for verb in ("evaluate", "train"):  # the second asks for Ray when there is something to train
        command = (verb, "--system", "cris", "--dataset", "shapes")
        done = python("-c", WITHOUT, "ray,dvc,jinja2", *command, cwd=workplace.root)
        assert (done.returncode, done.stdout) == (1, "")
        told = f"error: ris {verb} needs ray, which is not installed here: pip install 'ris[pipelines]'"
        assert done.stderr.splitlines()[-1] == told
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    done = python(
        "-c", WITHOUT, "ray,dvc,mlflow,pandas,jinja2,psutil", "predict", "grey.png", "the star", cwd=workplace.root
    )
    assert done.returncode == 0, done.stderr
    command = ("score", "none.json", "--dataset", "shapes", "--split", "val")
    done = python("-c", WITHOUT, "ray,dvc,mlflow,pandas,jinja2,psutil", *command, cwd=workplace.root)
    assert (done.returncode, done.stderr) == (
        1,
        "error: nothing was scored (1 problem):\n  - none.json: no such file\n",
    )


def test_errors_leave_no_traceback_and_nothing_on_disk(workplace: Workplace) -> None:
    done = python("-m", "pipelines.cli", "prepare", "--dataset", "refcocog_unc", cwd=workplace.root)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no dataset 'refcocog_unc': did you mean refcocog_umd")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert workplace.files() == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["synthesize", "--dataset", "squares"],
            "no embedded dataset 'squares': choose one of shapes, shapes+, shapesg",
        ),
        (["prepare", "--dataset", "refcoco"], "there is no dataset 'refcoco': did you mean refcoco_unc or"),
        (["preprocess", "--dataset", "refcoco"], "there is no dataset 'refcoco': did you mean refcoco_unc or"),
        (["preprocess", "--dataset", "shapes"], "shapes.parquet: no such records file; the stage `prepare` writes it"),
        (["propose", "--dataset", "refcoco"], "there is no dataset 'refcoco': did you mean refcoco_unc or"),
        (["propose", "--dataset", "shapes"], "run the preprocess stage for this dataset first"),
        (["pretrain-clip", "--clip", "bert"], "there is no CLIP 'bert'; there are rn, vit"),
        (["initialise", "--system", "lisa", "--dataset", "shapes"], "there is no system 'lisa'; there are cris, glo"),
        (["initialise", "--system", "cris", "--dataset", "shapes"], "run the preprocess stage for this dataset first"),
        (["train", "--system", "cris", "--dataset", "refcoco"], "there is no dataset 'refcoco'"),
        (["train", "--system", "lisa", "--dataset", "shapes"], "there is no system 'lisa'; there are cris, global_l"),
        (
            ["train", "--system", "cris", "--dataset", "shapes"],
            "models/start/cris-shapes holds no model to start from: run the stage initialise for it first",
        ),
        (["evaluate", "--system", "lisa", "--dataset", "shapes"], "there is no system 'lisa'"),
        (["evaluate", "--system", "cris", "--dataset", "shapes"], "run the preprocess stage for this dataset first"),
        (["register", "--system", "lisa", "--dataset", "shapes"], "there is no system 'lisa'"),
        (
            ["register", "--system", "cris", "--dataset", "shapes"],
            "models/cris-shapes holds no model: model.json, model.",
        ),
        (["report"], "results/evaluate has no scores yet: run the evaluate stage first"),
        (["submit", "--", "dvc", "repro"], "nothing was submitted (3 problems):"),
        (["fetch", "refcoco"], "there is no dataset 'refcoco': did you mean refcoco_unc or"),
        (["predict", "x.jpg", "the star"], "models/cris-shapes holds no model: model.json, model.safetensors missing"),
        (["predict", "x.jpg", "the star", "--out", "mask.tiff"], "--out mask.tiff: give a .png or .jpg file"),
        (
            ["predict", "x.jpg", "the star", "--out", "no/where.png"],
            "--out no/where.png: give a .png or .jpg file in a",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(
    arguments: list[str],
    message: str,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert shown.startswith("error: ")
    assert message in shown
    assert workplace.files() == set()


def test_evaluation_without_a_model_is_told_before_ray_starts(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("shards")
    monkeypatch.setattr("pipelines.cluster.connected", lambda: pytest.fail("Ray was asked for"))
    arguments = ("evaluate", "--system", "cris", "--dataset", "shapes")
    code, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "models/cris-shapes holds no model" in shown) == (1, True)


def test_no_parameter_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = ris("prepare", "--dataset", "shapes", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert shown == "error: params.yaml: no such parameter file; run from the repository root, or pass its path\n"


def test_all_wrong_parameters_are_told_at_once(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace.root / "params.yaml").write_text(
        "preset: huge\ntrain: {epoks: 3, lr: fast}\nevaluate: {protocols: [ours, theirs]}\npresets: {big: {trian: {}}}\n"
    )
    code, shown = ris("prepare", "--dataset", "shapes", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "train.epoks: unknown parameter; did you mean 'epochs'?" in shown
    assert "train.lr: Value 'fast' of type 'str' could not be converted to Float" in shown
    assert "presets.big.trian: unknown parameter; did you mean 'train'?" in shown
    assert "preset: no preset named 'huge'; there are big" in shown


def test_an_unknown_protocol_is_refused_with_the_known_ones(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace.root / "params.yaml").write_text("evaluate: {protocols: [ours, theirs]}\n")
    arguments = ("evaluate", "--system", "cris", "--dataset", "shapes")
    code, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "evaluate.protocols: 'theirs' is not one of ours, cris, cris_val, lavt" in shown


def test_a_preset_says_what_it_sets(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.change(preset="long", presets={"long": {"train": {"epochs": 9}}})
    arguments = ("train", "--system", "cris", "--dataset", "shapes")
    _, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "preset 'long' sets train.epochs: 2 -> 9\n" in shown


def test_predict_draws_the_mask(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model", "raw")
    image = next((workplace.root / "data/raw/shapes").rglob("*.jpg"))
    monkeypatch.setattr(sys, "argv", ["ris", "predict", str(image), "the red star", "--out", "mask.png"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.app()
    predictor = RISPredictor.from_folder("models/cris-shapes")
    predictor.set_image(image)
    (expected,) = predictor.predict(["the red star"])
    assert end.value.code == 0
    told = f"mask.png: score {expected.score:.3f}, mask covers {expected.mask.mean():.1%} of the image\n"
    assert capsys.readouterr().out == told
    drawn = np.asarray(Image.open("mask.png"))
    assert np.array_equal(drawn, np.asarray(overlay(read_image(image), expected.mask)))


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ("nowhere.jpg", "the star", "no image at nowhere.jpg"),
        ("params.yaml", "the star", "params.yaml cannot be used: it is none of the image formats read here (JPEG, PNG"),
        ("https://example.org/a.jpg", "the star", "is an address, and nothing is fetched here"),
        ("grey.png", "  ", "expressions must be a list of non-blank texts"),
    ],
)
def test_predict_refuses_what_it_cannot_answer(
    image: str,
    text: str,
    message: str,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    code, shown = ris("predict", image, text, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert message in shown
    assert not Path("overlay.png").exists()


def test_an_empty_mask_is_said_so(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    arguments = ("predict", "grey.png", "the star", "--threshold", "0.9999")
    code, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "nothing in the image matched the expression: the mask is empty" in shown


def test_a_cut_expression_is_said_so(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    code, shown = ris("predict", "grey.png", "the star " * 9, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "the expression is cut, its end was not heard: it has 20 tokens, the model reads 12" in shown
    code, shown = ris("predict", "grey.png", "the star", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, "cut" in shown) == (0, False)


@pytest.mark.parametrize("threshold", ["7", "nan", "-0.1"])
def test_a_threshold_that_is_no_probability(
    threshold: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    arguments = ("predict", "grey.png", "the star", "--threshold", threshold)
    code, shown = ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert shown.startswith(
        f"error: the threshold is {float(threshold)}: a probability is compared with it, use 0 to 1"
    )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("grey.png", "--out grey.png is the picture itself, which would be lost: give another name"),
        ("link.png", "--out link.png is the picture itself, which would be lost: give another name"),
        ("folder.png", "--out folder.png is no file that can be written: give the name of a picture"),
        ("full.png", "--out full.png is no file that can be written: give the name of a picture"),
        ("mask.gif", "--out mask.gif: give a .png or .jpg file in a folder that exists"),
        ("hard.png", "--out hard.png is the picture itself, which would be lost: give another name"),
        ("here/grey.png", "--out here/grey.png is the picture itself, which would be lost: give another name"),
        ("../workplace/grey.png", "grey.png is the picture itself, which would be lost: give another name"),
        ("notes.png", "--out notes.png is a link to"),
        ("nowhere.png", "which is no place for a picture: give another name"),
        ("circle.png", "--out circle.png is no file that can be written: give the name of a picture"),
        ("pipe.png", "--out pipe.png is no file that can be written: give the name of a picture"),
        ("closed/mask.png", "--out closed/mask.png cannot be written: "),
        (f"{'x' * 300}.png", "cannot be written: File name too long"),
    ],
)
def test_predict_writes_where_nothing_is_lost(
    out: str,
    message: str,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    before = Path("grey.png").read_bytes()
    Path("link.png").symlink_to("grey.png")
    Path("folder.png").mkdir()
    Path("full.png").symlink_to("/dev/full")
    Path("hard.png").hardlink_to("grey.png")
    Path("here").symlink_to(".")
    Path("notes.txt").write_text("mine")
    Path("notes.png").symlink_to("notes.txt")
    Path("nowhere.png").symlink_to("no/where.png")
    Path("circle.png").symlink_to("circle.png")
    os.mkfifo("pipe.png")
    Path("closed").symlink_to("/proc")  # which takes nobody's files, not even an administrator's
    code, shown = ris("predict", "grey.png", "the star", "--out", out, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert message in shown
    assert shown.count("\n") == 1
    assert Path("grey.png").read_bytes() == before
    assert (Path("notes.txt").read_text(), Path("no").exists()) == ("mine", False)


def test_predict_goes_through_links_and_leaves_them(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    Path("mask.png").symlink_to("link/real.jpg")
    arguments = ("predict", "grey.png", "the star", "--out", "mask.png")
    assert ris(*arguments, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    assert Path("mask.png").is_symlink()
    assert Image.open("folder/real.jpg").size == (40, 30)


def test_a_disk_that_is_full_leaves_the_picture_that_was_there(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.link("model")
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    shutil.copy("grey.png", "mask.png")

    def full(picture: Image.Image, place: Path) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, shown = ris("predict", "grey.png", "the star", "--out", "mask.png", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, shown) == (1, "error: --out mask.png cannot be written: No space left on device\n")
    assert Path("mask.png").read_bytes() == Path("grey.png").read_bytes()
    assert not [path.name for path in Path().iterdir() if "partial" in path.name]


def test_predict_says_what_is_wrong_with_a_name_in_the_registry(
    workplace: Workplace, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), "grey").save("grey.png")
    for model in ("models:/ris-cris-shapes@champion", "runs:/0123/model"):
        code, shown = ris("predict", "grey.png", "x", "--model", model, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 1
        assert shown.startswith(f"error: {model} cannot be loaded from sqlite:///")

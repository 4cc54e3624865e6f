"""dvc.yaml: what is listed exists and is enough, and DVC reruns what a change touches and no more.

The rerun tests run the real `dvc repro` and the real stage `resolve` on a copy of the repository, in which the other stages
only write the outputs that dvc.yaml declares, as a function of what they read.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from pipelines import inputs, resolve
from pipelines.params import load_params
from ris_core.models.registry import systems

REPOSITORY = Path(__file__).parents[2]
MAKING = ["synthesize", "prepare", "preprocess", "propose", "pretrain_clip", "initialise", "train"]
VERBS = ["resolve", *MAKING, "evaluate", "register", "compare", "report"]


@cache
def stages() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    assert isinstance(content, dict)
    return content


@cache
def params() -> dict[str, Any]:
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    assert isinstance(content, dict)
    return content


def expanded() -> dict[str, dict[str, str]]:
    """Every stage instance by its DVC name, with the values of its matrix."""
    found: dict[str, dict[str, str]] = {}
    for name, stage in stages().items():
        matrix = {key: params()[value[2:-1]] for key, value in stage.get("matrix", {}).items()}
        for values in itertools.product(*matrix.values()):
            found["@".join([name, "-".join(values)]) if values else name] = dict(zip(matrix, values, strict=True))
    return found


def fill(text: str, item: dict[str, str]) -> str:
    """A template of dvc.yaml with its matrix values and parameters put in."""
    text = re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match[1]], text)
    return re.sub(r"\$\{(\w+)\}", lambda match: str(params()[match[1]]), text)


def outputs(stage: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(path, flags) of every output, metric and plot of a stage."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries]


def code_of(stage: dict[str, Any]) -> list[str]:
    return [dep for dep in stage["deps"] if dep.startswith(("pipelines/", "ris_core/"))]


def test_there_is_a_stage_for_every_verb() -> None:
    assert list(stages()) == VERBS
    for verb in VERBS:
        command = f"python -m pipelines.{verb}"
        assert stages()[verb]["cmd"].split(" --")[0] == command  # the same on a laptop and on a cluster


@pytest.mark.parametrize("verb", VERBS)
def test_listed_code_exists(verb: str) -> None:
    listed = [dep.replace("${item.system}", system) for dep in code_of(stages()[verb]) for system in systems()]
    assert [dep for dep in listed if not (REPOSITORY / dep).exists()] == []


def decisive(verb: str) -> set[str]:
    """What dvc.yaml should list for a stage: the code of all systems together, as DVC cannot look up what one imports, but
    for the folders of systems, of which a stage about one lists its own alone.
    """
    if "${item.system}" not in stages()[verb]["cmd"]:
        return {path.as_posix() for path in inputs.code_of(verb)}
    found = {path.as_posix() for system in systems() for path in inputs.code_of(verb, system)}
    folders = tuple(f"ris_core/models/{system}/" for system in systems())
    own = "ris_core/models/${item.system}"
    return {f"{own}/x" if path.startswith(folders) else path for path in found}


def below(path: str, listed: list[str]) -> list[str]:
    return [dep for dep in listed if path == dep or path.startswith(f"{dep}/")]


@pytest.mark.parametrize("verb", VERBS[1:])
def test_exactly_the_code_that_decides_a_result_is_listed(verb: str) -> None:
    listed = code_of(stages()[verb])
    assert [path for path in sorted(decisive(verb)) if not below(path, listed)] == []
    needless = [dep for dep in listed if not any(dep in below(path, listed) for path in decisive(verb))]
    assert needless == []


def test_the_walk_over_imports_follows_the_registry() -> None:
    def code(verb: str, system: str | None = None) -> set[str]:
        return {path.as_posix() for path in inputs.code_of(verb, system)}

    assert {"pipelines/preprocess.py", "ris_core/data/shards.py", "ris_core/data/letterbox.py"} <= code("preprocess")
    assert {"ris_core/training/loop.py", "ris_core/models/lts/prior.py", "ris_core/models/layers.py"} <= code(
        "train", "lts"
    )
    for system in systems():
        folders = {path.split("/")[2] for path in code("train", system) if path.count("/") == 3}
        assert folders <= {system, "configs"}, "a system's training does not depend on its neighbours"
    assert not {"ris_core/evaluation/cost.py", "ris_core/data/shapes/wording.py"} & code("train", "cris")
    assert "ris_core/models/configs/tiny_rn.json" in code("train", "cris")
    assert "pipelines/serving_model.py" in code("register", "cris")
    assert not any("config.py" in path for path in code("train", "cris")), "values are watched as values"


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.metadata.get("decides", True):
                yield from leaves(getattr(value, field.name), f"{prefix}.{field.name}")
    else:
        yield prefix.removeprefix(".")


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, value[-1]] if isinstance(value, list | tuple) and value else f"{value}?"


def test_every_value_that_decides_something_is_watched_by_some_stage() -> None:
    """Whatever the parameters hold is in what `resolve` writes, but for where to run and which stages there are."""
    params = load_params(REPOSITORY / "params.yaml")

    def watched() -> dict[str, Any]:
        return {inputs.name(stage, item): inputs.values(params, stage, item) for stage, item in inputs.names(params)}

    before, unwatched = watched(), []
    for name in leaves(params):
        *sections, last = name.split(".")
        owner: Any = params
        for section in sections:
            owner = getattr(owner, section)
        value = getattr(owner, last)
        object.__setattr__(owner, last, changed(value))
        if watched() == before:
            unwatched.append(name)
        object.__setattr__(owner, last, value)
        assert watched() == before
    # Trainings inherit from the section `train` when the file is read; the lists are dvc.yaml's own.
    known = ("cluster.", "train.", "preset", "datasets", "synthetic_datasets", "clips")
    assert [name for name in unwatched if not name.startswith(known)] == []
    assert "train.seed" not in unwatched, "fresh layers are drawn with it"


def test_a_stage_cannot_read_what_is_not_watched_for_it() -> None:
    params = inputs.only_watched(load_params(REPOSITORY / "params.yaml"), "train", "lts")
    assert params.of("lts").train is not None
    assert params.cluster.train_workers == 1
    for read in (lambda: params.evaluate.seed, lambda: params.of("lts").clip.upper(), lambda: list(params.systems)):
        with pytest.raises(LookupError, match=r"stage train reads .*: name it in pipelines.inputs.SECTIONS"):
            read()
    assert load_params(REPOSITORY / "params.yaml").evaluate.seed == 0


@pytest.mark.parametrize("verb", VERBS)
def test_small_results_are_in_git_and_large_ones_in_the_cache(verb: str) -> None:
    for path, flags in outputs(stages()[verb]):
        top = path.split("/")[0]
        assert (top in ("results", "mlflow")) == (flags.get("cache") is False), path
        assert ("persist" in flags) == (path == "results/params" or top == "mlflow"), path
        assert top in ("results", "data", "models", "mlflow")


def test_a_stage_depends_on_the_values_that_it_reads() -> None:
    params = load_params(REPOSITORY / "params.yaml")
    written = {f"results/params/{inputs.name(stage, item)}.json" for stage, item in inputs.names(params)}
    listed: set[str] = set()
    for name, item in expanded().items():
        verb = name.split("@")[0]
        stage = stages()[verb]
        read = {fill(dep, item) for dep in stage["deps"] if dep.startswith("results/params/")}
        about = item.get("system") if verb in inputs.PARTS else item.get("clip")
        expected = set() if verb in ("resolve", "report") else {f"results/params/{inputs.name(verb, about)}.json"}
        assert read == expected, name
        assert ("params" in stage) == (verb == "resolve")
        listed |= read
    assert listed == written


@pytest.mark.parametrize("verb", ["preprocess", "propose", "evaluate", "compare"])
def test_a_stage_that_reads_photos_depends_on_them(verb: str) -> None:
    assert "data/raw/${item.dataset}" in stages()[verb]["deps"]


def test_the_lock_file_knows_exactly_these_stages() -> None:
    lock = REPOSITORY / "dvc.lock"
    if not lock.exists():
        pytest.skip("nothing was reproduced here yet")
    assert set(yaml.safe_load(lock.read_text())["stages"]) == set(expanded())


FAKE_PYTHON = """#!{python}
import json, os, sys
from hashlib import sha256
from pathlib import Path

command = " ".join(["python", *sys.argv[1:]])
stage = json.loads(Path("plan.json").read_text())[command]
with open("runs.txt", "a") as log:
    log.write(stage["name"] + "\\n")
if stage["name"] == "resolve":
    if Path("resolved").exists():  # by the test's own process, as no code has changed
        sys.exit()
    os.environ["PYTHONPATH"] = os.getcwd()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
read = []
if stage["name"].startswith("initialise@"):  # which reads one CLIP of those it depends on
    own = json.loads(Path(stage["data"][0]).read_text())
    stage["data"] = [f"{{place}}/{{own['clip']}}" if place == "data/clip" else place for place in stage["data"]]
if stage["name"].startswith("evaluate@") and "global_local" not in stage["name"]:
    stage["data"] = [place for place in stage["data"] if not place.startswith("data/proposals")]
for place in map(Path, stage["data"]):
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    read += [file.read_text() for file in files if file.is_file()]
content = json.dumps({{"value": sha256("".join(read).encode()).hexdigest()}})
for place in map(Path, stage["outs"]):
    file = place if place.suffix else place / "content.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
"""


def plan() -> dict[str, dict[str, Any]]:
    """For each command of dvc.yaml what the fake stage reads and writes."""
    found = {}
    for name, item in expanded().items():
        stage = stages()[name.split("@")[0]]
        found[" ".join(shlex.split(fill(stage["cmd"], item)))] = {
            "name": name,
            "data": [fill(dep, item) for dep in stage["deps"] if dep not in code_of(stage)],
            "outs": [fill(path, item) for path, _ in outputs(stage)],
        }
    return found


class Copy:
    """A copy of the repository in which stages are faked and counted."""

    def __init__(self, root: Path):
        self.root = root
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
        wanted = (".dvc/", ".dvcignore", "dvc.yaml", "params.yaml", "pipelines/", "ris_core/")
        for file in files:
            if (file.startswith(wanted) or file == "results/waiting.json") and (REPOSITORY / file).is_file():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / file, root / file)
        (root / "plan.json").write_text(json.dumps(plan()))
        (root / "bin").mkdir()
        (root / "bin" / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
        (root / "bin" / "python").chmod(0o755)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)

    def dvc(self, *arguments: str) -> str:
        """Run DVC here; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=self.root, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self, code: bool = False) -> set[str]:
        """The stages that `dvc repro` ran; `code` says that code has changed which `resolve` runs.

        DVC runs in this process, which saves the seconds of its start.
        """
        log, resolved = self.root / "runs.txt", self.root / "resolved"
        log.unlink(missing_ok=True)
        resolved.unlink(missing_ok=True)
        if not code:
            resolve.main()
            resolved.touch()
        with Repo(str(self.root)) as repo:
            repo.reproduce()
        return set(log.read_text().splitlines()) if log.exists() else set()

    def set(self, key: str, value: Any) -> None:
        """Change one parameter."""
        place = self.root / "params.yaml"
        content = section = yaml.safe_load(place.read_text())
        *sections, name = key.split(".")
        for each in sections:
            section = section.setdefault(each, {})
        assert section.get(name) != value
        section[name] = value
        place.write_text(yaml.safe_dump(content, sort_keys=False))

    def edit(self, file: str, old: str = "", new: str = "# changed") -> None:
        """Replace a piece of a file that is there once, or add a comment to its end."""
        place = self.root / file
        text = place.read_text()
        assert not old or text.count(old) == 1, (file, old)
        place.write_text(text.replace(old, new) if old else f"{text}{new}\n")


def names(*verbs: str, of: tuple[str, ...] = ()) -> set[str]:
    """The names of all instances of these stages, or only those of some systems or CLIPs."""
    found = {name: item for name, item in expanded().items() if name.split("@")[0] in verbs}
    return {name for name, item in found.items() if not of or set(of) & set(item.values())}


@dataclass(frozen=True)
class Change:
    """A change, and the stages that DVC should run for it beside `resolve`, whose own inputs nearly all changes are."""

    what: str
    make: Callable[[Copy], None]
    runs: set[str]
    resolve: bool = True
    code: bool = False  # whether values may differ for another reason than params.yaml


def without_consequence(copy: Copy) -> None:
    copy.set("cluster.train_workers", 7)
    copy.set("train.loader_workers", 1)
    copy.set("presets.long.evaluate", {"seed": 7})


TRAINED = ("cris", "risclip", "lts")
SCORED = ("evaluate", "register")
AFTER = names("compare", "report")
CHANGES = [
    Change("a comment in params.yaml", lambda c: c.edit("params.yaml"), set(), resolve=False),
    Change("where to run, how far batches are made ahead, and a value of an unused preset", without_consequence, set()),
    Change(
        "a value of the preset in use",
        lambda c: c.set("presets.default.evaluate", {"bootstrap_samples": 7}),
        names(*SCORED) | AFTER,
    ),
    Change("a value that this preset hides", lambda c: c.set("evaluate.bootstrap_samples", 8), set()),
    Change(
        "a value that trainings share, where they do not set their own",
        lambda c: c.set("train.clip_grad_norm", 7.0),
        names("initialise", of=("risclip",)) | names("train", *SCORED, of=TRAINED) | AFTER,
    ),
    Change(
        "a value of one system's second stage",
        lambda c: c.set("risclip.train.epochs", 7),
        names("train", *SCORED, of=("risclip",)) | AFTER,
    ),
    Change(
        "a value of one system's sizes",
        lambda c: c.set("lts.model.dim", 66),
        names("initialise", "train", *SCORED, of=("lts",)) | AFTER,
    ),
    Change(  # all CLIPs are looked at again; what starts from another is left alone
        "a value of one CLIP",
        lambda c: c.set("clip_vit.steps", 7),
        names("pretrain_clip", of=("vit",)) | names("initialise") | names("train", *SCORED, of=("risclip",)) | AFTER,
    ),
    Change(
        "a value of proposals",
        lambda c: c.set("proposals.felzenszwalb.sigma", 0.7),
        names("propose") | names("initialise", "train", of=("global_local",)) | names(*SCORED) | AFTER,
    ),
    Change("a value of the gate", lambda c: c.set("register.minimum", 0.1), names("register")),
    Change(
        "a module of one system",
        lambda c: c.edit("ris_core/models/lts/prior.py"),
        names("initialise", "train", *SCORED, of=("lts",)) | names("compare"),
    ),
    Change("a module of evaluation", lambda c: c.edit("ris_core/evaluation/cost.py"), names(*SCORED)),
    Change(
        "a module of the embedded world",
        lambda c: c.edit("ris_core/data/shapes/wording.py"),
        names("synthesize", "pretrain_clip"),
    ),
    Change("a module of the official files", lambda c: c.edit("ris_core/data/refer/join.py"), names("prepare")),
    Change("the training loop", lambda c: c.edit("ris_core/training/loop.py"), names("initialise", "train")),
    Change("the packaged model", lambda c: c.edit("pipelines/serving_model.py"), names("register"), resolve=False),
    Change(
        "the store of versions is lost, as it is in a fresh clone, which has the results",
        lambda c: shutil.rmtree(c.root / "mlflow"),
        names("register"),
        resolve=False,
    ),
    Change("pictures", lambda c: c.edit("pipelines/gallery.py"), names(*SCORED, "compare"), resolve=False),
    Change("where Ray is started", lambda c: c.edit("pipelines/cluster.py"), set(), resolve=False),
    Change(
        "how errors read, also those of the packaged model", lambda c: c.edit("ris_core/errors.py"), names("register")
    ),
    # From here on the copy's code gives other values than this process': each `resolve` has to be run for real.
    Change(
        "a default in code that the file leaves as it is",
        lambda c: c.edit("ris_core/training/params.py", 'option("adamw"', 'option("adam"'),
        names("initialise", of=("risclip",)) | names("train", *SCORED, of=TRAINED) | AFTER,
        code=True,
    ),
    Change(
        "a default in code that the file sets",
        lambda c: c.edit("ris_core/training/params.py", "option(8, minimum=1)", "option(9, minimum=1)"),
        set(),
        code=True,
    ),
    Change(
        "a default of an evaluation",
        lambda c: c.edit("ris_core/evaluation/params.py", "seed: int = 0", "seed: int = 1"),
        names(*SCORED) | AFTER,
        code=True,
    ),
]


def test_dvc_reruns_what_a_change_touches_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    assert set(copy.dvc("stage", "list", "--name-only").split()) == set(expanded())
    assert copy.repro(code=True) == set(expanded())
    assert copy.repro() == set()
    wrong = {}
    for change in CHANGES:
        change.make(copy)
        ran, expected = copy.repro(change.code), change.runs | ({"resolve"} if change.resolve else set())
        if ran != expected:
            wrong[change.what] = {"needlessly": sorted(ran - expected), "not": sorted(expected - ran)}
    assert wrong == {}
    assert '"value"' in copy.dvc("metrics", "show", "--json")


def test_a_name_that_is_a_pattern_is_a_name_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shapes*` through DVC's matrix, outputs, cache and the shell, where it could be files that are there."""
    star = "shapes*"
    small = {"datasets": [star], "synthetic_datasets": [star], "captions": star, "systems": ["cris"], "clips": ["rn"]}
    copy = Copy(tmp_path)
    for key, value in small.items():
        monkeypatch.setitem(params(), key, value)
        copy.set(key, value)
    (tmp_path / "plan.json").write_text(json.dumps(plan()))
    (tmp_path / "shapesque.txt").write_text("what a shell would make of it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    assert copy.repro(code=True) == set(expanded())
    assert copy.repro() == set()
    made = [Path(place) for name, item in expanded().items() if star in name for place in outs_of(name, item)]
    contents = {place: sorted(file.name for file in place.rglob("*")) for place in made}
    assert all(place.exists() for place in made)
    for place in made:
        if place.parts[0] in ("data", "models"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    copy.dvc("checkout", f"prepare@{star}")
    assert Path(f"data/records/{star}.parquet").exists()
    assert not Path(f"data/shards/{star}").exists()
    copy.dvc("checkout")
    assert {place: sorted(file.name for file in place.rglob("*")) for place in made} == contents
    assert json.loads(copy.dvc("status", "--json")) == {}


def outs_of(name: str, item: dict[str, str]) -> list[str]:
    return [fill(path, item) for path, _ in outputs(stages()[name.split("@")[0]])]


def test_parameters_are_shown_and_compared_by_dvc(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    for arguments in (["add", "--all"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    copy.set("train.lr", 5e-4)
    found = json.loads(copy.dvc("params", "diff", "--json"))["params.yaml"]
    assert {name: (each["old"], each["new"]) for name, each in found.items()} == {"train.lr": (7e-4, 5e-4)}

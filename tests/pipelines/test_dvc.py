"""dvc.yaml: what is listed exists and is enough, and DVC reruns what a change touches and no more.

The rerun tests run the real `dvc repro` on a copy of the repository in which `python -m pipelines.<verb>` only writes the
outputs that dvc.yaml declares.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
MAKING = ["synthesize", "prepare", "preprocess", "propose", "pretrain_clip", "initialise", "train"]
VERBS = [*MAKING, "evaluate", "register", "compare", "report"]
# How a stage is started, where it runs and where its files lie; none of it decides what comes out.
PLUMBING = {
    *(f"pipelines/{name}.py" for name in ("cluster", "files", "fingerprint", "paths", "stage", "tracking")),
    *(f"ris_core/{name}.py" for name in ("config", "errors", "training/runtime")),
}


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


def imported(file: Path) -> set[Path]:
    """Our own modules that a module imports when it runs, at its top or inside functions."""

    def visit(node: ast.AST) -> set[str]:
        names: set[str] = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom) and child.module:
                names |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
            names |= visit(child)
        return names

    places = {REPOSITORY / f"{name.replace('.', '/')}.py" for name in visit(ast.parse(file.read_text()))}
    return {place for place in places if place.is_file()}


def needed(verb: str) -> set[str]:
    """The modules whose code decides what a stage writes: its own and, through any number of imports, the library's."""
    seen: set[str] = set()
    waiting = [REPOSITORY / "pipelines" / f"{verb}.py"]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(REPOSITORY).as_posix()
        if name not in seen | PLUMBING:
            seen.add(name)
            waiting += imported(file)
    return seen


def test_there_is_a_stage_for_every_verb() -> None:
    assert list(stages()) == VERBS
    for verb in VERBS:
        command = f"python -m pipelines.{verb}"
        assert stages()[verb]["cmd"].split(" --")[0] == command  # the same on a laptop and on a cluster


@pytest.mark.parametrize("verb", VERBS)
def test_listed_code_exists(verb: str) -> None:
    assert [dep for dep in code_of(stages()[verb]) if not (REPOSITORY / dep).exists()] == []


@pytest.mark.parametrize("verb", VERBS)
def test_all_code_that_decides_a_result_is_listed(verb: str) -> None:
    listed = code_of(stages()[verb])
    unlisted = {name for name in needed(verb) if not any(name == dep or name.startswith(f"{dep}/") for dep in listed)}
    assert not unlisted


def test_the_import_walk_sees_imports_inside_functions() -> None:
    assert {"pipelines/preprocess.py", "ris_core/data/shards.py", "ris_core/data/letterbox.py"} <= needed("preprocess")
    assert "ris_core/training/loop.py" in needed("train")
    assert not needed("train") & PLUMBING


@pytest.mark.parametrize("verb", VERBS)
def test_small_results_are_in_git_and_large_ones_in_the_cache(verb: str) -> None:
    for path, flags in outputs(stages()[verb]):
        assert (path.split("/")[0] == "results") == (flags.get("cache") is False), path
        assert "persist" not in flags
        assert path.split("/")[0] in ("results", "data", "models")


def test_a_stage_reads_its_own_section_of_the_parameters() -> None:
    read = {verb: set(stage.get("params", [])) - {"preset", "presets.${preset}"} for verb, stage in stages().items()}
    own = {verb: {verb} for verb in ("synthesize", "prepare", "preprocess", "evaluate", "register")}
    own["propose"] = {"systems", "proposals"}
    own["pretrain_clip"] = {"captions", "clip_${item.clip}"}
    own["initialise"] = {
        "proposals",
        "train",
        *(f"${{item.system}}.{name}" for name in ("clip", "model", "initialise")),
    }
    own["compare"] = {"systems", "evaluate"}
    own["train"] = {"train", "${item.system}.model", "${item.system}.train"}
    assert read == {**own, "report": set()}
    for verb, sections in read.items():
        assert {"preset", "presets.${preset}"} <= set(stages()[verb].get("params", [])) or not sections


def test_the_lock_file_knows_exactly_these_stages() -> None:
    lock = REPOSITORY / "dvc.lock"
    if not lock.exists():
        pytest.skip("nothing was reproduced here yet")
    assert set(yaml.safe_load(lock.read_text())["stages"]) == set(expanded())


FAKE_PYTHON = """#!{python}
import json, sys, yaml
from hashlib import sha256
from pathlib import Path

command = " ".join(["python", *sys.argv[1:]])
stage = json.loads(Path("plan.json").read_text())[command]
with open("runs.txt", "a") as log:
    log.write(stage["name"] + "\\n")
params = yaml.safe_load(Path("params.yaml").read_text())
own = params.get(stage["name"].split("@")[-1].split("-")[0]) or {{}}
if own.get("train") is not None:  # a trained system's stages depend on proposals and do not read them
    stage["params"] = [name for name in stage["params"] if name != "proposals"]
    stage["data"] = [place for place in stage["data"] if not place.startswith("data/proposals")]
read = []
for name in stage["params"]:
    value = params
    for key in name.split("."):
        value = (value or {{}}).get(key)
    read.append(str(value))
if stage["name"].startswith("initialise@"):  # which reads one CLIP of those it depends on
    stage["data"] = [f"{{place}}/{{own['clip']}}" if place == "data/clip" else place for place in stage["data"]]
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
        found[fill(stage["cmd"], item)] = {
            "name": name,
            "params": [fill(key, item) for key in stage.get("params", [])],
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
            if file.startswith(wanted) and (REPOSITORY / file).is_file():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / file, root / file)
        (root / "plan.json").write_text(json.dumps(plan()))
        (root / "bin").mkdir()
        (root / "bin" / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
        (root / "bin" / "python").chmod(0o755)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)

    def dvc(self, *arguments: str) -> str:
        """Run DVC here; its standard output."""
        path = os.pathsep.join([str(self.root / "bin"), os.environ["PATH"]])
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=self.root,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self) -> set[str]:
        """The stages that `dvc repro` ran."""
        log = self.root / "runs.txt"
        log.unlink(missing_ok=True)
        self.dvc("repro")
        return set(log.read_text().splitlines()) if log.exists() else set()

    def set(self, key: str, value: Any) -> None:
        """Change one parameter, which must be there."""
        place = self.root / "params.yaml"
        content = section = yaml.safe_load(place.read_text())
        *sections, name = key.split(".")
        for each in sections:
            section = section[each]
        assert section[name] != value
        section[name] = value
        place.write_text(yaml.safe_dump(content, sort_keys=False))


def names(*verbs: str, only: str = "") -> set[str]:
    """The names of all instances of these stages, or only those of one system or CLIP."""
    found = {name: item for name, item in expanded().items() if name.split("@")[0] in verbs}
    return {name for name, item in found.items() if not only or not item or only in item.values()}


def test_dvc_reruns_what_a_change_touches_and_no_more(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    assert set(copy.dvc("stage", "list", "--name-only").split()) == set(expanded())
    assert copy.repro() == set(expanded())
    copy.set("cluster.train_workers", 7)  # where to run is no reason to run
    assert copy.repro() == set()
    copy.set("evaluate.bootstrap_samples", 7)
    after = ("evaluate", "register", "compare", "report")
    assert copy.repro() == names(*after)
    copy.set("train.clip_grad_norm", 7.0)
    assert copy.repro() == names("initialise", "train", *after)
    copy.set("risclip.train.epochs", 7)  # the second stage alone
    trained = names("train", *after, only="risclip") | names("compare")
    assert copy.repro() == trained
    copy.set("clip_vit.steps", 7)  # all CLIPs are looked at again; CRIS starts from another and is left alone
    assert copy.repro() == names("pretrain_clip", only="vit") | names("initialise") | trained
    copy.set("proposals.felzenszwalb.sigma", 0.7)
    chosen = names("train", "register", only="global_local")
    assert copy.repro() == chosen | names("propose", "initialise", "evaluate", "compare", "report")
    with (copy.root / "ris_core/training/pretrain.py").open("a") as file:
        file.write("# changed\n")
    # What they wrote is the same: evaluation stays.
    assert copy.repro() == names("pretrain_clip", "initialise", "train")
    assert '"value"' in copy.dvc("metrics", "show", "--json")

"""Aliases moved by hand, each move with who and why; a store that was moved; versions with different code in one process."""

from __future__ import annotations

import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from dvc.cli import parse_args
from pipelines_world import Workplace, export_untrained
from tiny_world import Tiny

from pipelines import packaging, registry, reproduce, tracking, versions
from pipelines.registry import Action
from ris_core import files
from ris_core.errors import ClusterError, ConfigError, DataError

NAME = "ris-cris-shapes"
WHY = "users complained"


def register(count: int, **tags: str) -> None:
    """Versions that hold nothing but tags; the first is champion."""
    client = tracking.connect()
    client.create_registered_model(NAME)
    for number in range(1, count + 1):
        told = {"metric": "mIoU", "split": "val", "protocol": "ours", "score": f"0.4{number}000", **tags}
        client.create_model_version(NAME, "file:///nowhere", tags={**told, "val/mIoU": f"0.4{number} [0.40, 0.50]"})
    versions.move(client, NAME, "champion", "1", "gate", "the first")


def champion() -> str:
    return str(tracking.connect().get_model_version_by_alias(NAME, "champion").version)


def test_a_move_by_hand_is_kept_with_who_and_why(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(3)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    registry.main(Action.PROMOTE, f"{NAME}/2", "champion", "it is right about plates")
    assert champion() == "2"
    shown = capsys.readouterr().out
    assert f"{NAME}@champion: version 1 -> version 2, promote by ada@" in shown
    registry.main(Action.PROMOTE, f"models:/{NAME}/3", "champion", "faster")
    registry.main(Action.ROLLBACK, NAME, "champion", WHY)
    assert champion() == "2"
    registry.main(Action.ROLLBACK, f"{NAME}@champion", "champion", WHY)
    assert champion() == "1", "each going back undoes one more move"
    with pytest.raises(ClusterError, match="no version of ris-cris-shapes was champion before"):
        registry.main(Action.ROLLBACK, NAME, "champion", WHY)
    made = versions.moves(tracking.connect(), NAME)
    assert [(each.before, each.version, each.how, each.why) for each in made] == [
        (None, "1", "gate", "the first"),
        ("1", "2", "promote", "it is right about plates"),
        ("2", "3", "promote", "faster"),
        ("3", "2", "rollback", WHY),
        ("2", "1", "rollback", WHY),
    ]
    capsys.readouterr()
    registry.main(Action.SHOW, NAME)
    shown = capsys.readouterr().out
    assert shown.count("promote by ada@") == 2
    assert "0.41 [0.40, 0.50]" in shown
    registry.main(Action.PROMOTE, f"{NAME}/3", "champion", "again")
    registry.main(Action.ROLLBACK, NAME, "champion", WHY)
    assert champion() == "1"


def test_other_hands_may_have_moved_it(store: Path) -> None:
    register(3)
    client = tracking.connect()
    client.set_registered_model_alias(NAME, "champion", "2")  # in MLflow's own page
    registry.main(Action.PROMOTE, f"{NAME}/3", "champion", "better")
    registry.main(Action.ROLLBACK, NAME, "champion", WHY)
    assert champion() == "2"
    client.set_registered_model_alias(NAME, "champion", "3")
    registry.main(Action.ROLLBACK, NAME, "champion", WHY)
    assert champion() == "2"
    client.delete_model_version(NAME, "1")
    with pytest.raises(ClusterError, match="version 1 of ris-cris-shapes, which was champion before, was deleted"):
        registry.main(Action.ROLLBACK, NAME, "champion", WHY)


def test_a_challenger_that_becomes_champion_is_no_challenger(store: Path) -> None:
    register(2)
    client = tracking.connect()
    versions.move(client, NAME, versions.CHALLENGER, "2", "gate", "not surely better")
    registry.main(Action.PROMOTE, f"{NAME}@challenger", "champion", "we looked at the pictures")
    assert client.get_registered_model(NAME).aliases == {"champion": 2}
    registry.main(Action.PROMOTE, f"{NAME}/1", "shadow", "to compare")
    assert client.get_registered_model(NAME).aliases == {"champion": 2, "shadow": 1}


@pytest.mark.parametrize(
    ("action", "model", "why", "told"),
    [
        (Action.PROMOTE, f"{NAME}/2", None, "give the reason, which is kept with the move"),
        (Action.PROMOTE, f"{NAME}/2", " ", "give the reason"),
        (Action.PROMOTE, None, WHY, "ris registry promote needs a model"),
        (Action.PROMOTE, NAME, WHY, "names no version: use NAME/NUMBER or NAME@ALIAS"),
        (Action.PROMOTE, f"{NAME}/one", WHY, "names no version"),
        (Action.PROMOTE, f"{NAME}/7", WHY, f"has no {NAME}/7; versions of {NAME}: 1, 2"),
        (Action.PROMOTE, f"{NAME}/1", WHY, f"{NAME}/1 is champion already"),
        (Action.SHOW, "ris-dog", None, "has no model ris-dog"),
        (Action.SHOW, "ris-dog@champion", None, "has no ris-dog@champion; versions of ris-dog: none"),
        (Action.LIST, "ris-dog", None, "has no versions of ris-dog"),
        (Action.ROLLBACK, "ris-dog", WHY, "has no model ris-dog"),
    ],
)
def test_what_cannot_be_done_says_why(
    action: Action, model: str | None, why: str | None, told: str, store: Path
) -> None:
    register(2)
    with pytest.raises((ClusterError, ConfigError), match=told):
        registry.main(action, model, "champion", why)
    assert champion() == "1"
    assert {model.name for model in tracking.connect().search_registered_models()} == {NAME}


def test_all_versions_in_a_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ClusterError, match="has no versions"):
        registry.main(Action.LIST)
    register(2)
    registry.main(Action.LIST)
    head, second, first = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "version", "aliases"]
    assert second.split()[:4] == [NAME, "2", "mIoU", "0.42"]
    assert first.split()[:5] == [NAME, "1", "champion", "mIoU", "0.41"]


class Server:
    """As much of an MLflow server as the tag that keeps registrations apart needs."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def get_registered_model(self, _: str) -> Server:
        return self

    def set_registered_model_tag(self, _: str, key: str, value: str) -> None:
        self.tags[key] = value

    def delete_registered_model_tag(self, _: str, key: str) -> None:
        del self.tags[key]


def test_a_server_lets_one_in_at_a_time_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "uri", lambda: "http://tracking:5000")
    monkeypatch.setattr(versions, "SETTLED", 0.05)
    server: Any = Server()
    inside: list[int] = []
    most: list[int] = []

    def one(number: int) -> None:
        with versions.alone(server, NAME):
            inside.append(number)
            most.append(len(inside))
            versions.time.sleep(0.1)
            inside.remove(number)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(one, range(3)))
    assert most == [1, 1, 1]
    assert server.tags == {}
    assert "is being registered by" in capsys.readouterr().err
    server.tags[versions.REGISTERING] = "dead@nowhere 7 00 | 1000000000"
    one(3)
    assert server.tags == {}


@pytest.fixture
def project(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with its embedded store and a version in it."""
    place = tmp_path / "before" / "project"
    place.mkdir(parents=True)
    enter(place, monkeypatch)
    export_untrained(tiny, Path("models/cris-shapes"))
    add(Path("models/cris-shapes"), "first")
    return place


def enter(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a project as another process would: MLflow keeps the store of the last one in the environment."""
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def add(folder: Path, name: str) -> str:
    tracking.connect()
    run_id = tracking.open_run("ris", name, {}, {})
    scratch = Path(f"scratch-{name}")
    (scratch / versions.EVALUATION).mkdir(parents=True)
    files.write_json(scratch / versions.EVALUATION / versions.LINEAGE, {})
    number = packaging.log(run_id, NAME, folder, {"name": name}, scratch)
    shutil.rmtree(scratch)
    return number


def test_a_project_that_was_moved_finds_its_versions_and_writes_no_more_to_the_old_place(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = project.parent.parent / "after with space" / "project"
    moved.parent.mkdir()
    project.rename(moved)
    enter(moved, monkeypatch)
    folder = versions.fetch(f"models:/{NAME}/1")
    assert (folder / "model.safetensors").is_file()
    told = capsys.readouterr().err
    assert (
        f"was beside {(project / 'mlflow/artifacts').as_uri()} and is beside {(moved / 'mlflow/artifacts').as_uri()}"
        in told
    )
    assert add(Path("models/cris-shapes"), "second") == "2"
    assert not project.exists(), "nothing is written into the old place"
    assert (versions.fetch(f"models:/{NAME}/2") / "model.json").is_file()
    assert mlflow.pyfunc.load_model(f"models:/{NAME}/1").predict(packaging.example())["error"].tolist() == [None]
    assert capsys.readouterr().err.count("was beside") == 0, "once is enough"


def test_a_copy_of_a_project_is_a_project_of_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = project.parent / "copy"
    shutil.copytree(project, copy)
    enter(copy, monkeypatch)
    assert add(Path("models/cris-shapes"), "second") == "2"
    before = {path.relative_to(project) for path in project.rglob("*")}
    enter(project, monkeypatch)
    with pytest.raises(ClusterError, match=f"has no {NAME}/2; versions of {NAME}: 1"):
        versions.find(tracking.connect(), f"{NAME}/2")
    assert (versions.fetch(f"models:/{NAME}/1") / "model.json").is_file()
    assert {path.relative_to(project) for path in project.rglob("*")} == before


def test_files_that_are_gone_are_told_with_their_place(project: Path) -> None:
    (place,) = (project / "mlflow/artifacts/models").iterdir()
    shutil.rmtree(place)
    with pytest.raises(ClusterError, match=r"cannot be loaded from sqlite:.*mlflow/artifacts/models/m-") as told:
        versions.fetch(f"models:/{NAME}/1")
    assert "\n" not in str(told.value)


def test_a_store_whose_files_lie_elsewhere_stays_as_it_is(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "mlflow/artifacts", tmp_path / "artifacts")
    with sqlite3.connect(project / "mlflow/mlflow.db") as database:
        database.execute("UPDATE experiments SET artifact_location = ?", ((tmp_path / "artifacts").as_uri(),))
    tracking.connect()
    with sqlite3.connect(project / "mlflow/mlflow.db") as database:
        found = {place for (place,) in database.execute("SELECT artifact_location FROM experiments")}
    assert found == {(tmp_path / "artifacts").as_uri()}


def test_versions_with_different_code_answer_in_one_process(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "other code"
    shutil.copytree(packaging.ROOT / "ris_core", root / "ris_core", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pipelines").mkdir()
    shutil.copy(packaging.ROOT / "pipelines" / packaging.SERVED, root / "pipelines")
    source = root / "ris_core/models/answer.py"
    content = source.read_text()
    changed = content.replace("masks = _above(found, reading.threshold)", "masks = ~_above(found, reading.threshold)")
    assert changed != content
    source.write_text(changed)
    monkeypatch.setattr(packaging, "ROOT", root)
    assert add(Path("models/cris-shapes"), "second") == "2"
    first, second = (mlflow.pyfunc.load_model(f"models:/{NAME}/{number}") for number in (1, 2))
    request = packaging.example()
    area = []
    for model in (first, second, first):
        (answer,) = model.predict(request).to_dict("records")
        assert answer["error"] is None
        area.append(packaging_area(answer))
    assert area[0] + area[1] == 48 * 64, "what one marks the other leaves out"
    assert area[0] == area[2]


def packaging_area(answer: dict[str, Any]) -> int:
    from ris_core.data import masks

    return masks.area(answer["counts"], answer["height"], answer["width"])


TAGS = {
    "git_commit": "a" * 40,
    "data_digest": "d" * 64,
    "clip_digest": "c" * 64,
    "config_digest": "f" * 16,
    "weights_sha256": "e" * 64,
    "threads": "3",
    "score": "0.41000",
}


def told_by(monkeypatch: pytest.MonkeyPatch, place: Path, **tags: str) -> None:
    """A version that tells this of itself."""
    files.write_json(
        place / versions.LINEAGE, {"model": NAME, "system": "cris", "dataset": "shapes", "tags": TAGS | tags}
    )
    (place / "params.yaml").write_text("preset: default\n")
    monkeypatch.setattr(versions, "fetch", lambda model, part: place)


def test_how_a_version_is_made_again_is_printed(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told_by(monkeypatch, tmp_path)
    reproduce.main(f"models:/{NAME}@champion")
    lines = capsys.readouterr().out.splitlines()
    plain = [line for line in lines if not line.startswith("#")]
    assert plain[0].startswith("git clone --quiet --no-checkout ")
    assert plain[1] == f"git -C reproduced/{NAME}-{'a' * 12} checkout --quiet --detach {'a' * 40}"
    begun, _, rest = plain[2].partition(" -m dvc ")
    assert begun.startswith("env OMP_NUM_THREADS=3 /")  # sums are added up in the order of threads
    started = rest.split()
    understood = parse_args(started)  # by DVC itself
    assert (understood.cd, understood.cmd, understood.targets) == (
        f"reproduced/{NAME}-{'a' * 12}",
        "repro",
        ["evaluate@cris-shapes"],
    )
    assert f"# then weights_sha256 should be {'e' * 64}" in lines
    assert not Path("reproduced").exists()


def test_what_cannot_be_made_again_exactly_is_refused(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=f"this repository does not have the commit {'a' * 40}: fetch it"):
        reproduce.main(f"models:/{NAME}@champion", execute=True)
    told_by(monkeypatch, tmp_path, git_commit=f"{'a' * 40}-dirty")
    with pytest.raises(ConfigError, match=r"not known exactly: it was made at 'a+-dirty'; .*exists: give another"):
        reproduce.main(f"models:/{NAME}@champion", execute=True, to=tmp_path)
    (tmp_path / versions.LINEAGE).write_text("{}")
    with pytest.raises(ClusterError, match="does not tell how it was made"):
        reproduce.main(f"models:/{NAME}@champion")


def test_what_comes_out_is_compared(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands are played; what they would make is there."""
    workplace.link("model")
    info = json.loads((workplace.trained / "model.json").read_text())
    metrics = {"ours": {"val": {"mIoU": 0.41}}}
    files.write_json(workplace.root / "results/evaluate/cris-shapes/metrics.json", metrics)
    told = {key: info["info"][key] for key in ("data_digest", "clip_digest", "config_digest")}
    told |= {"weights_sha256": info["weights_sha256"], "protocol": "ours", "split": "val", "metric": "mIoU"}
    monkeypatch.setattr(reproduce, "check_runnable", lambda *_: None)
    monkeypatch.setattr(reproduce, "perform", lambda *_: None)
    told_by(monkeypatch, tmp_path, **told)
    reproduce.main(f"models:/{NAME}@champion", execute=True, to=workplace.root)
    assert capsys.readouterr().out.endswith(
        f"the same data, CLIP, configuration, weights and score as models:/{NAME}@champion\n"
    )
    told_by(monkeypatch, tmp_path, **{**told, "weights_sha256": "0" * 64, "score": "0.42000"})
    with pytest.raises(DataError, match=r"has another weights_sha256, score than models:/"):
        reproduce.main(f"models:/{NAME}@champion", execute=True, to=workplace.root)

"""`ris submit`: what travels, under which name, how its log and its results come back, and what a job leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pipelines_world import REPOSITORY, contents, python, wait_for
from ray.job_submission import JobStatus

from pipelines import fingerprint, job, outputs, packing, submit, transport
from pipelines.outputs import Ledger, Outputs
from pipelines.params import Params, load_params
from pipelines.transport import Parcel
from ris_core.errors import ClusterError, ConfigError
from ris_core.storage import Storage

NEEDED = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "RAY_ADDRESS": "http://127.0.0.1:9"}
GIT = ("git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.org")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transport, "_held", {})


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("RIS_STORAGE", str(tmp_path / "storage"))
    return Storage(tmp_path / "storage")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository in which this process is, with data that git ignores."""
    root = tmp_path / "clone"
    write(
        root,
        {
            ".gitignore": (REPOSITORY / ".gitignore").read_text(),
            "params.yaml": "datasets: [shapes]\n",
            "pipelines/code.py": "print('old')\n",
            "results/score.json": "1",
            "tests/test_code.py": "",
            "docs/how.md": "",
            "data/raw/shapes/a.jpg": "picture a",
            "data/raw/shapes/b.jpg": "picture b",
            "data/records/shapes.parquet": "records",
            "models/cris-shapes/model.safetensors": "weights",
            "mlflow/mlflow.db": "the store",
            "mlflow/registered/cris-shapes.json": "1",
        },
    )
    subprocess.run([*GIT, "init", "-q"], cwd=root, check=True)
    subprocess.run([*GIT, "add", "-A"], cwd=root, check=True)
    subprocess.run([*GIT, "commit", "-qm", "first"], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def lock(**stages: dict[str, Any]) -> str:
    return json.dumps({"schema": "2.0", "stages": stages})  # JSON is YAML


# What travels


def test_code_travels_as_git_knows_it(clone: Path, tmp_path: Path) -> None:
    write(clone, {"new.py": "x", "a name with spaces\n.txt": "", "a.log": "", "pipelines/code.py": "print('new')\n"})
    (clone / "results/score.json").unlink()
    package = packing.package(tmp_path / "package")
    assert set(contents(package.folder)) == {
        ".gitignore",
        "a name with spaces\n.txt",
        "new.py",
        "params.yaml",
        "pipelines/code.py",
    }
    assert (package.folder / "pipelines/code.py").read_text() == "print('new')\n"


def test_a_package_has_another_name_when_anything_in_it_changed(clone: Path, tmp_path: Path) -> None:
    names = [packing.package(tmp_path / "0").digest, packing.package(tmp_path / "1").digest]
    (clone / "tests/test_code.py").write_text("not in it")
    names.append(packing.package(tmp_path / "2").digest)
    assert len(set(names)) == 1
    (clone / "params.yaml").write_text("datasets: [shapes+]\n")
    names.append(packing.package(tmp_path / "3").digest)
    (clone / "pipelines/code.py").chmod(0o755)
    names.append(packing.package(tmp_path / "4").digest)
    (clone / "pipelines/code.py").rename(clone / "pipelines/moved.py")
    names.append(packing.package(tmp_path / "5").digest)
    assert len(set(names)) == 4


def test_outside_of_a_repository_nothing_can_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match=r"is no git repository .* run from a clone"):
        packing.package(tmp_path / "package")


ALL_DATA = [
    "data/raw/shapes/a.jpg",
    "data/raw/shapes/b.jpg",
    "data/records/shapes.parquet",
    "mlflow/registered/cris-shapes.json",
    "models/cris-shapes/model.safetensors",
]


def test_a_stage_takes_the_data_that_it_reads_and_any_other_command_all(clone: Path) -> None:
    params = load_params(clone / "params.yaml")
    write(clone, {"data/raw/.a.partial-1.jpg": "", "data/shards.partial/part.arrow": "", "models/cris.old/model": ""})
    reads = [{"path": "data/raw/shapes"}, {"path": "pipelines/code.py"}, {"path": "data/nowhere"}]
    cmd = "python -m pipelines.preprocess --dataset shapes"
    write(clone, {"dvc.lock": lock(preprocess={"cmd": cmd, "deps": reads}, other={"cmd": ["a", "b"]})})
    assert packing.data(cmd.split(), params) == ["data/raw/shapes/a.jpg", "data/raw/shapes/b.jpg"]
    assert packing.data([*cmd.split(), "--more"], params) == ALL_DATA
    assert packing.data(["dvc", "repro"], params) == ALL_DATA
    (clone / "dvc.lock").write_text("cut: [")
    assert packing.data(cmd.split(), params) == ALL_DATA
    (clone / "dvc.lock").unlink()
    assert packing.data(cmd.split(), params) == ALL_DATA


def test_prepare_takes_the_datasets_whose_images_it_leaves_out(clone: Path, tiny_params: Params) -> None:
    cmd = "python -m pipelines.prepare --dataset shapes"
    write(clone, {"dvc.lock": lock(prepare={"cmd": cmd, "deps": [{"path": "data/records"}]})})
    tiny_params.prepare.exclude_images_of = ["shapes"]
    assert packing.data(cmd.split(), tiny_params) == [
        "data/raw/shapes/a.jpg",
        "data/raw/shapes/b.jpg",
        "data/records/shapes.parquet",
    ]


@pytest.fixture
def tiny_params(clone: Path) -> Params:
    return load_params(clone / "params.yaml")


def test_data_behind_a_link_travel(clone: Path, tmp_path: Path, storage: Storage, tiny_params: Params) -> None:
    """As the photos of a real dataset do."""
    (clone / "data/raw").rename(tmp_path / "elsewhere")
    (clone / "data/raw").symlink_to(tmp_path / "elsewhere")
    parcel = packing.send(packing.data(["dvc", "repro"], tiny_params), storage)
    assert list(parcel.files) == ALL_DATA
    assert packing.received(parcel.digest, storage) == parcel


def test_only_what_the_storage_lacks_is_sent(
    clone: Path, storage: Storage, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.send(ALL_DATA, storage)
    sent: list[str] = []
    upload = Storage.upload
    monkeypatch.setattr(
        Storage, "upload", lambda self, source, name: (sent.append(str(source)), upload(self, source, name))
    )
    (clone / "data/records/shapes.parquet").write_text("others")
    packing.send(ALL_DATA, storage)
    assert sent == ["data/records/shapes.parquet"]


def test_the_environment_that_goes_along(clone: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "MY_OWN", "NOT_MINE", "PYTHONHASHSEED", "RIS_CACHE_GB"):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("RIS_STORAGE", "storage")
    carried = packing.environment(["MY_OWN"])
    expected = {
        "AWS_SECRET_ACCESS_KEY": "value of AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_URI": "http://tracking:5000",
        "MY_OWN": "value of MY_OWN",
        "PYTHONHASHSEED": "value of PYTHONHASHSEED",
        "RIS_GIT_COMMIT": fingerprint.git_commit(),
        "RIS_STORAGE": str(clone / "storage"),  # found from anywhere
    }
    assert expected.items() <= carried.items()
    assert not {"AWS_PROFILE", "NOT_MINE", "PATH", "RIS_CACHE", "RIS_CACHE_GB"} & carried.keys()
    assert "RIS_CACHE" in packing.environment(["RIS_CACHE"])  # who asks for it gets it


def test_the_commit_of_a_job_is_that_of_the_repository_it_came_from(
    clone: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("RIS_GIT_COMMIT", "another")
    assert fingerprint.git_commit() == commit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert fingerprint.git_commit() == "another"
    monkeypatch.delenv("RIS_GIT_COMMIT")
    assert fingerprint.git_commit() == "unknown"


def test_equal_calls_are_one_job_and_others_are_not() -> None:
    environment = {"RIS_STORAGE": "s3://one", "AWS_SESSION_TOKEN": "old", "RIS_GIT_COMMIT": "abc"}

    def name(code: str = "code", command: str = "dvc repro", parcel: str = "parcel", **changed: str) -> str:
        return packing.job_name(code, command.split(), parcel, {**environment, **changed})

    assert name().startswith("ris-")
    assert name() == name(AWS_SESSION_TOKEN="renewed", RIS_GIT_COMMIT="abc, with the same content")
    others = [
        name("other code"),
        name(command="dvc repro --force"),
        name(parcel="other data"),
        name(RIS_STORAGE="s3://two"),
        name(ADDED="variable"),
    ]
    assert len({name(), *others}) == 6


# What must be there


def test_all_that_a_job_lacks_is_told_at_once(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (clone / "params.yaml").write_text("train: {epoks: 3}\n")
    for name in ("RAY_ADDRESS", "RIS_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError) as told:
        submit.ready(["NOWHERE_SET"])
    for part in (
        "nothing was submitted (5 problems)",
        "--env NOWHERE_SET: it is not set here",
        "train.epoks: unknown parameter; did you mean 'epochs'?",
        "RIS_STORAGE is not set",
        "RAY_ADDRESS is not set",
        "MLFLOW_TRACKING_URI is not set",
    ):
        assert part in str(told.value)


@pytest.mark.parametrize("store", ["sqlite:///mlflow.db", "file:///runs", "mlflow/runs"])
def test_a_store_of_files_would_be_lost(
    store: str, clone: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(submit, "connected", lambda address: None)
    with pytest.raises(
        ClusterError, match=f"MLFLOW_TRACKING_URI is {store}: .* would stay in the job's folder and be lost"
    ):
        submit.ready([])


def test_a_head_that_is_not_there_is_told_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (
        f"http://127.0.0.1:{port}",
        f"127.0.0.1:{port}",
        f"ray://127.0.0.1:{port}",
        "http://no head:x",
        "head",
    ):
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"no job server of Ray's answers at RAY_ADDRESS={address} "):
            submit.connected(address)
        assert time.monotonic() - started < 10


# The job server, whose answers are these


class Server:
    """What `submit` asks of Ray's client; `chunks` are logs as connections bring them, None for one that breaks."""

    def __init__(self, status: JobStatus | None, *connections: list[str | None], code: int | None = 0):
        self.status = status
        self.connections = list(connections)
        self.code = code
        self.submitted: dict[str, Any] = {}
        self.deleted: list[str] = []

    def get_job_status(self, job: str) -> JobStatus:
        if self.status is None:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return self.status

    def get_job_info(self, job: str) -> SimpleNamespace:
        over = not self.connections
        status = self.get_job_status(job) if over else JobStatus.RUNNING
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="the node died")

    def get_job_logs(self, job: str) -> str:
        return "one\ntwo\nthree\n"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for chunk in self.connections.pop(0) if self.connections else []:
            if chunk is None:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield chunk

    def delete_job(self, job: str) -> bool:
        self.deleted.append(job)
        return True

    def submit_job(self, **arguments: Any) -> str:
        place = Path(arguments["runtime_env"]["working_dir"])
        self.submitted = {**arguments, "files": set(contents(place))}
        return str(arguments["submission_id"])


def test_every_line_is_printed_once_however_often_the_connection_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server = Server(JobStatus.SUCCEEDED, ["one\n", None], [None], ["one\ntw", "o\nth", None])
    assert submit.followed(server, "ris-1") == 0  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\nthree\n"
    assert shown.err.count("the connection to the cluster is lost (WebSocket connection closed") == 1


def test_a_connection_that_fell_silent_is_made_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Server):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            import asyncio

            yield self.connections.pop(0)[0] or ""
            await asyncio.sleep(3600)

    monkeypatch.setattr(submit, "QUIET", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert submit.followed(Silent(JobStatus.SUCCEEDED, ["one\n"], ["one\ntwo\n"]), "ris-1") == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_the_exit_code_is_the_commands(status: JobStatus, code: int | None, expected: int) -> None:
    assert submit.followed(Server(status, code=code), "ris-1") == expected  # type: ignore[arg-type]


def test_jobs_that_are_lost_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ClusterError, match=r"failed before its command ended: the node died\. Run the same command again"
    ):
        submit.followed(Server(JobStatus.FAILED, code=None), "ris-1")  # type: ignore[arg-type]
    with pytest.raises(
        ClusterError, match=r"knows nothing of ris-1 any more: its head was started anew\. Run the same"
    ):
        submit.followed(Server(None), "ris-1")  # type: ignore[arg-type]
    monkeypatch.setattr(submit, "PATIENCE", 0)
    with pytest.raises(ClusterError, match="head has not answered for 0 s"):
        submit.followed(Server(JobStatus.RUNNING, [None]), "ris-1")  # type: ignore[arg-type]


def test_a_new_command_is_submitted_whole(clone: Path, storage: Storage) -> None:
    server = Server(None)
    command = ["sh", "-c", "echo 'a  b' \"$HOME\"; exit 3"]
    carried = packing.environment([])
    name = submit.handed_over(server, storage, command, carried)  # type: ignore[arg-type]
    assert server.submitted["submission_id"] == name
    assert server.submitted["runtime_env"]["env_vars"] == carried
    assert server.submitted["files"] == {".gitignore", "params.yaml", "pipelines/code.py", "results/score.json"}
    assert not Path(server.submitted["runtime_env"]["working_dir"]).exists()
    entry = shlex.split(server.submitted["entrypoint"])
    assert entry[:4] == ["exec", "python", "-m", "pipelines.job"]
    assert (entry[5], entry[7:]) == (name, command)
    assert list(packing.received(entry[4], storage).files) == ALL_DATA


@pytest.mark.parametrize(
    ("status", "left", "said", "again"),
    [
        (JobStatus.RUNNING, False, "it runs already: watching it", False),
        (JobStatus.PENDING, False, "it runs already: watching it", False),
        (JobStatus.SUCCEEDED, True, "it has succeeded before: taking what it left", False),
        (JobStatus.SUCCEEDED, False, "an earlier try left nothing: trying again", True),
        (JobStatus.FAILED, True, "an earlier try failed: trying again", True),
        (JobStatus.STOPPED, True, "an earlier try was stopped: trying again", True),
    ],
)
def test_what_an_equal_call_finds(
    status: JobStatus,
    left: bool,
    said: str,
    again: bool,
    clone: Path,
    storage: Storage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = Server(None)
    name = submit.handed_over(fresh, storage, ["dvc", "repro"], {})  # type: ignore[arg-type]
    if left:
        made = Outputs(0, Parcel(storage.place, {}))
        storage.write(outputs.name(name), json.dumps(made.plain()).encode())
    server = Server(status)
    assert submit.handed_over(server, storage, ["dvc", "repro"], {}) == name  # type: ignore[arg-type]
    assert said in capsys.readouterr().err
    assert server.deleted == [name] * again
    assert bool(server.submitted) == again
    assert (outputs.read(storage, name) is not None) == (left and not again)  # what is old is not taken for new


# What comes back


def test_what_a_command_made_gets_where_it_was_asked_for(clone: Path, tmp_path: Path, storage: Storage) -> None:
    here, before = outputs.stamps(Path(), outputs.found(Path())), contents(clone)
    there = copied(clone, tmp_path / "there")
    ledger = Ledger(there, {"data/raw/shapes/a.jpg": transport.give(there / "data/raw/shapes/a.jpg", storage.place)})
    (there / "data/raw/shapes/b.jpg").unlink()
    shutil.rmtree(there / "models/cris-shapes")
    (there / "results/score.json").unlink()
    new = {
        "data/raw/shapes/c.jpg": "picture c",
        "data/records/shapes.parquet": "other records",
        "dvc.lock": "new",
        "results/new/curve.csv": "1,2",
        "runs/checkpoint": "no result",
        "pipelines/code.py": "no result either",
        "data/raw/shapes/.d.partial-1.jpg": "not finished",
    }
    write(there, new)
    units = ["data/raw/shapes", "data/records/shapes.parquet", "models/cris-shapes", "results/gone"]
    made = round_trip(ledger.collected(0, storage, units))
    assert (made.folders, made.removed) == (["data/raw/shapes"], ["models/cris-shapes", "results/score.json"])
    changed, aside = outputs.put(made, storage, here, "ris-1")
    expected = {
        **{name: content for name, content in before.items() if name not in REMOVED},
        **{name: new[name].encode() for name in list(new)[:4]},
    }
    assert without_git(contents(clone)) == without_git(expected)
    assert aside == []
    assert sorted(changed) == sorted([*made.folders, *made.files, *made.removed])
    assert outputs.put(made, storage, here, "ris-1") == ([], [])  # again: it is all there


REMOVED = ("data/raw/shapes/b.jpg", "models/cris-shapes/model.safetensors", "results/score.json")


def copied(clone: Path, there: Path) -> Path:
    write(there, {name: content.decode() for name, content in without_git(contents(clone)).items()})
    return there


def without_git(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".git/")}


def round_trip(made: Outputs) -> Outputs:
    return Outputs.of(json.loads(json.dumps(made.plain())))


def test_a_command_that_failed_takes_nothing_away(clone: Path, tmp_path: Path, storage: Storage) -> None:
    """DVC empties the place of an output before the stage that fails to make it."""
    there = copied(clone, tmp_path / "there")
    ledger = Ledger(there, {})
    (there / "models/cris-shapes/model.safetensors").unlink()
    write(there, {"results/score.json": "2"})
    made = ledger.collected(3, storage, ["models/cris-shapes"])
    assert (made.code, made.files, made.folders, made.removed) == (3, ["results/score.json"], [], [])


def test_what_was_changed_here_meanwhile_is_set_aside(clone: Path, tmp_path: Path, storage: Storage) -> None:
    here = outputs.stamps(Path(), outputs.found(Path()))
    there = copied(clone, tmp_path / "there")
    ledger = Ledger(there, {})
    write(there, {"results/score.json": "2", "data/raw/shapes/a.jpg": "another", "dvc.lock": "theirs"})
    shutil.rmtree(there / "models/cris-shapes")
    made = ledger.collected(0, storage, ["data/raw/shapes", "models/cris-shapes"])
    mine = {
        "results/score.json": "mine",
        "data/raw/shapes/mine.jpg": "mine",
        "models/cris-shapes/mine.json": "mine",
        "dvc.lock": "mine",
        "params.yaml": "mine",
        "results/mine.json": "mine",
    }
    write(clone, mine)
    _, aside = outputs.put(made, storage, here, "ris-1")
    kept = ["data/raw/shapes", "dvc.lock", "models/cris-shapes", "results/score.json"]
    assert sorted(aside) == [outputs.SET_ASIDE / "ris-1" / name for name in kept]
    for name in list(mine)[:4]:
        assert (outputs.SET_ASIDE / "ris-1" / name).read_text() == "mine"
        assert not Path(name).exists() or Path(name).read_text() != "mine"
    assert Path("params.yaml").read_text() == Path("results/mine.json").read_text() == "mine"


def test_who_is_stopped_while_fetching_has_what_was_there(
    clone: Path, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, before = outputs.stamps(Path(), outputs.found(Path())), outputs.found(Path())
    there = copied(clone, tmp_path / "there")
    ledger = Ledger(there, {})
    write(there, {"results/score.json": "2", "data/raw/shapes/a.jpg": "another", "data/raw/shapes/c.jpg": "new"})
    made = ledger.collected(0, storage, ["data/raw/shapes"])
    (damaged,) = (name for name in storage.names() if name.endswith(made.parcel.files["data/raw/shapes/c.jpg"][0]))
    content = storage.read(damaged)
    storage.write(damaged, b"dam")
    with pytest.raises(ClusterError, match="was not what its name says"):
        outputs.put(made, storage, here, "ris-1")
    assert outputs.found(Path()) == before
    assert Path("results/score.json").read_text() == "1"
    assert [name for name in packing.known_to_git() if "partial" in name] == []
    storage.write(damaged, content)
    outputs.put(made, storage, here, "ris-1")
    assert Path("data/raw/shapes/c.jpg").read_text() == "new"
    assert [path for path in clone.rglob("*partial*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["pipelines/code.py", "data/../../other", "/etc/passwd", "resultsx", ".git/hooks/x"])
def test_outputs_are_put_nowhere_else(name: str) -> None:
    parcel = Parcel("storage", {} if ".." in name or name.startswith("/") else {name: ("0", 1)})
    with pytest.raises(ClusterError, match="outputs name files that are no results"):
        round_trip(Outputs(0, parcel, files=[name]))


DVC_YAML = """
stages:
  first: {cmd: "echo data > data/first", outs: [data/first]}
  second: {cmd: "mkdir -p results/second data/second; cp data/first data/second/copy; cp data/first results/second",
    deps: [data/first], outs: [data/second, {results/second: {cache: false}}]}
"""


def test_outputs_that_came_are_up_to_date_for_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    write(tmp_path, {"dvc.yaml": DVC_YAML, "data/.keep": "", ".dvcignore": "*.partial\n"})
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")
    dvc("repro")
    assert sorted(outputs.folders()) == ["data/first", "data/second", "results/second"]
    kept = Path("dvc.lock").read_bytes()
    for path in Path(".dvc/cache").rglob("*"):
        if path.is_file():
            path.unlink()
    write(tmp_path, {"data/second/mine": "not what the lock says"})
    assert outputs.into_cache() == ["first"]
    assert set(json.loads(dvc("status", "--json"))) == {"second"}
    Path("data/second/mine").unlink()
    assert outputs.into_cache() == ["second"]
    assert dvc("repro").count("didn't change, skipping") == 2
    assert Path("dvc.lock").read_bytes() == kept
    assert outputs.into_cache() == []


# Where it runs


def test_a_job_has_a_folder_of_its_own(clone: Path, tmp_path: Path, storage: Storage) -> None:
    parcel = packing.send(ALL_DATA, storage)
    package = packing.package(tmp_path / "package").folder
    os.chdir(package)
    with job.folder_of("ris-1") as folder:
        ledger = job.lay_out(folder, job.given(parcel.digest, storage))
        assert without_git(contents(folder)).keys() == {*contents(package), *ALL_DATA}
        (cached,) = transport.cache_folder().glob("*/content/data/raw/shapes/a.jpg")
        assert (folder / "data/raw/shapes/a.jpg").samefile(cached)  # nothing is copied
        made = ledger.collected(0, storage, [])
        assert (made.folders, made.files, made.removed) == ([], [], [])
        (folder / "pipelines/code.py").write_text("changed")
    assert not folder.exists()
    assert (package / "pipelines/code.py").read_text() == "print('old')\n"


def test_folders_of_jobs_that_were_killed_are_removed(storage: Storage) -> None:
    with job.folder_of("ris-1") as alive:
        write(alive.parent, {"ris-0/data/big": "left"})
        with job.folder_of("ris-2"):
            assert alive.is_dir()
            assert not (alive.parent / "ris-0").exists()


def test_a_node_that_sees_another_storage_says_so(storage: Storage) -> None:
    with pytest.raises(ClusterError, match=r"has no parcel 0123 on the node .* sees another folder under that name"):
        job.given("0123", storage)


def a_job(clone: Path, storage: Storage, command: list[str]) -> list[str]:
    """The arguments of a Python that runs a job, in the folder that is the package."""
    parcel = packing.send(ALL_DATA, storage)
    return ["-m", "pipelines.job", parcel.digest, "ris-1", "--", *command]


def test_a_job_runs_its_command_and_gives_what_it_made(clone: Path, storage: Storage) -> None:
    script = (
        "import os, sys; import where; print(where.__file__); print(sys.argv[1]); open('results/score.json', 'w').write('2');"
        "open('data/records/shapes.parquet', 'a').write(' damaged'); os.remove('data/raw/shapes/b.jpg'); sys.exit(3)"
    )
    (clone / "where.py").touch()
    done = python(*a_job(clone, storage, ["python", "-c", script, "a 'quoted'  $word"]), cwd=clone)
    assert done.returncode == 3, done.stderr
    where, word = done.stdout.splitlines()
    assert Path(where) == transport.cache_folder() / ".jobs/ris-1/where.py"
    assert word == "a 'quoted'  $word"
    made = outputs.read(storage, "ris-1")
    assert made is not None
    assert (made.code, made.removed) == (3, [])
    assert made.files == ["data/records/shapes.parquet", "results/score.json"]
    assert not (transport.cache_folder() / ".jobs/ris-1").exists()
    assert (clone / "results/score.json").read_text() == "1"


def test_a_job_that_is_stopped_ends_what_it_started_and_gives_what_is_done(clone: Path, storage: Storage) -> None:
    script = "echo 2 > results/score.json; sleep 1000 & echo $! > results/pid; touch models/begun; wait"
    command = [sys.executable, *a_job(clone, storage, ["sh", "-c", script])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=clone, env=environment, start_new_session=True)
    try:
        begun = transport.cache_folder() / ".jobs/ris-1/models/begun"
        wait_for(begun.exists, process)  # type: ignore[arg-type]
        sleeping = int((begun.parents[1] / "results/pid").read_text())
        os.killpg(process.pid, signal.SIGTERM)  # as Ray tells every process of a job
        assert process.wait(60) == 143
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.kill(sleeping, 0)
    made = outputs.read(storage, "ris-1")
    assert made is not None
    assert (made.code, made.files) == (143, ["models/begun", "results/pid", "results/score.json"])


@pytest.mark.parametrize(
    ("threads", "carried", "expected"), [("1", {}, ""), ("4", {}, "4"), ("1", {"OMP_NUM_THREADS": "1"}, "1")]
)
def test_a_job_computes_with_as_many_threads_as_its_command_would_here(
    threads: str, carried: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray lets whoever takes no CPU have one; sums over other numbers of threads differ."""
    monkeypatch.setattr(job.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": carried}}))
    assert job.execute(["sh", "-c", f'test "$OMP_NUM_THREADS" = "{expected}"'], tmp_path) == 0


def test_a_command_that_is_not_there(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job.signal, "signal", lambda number, handler: None)
    assert job.execute(["no-such-command"], tmp_path) == 127
    assert "error: no-such-command cannot be run: No such file or directory" in capsys.readouterr().err


# All of it


@contextmanager
def head() -> Iterator[str]:
    """A Ray cluster of one node, as a user starts it; the address of its job server."""
    dashboard, *ports = (str(free_port()) for _ in range(4))
    with tempfile.TemporaryDirectory(prefix="ris-") as place:  # short, as sockets lie in it
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--port", ports[0], "--dashboard-port", dashboard, "--dashboard-host", "127.0.0.1", "--num-cpus", "1"),
            *("--dashboard-agent-listen-port", ports[1], "--ray-client-server-port", ports[2], "--temp-dir", place),
            *("--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"),
        ]
        # What jobs run with is what the head was started with.
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(lambda: _answers(f"{address}/api/version"), process)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.ray
def test_a_command_goes_to_a_cluster_and_survives_whoever_asked_for_it(
    clone: Path, tmp_path: Path, storage: Storage
) -> None:
    for package in ("pipelines", "ris_core"):
        (clone / package).mkdir(exist_ok=True)
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", package], cwd=REPOSITORY, capture_output=True, text=True
        )
        write(
            clone,
            {name: (REPOSITORY / name).read_text() for name in tracked.stdout.split() if (REPOSITORY / name).is_file()},
        )
    go = tmp_path / "go"
    wait = f"while ! [ -e {go} ]; do sleep 0.1; done"
    script = f"cat data/records/*; echo; {wait}; echo 'the  end'; echo 2 > results/score.json; exit 3"
    environment = {**os.environ, **NEEDED, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "pipelines.cli", "submit", "--", "sh", "-c", script]

    def asked() -> subprocess.Popen[str]:
        """A call that has printed what the job's first line is."""
        process = subprocess.Popen(
            command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line == "records\n":
                return process
        pytest.fail(f"the job did not begin: {process.communicate()[1]}")

    with head() as environment["RAY_ADDRESS"]:
        first = asked()
        first.kill()
        first.communicate()
        second = asked()
        go.touch()
        log, told = second.communicate(timeout=120)
    assert second.returncode == 3, told
    assert "it runs already: watching it from here on" in told
    assert log == "the  end\n"
    assert "brought 1 outputs" in told
    assert (clone / "results/score.json").read_text() == "2\n"

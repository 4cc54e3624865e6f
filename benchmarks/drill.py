"""The drill: what training loses when a worker, a node, the driver, the tracking server, the disk or a file goes away.

make drill        python -m benchmarks.drill [--record] [--short] [--only NAME ...]

A head and two nodes (see `benchmarks.nodes`) that share nothing but an S3 store (SeaweedFS); an MLflow server of its own, on
PostgreSQL where that is installed and may be started; a small world made by the stages themselves. An undisturbed training
comes first; then each fault is done to the same training, which has to end with the same weights, to the bit where the
number of workers is the same. A line that does not hold makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from benchmarks.measure import RECORDS, machine
from benchmarks.nodes import HEAD, PORT, Nodes
from pipelines import tracking
from pipelines.fingerprint import git_commit
from ris_core.errors import ClusterError
from ris_core.files import file_sha256, write_json
from ris_core.storage import Storage

REPOSITORY = Path(__file__).parent.parent
EVERY = 10  # steps between checkpoints
STEPS, EPOCHS = 40, 2
WITHIN = 400  # seconds for a training, with all that is done to it
S3, TRACKING = 9000, 5000
BUCKET = "drill"
SMALL = {
    "systems": ["cris"],
    "clips": ["rn"],
    "synthesize": {"train": 96, "val": 12, "test": 4, "canvas": 96},
    "preprocess": {"image_size": 64, "images_per_shard": 24},
    "clip_rn": {"steps": 3, "scenes_per_step": 8},
    "cris": {"model": {"num_layers": 1, "ffn_dim": 64}},
    "train": {
        "epochs": EPOCHS,
        "steps_per_epoch": STEPS,
        "batch_images": 4,
        "expressions_per_image": 2,
        "checkpoint_every_steps": EVERY,
        "validate_images": 8,
    },
    "cluster": {"train_workers": 2, "cpus_per_worker": 1, "max_failures": 2},
}
TRAIN = ("train", "--system", "cris", "--dataset", "shapes")
MODEL = Path("models/cris-shapes/model.safetensors")
# What the driver runs: the stage, with workers that note every step they do, and what it saw.
NOTING = """
import os, sys, time
from pathlib import Path
import ray.cloudpickle
from pipelines import ray_training, stage, train
notes, pace = Path(os.environ["RIS_NOTES"]), float(os.environ["RIS_PACE"])
worker = ray_training.train_worker
def noting(config):
    from ris_core.training.loop import Trainer
    whole = Trainer._step
    def step(self, batch, number):
        time.sleep(pace)
        found = whole(self, batch, number)
        seen = int(batch["target"].long().sum())
        with (notes / str(os.getpid())).open("a") as note:
            note.write(f"{time.time()} {self.runtime.rank} {self.runtime.world} {number} {seen}\\n")
        return found
    Trainer._step = step
    ray_training_worker(config)
def ray_training_worker(config):
    from pipelines import ray_training
    ray_training.train_worker(config)
ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
ray_training.train_worker = noting
sys.argv = ["train", "--system", "cris", "--dataset", "shapes"]
stage.run(train.main)
"""


@dataclass(frozen=True)
class Step:
    """One step that a worker did: when, which rank of how many, its number, and a sum over what it saw."""

    time: float
    rank: int
    world: int
    number: int
    seen: int
    pid: int


@dataclass
class Line:
    """What a fault did: steps done twice, seconds from the fault to the next step, what became of the weights."""

    fault: str
    lost: int | None = None
    seconds: float | None = None
    weights: str = ""
    runs: int | None = None
    told: str = ""
    problems: list[str] = field(default_factory=list)


class Drill:
    """The world of a drill: nodes, servers, a workspace, and what an undisturbed training came to."""

    def __init__(self, nodes: Nodes, place: Path):
        self.nodes, self.place = nodes, place
        self.work, self.notes = place / "work", place / "notes"
        self.host = nodes.address(HEAD)
        self.bucket = f"s3://{BUCKET}/storage"
        self.tracking_uri = f"http://{self.host}:{TRACKING}"
        self.tracking: subprocess.Popen[bytes] | None = None
        self.store = ""
        self.weights = ""
        self.seen: dict[int, int] = {}
        os.environ.update(
            AWS_ACCESS_KEY_ID="drill",
            AWS_SECRET_ACCESS_KEY="drilldrill",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=f"http://{self.host}:{S3}",
            AWS_EC2_METADATA_DISABLED="true",
            MLFLOW_HTTP_REQUEST_TIMEOUT="10",
            MLFLOW_TRACKING_URI=self.tracking_uri,
            PYTHONPATH=str(REPOSITORY),
            RAY_ADDRESS=f"{self.host}:{PORT}",
            RIS_CACHE=str(place / "cache0"),
            RIS_NOTES=str(self.notes),
            RIS_PACE="0.05",
            RIS_STORAGE=self.bucket,
        )

    def serve(self) -> None:
        """Start the S3 server and the tracking server on the head."""
        folder = self.place / "s3"
        folder.mkdir()
        quiet = [
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]
        sockets = [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]
        where = [f"-dir={folder}", f"-ip={self.host}", "-ip.bind=0.0.0.0", f"-s3.port={S3}", f"-bucket={BUCKET}"]
        weed = str(Path(sys.executable).with_name("weed"))
        self.nodes.run(HEAD, [weed, "mini", *where, *quiet, *sockets], {}, (self.place / "s3.log").open("ab"))
        _within(60, lambda: urllib.request.urlopen(f"http://{self.host}:{S3}/healthz", timeout=2).status == 200)
        self.store = self.postgres() or f"sqlite:///{self.place}/mlflow.db"
        print(f"MLflow keeps its runs in {self.store.split(':')[0]}")
        self.start_tracking()
        _within(60, lambda: Storage(self.bucket).names() is not None)

    def postgres(self) -> str | None:
        """Start a PostgreSQL of Debian's as the user that it wants to be; its address, None where that cannot be done."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found or os.geteuid() != 0:
            return None
        programs, data = found[-1].parent, self.place / "postgres"
        data.mkdir()
        shutil.chown(data, "postgres", "postgres")
        run_as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        make = [
            str(programs / "initdb"),
            "-D",
            str(data / "db"),
            "--username=mlflow",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run([*run_as, *make, "--locale=C"], cwd=data, check=True, capture_output=True)
        serve = [str(programs / "postgres"), "-D", str(data / "db"), "-h", self.host, "-p", "5432", "-k", str(data)]
        with (data / "db/pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")
        self.nodes.run(HEAD, [*run_as, *serve], {}, (self.place / "postgres.log").open("ab"))
        create = [str(programs / "createdb"), "-h", self.host, "-U", "mlflow", "mlflow"]
        _within(60, lambda: subprocess.run(create, capture_output=True, check=False).returncode == 0)
        return f"postgresql+psycopg2://mlflow@{self.host}:5432/mlflow"

    def start_tracking(self) -> None:
        store = ["--backend-store-uri", self.store]
        artifacts = ["--artifacts-destination", str(self.place / "artifacts")]
        where = ["--host", self.host, "--port", str(TRACKING), "--workers", "1", "--allowed-hosts", "*"]
        command = [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *where]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.tracking = self.nodes.run(HEAD, command, quiet, (self.place / "mlflow.log").open("ab"))
        _within(120, lambda: urllib.request.urlopen(f"{self.tracking_uri}/health", timeout=2).status == 200)

    def stage(self, verb: str, *arguments: str) -> None:
        """Run a stage to its end. Raises RuntimeError, with what it printed, if it fails."""
        command = [sys.executable, "-m", f"pipelines.{verb}", *arguments]
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True, timeout=WITHIN, check=False)
        if done.returncode:
            raise RuntimeError(f"stage {verb} failed:\n{done.stdout}{done.stderr}")

    def make_world(self) -> None:
        """Let the stages make data, CLIP and start model; those on Ray Data run on the nodes."""
        params = OmegaConf.merge(OmegaConf.load(REPOSITORY / "params.yaml"), SMALL)
        params.presets = {"default": {}}
        OmegaConf.save(params, self.work / "params.yaml")
        self.stage("synthesize", "--dataset", "shapes")
        self.stage("prepare", "--dataset", "shapes")
        self.stage("preprocess", "--dataset", "shapes")
        self.stage("pretrain_clip", "--clip", "rn")
        self.stage("initialise", "--system", "cris", "--dataset", "shapes")

    def change(self, **sections: Any) -> None:
        """Change parameters that decide no result."""
        path = self.work / "params.yaml"
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), OmegaConf.create(sections)), path)

    @contextmanager
    def training(self, **environment: str) -> Iterator[Training]:
        """Start the stage `train`; it is killed if it has not ended when the block does."""
        running = Training(self, environment)
        try:
            yield running
        finally:
            running.kill()

    def fresh(self) -> None:
        """Forget what trainings left, but not the world that they begin with."""
        for folder in {name.split("/")[0] for name in Storage(self.bucket).names() if name.startswith("train-")}:
            Storage(self.bucket).delete_folder(folder)
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        shutil.rmtree(self.work / MODEL.parent, ignore_errors=True)
        client = tracking.connect()
        for run in self.runs():
            client.delete_run(run)

    def steps(self) -> list[Step]:
        """List the steps of all workers, in the order in which they were done."""
        found = []
        for note in self.notes.iterdir():
            for parts in map(str.split, note.read_text().splitlines()):
                if len(parts) == 5:
                    rank, world, number, seen = map(int, parts[1:])
                    found.append(Step(float(parts[0]), rank, world, number, seen, int(note.name)))
        return sorted(found, key=lambda step: step.time)

    def runs(self) -> list[str]:
        """List the trainings that the tracking server knows, by their run ids."""
        client = tracking.connect()
        experiment = client.get_experiment_by_name("ris")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        return [run.info.run_id for run in found if run.data.tags.get("ris.stage") == "train"]

    def checkpoints(self, storage: str = "") -> tuple[Storage, list[str]]:
        """Give the storage of the training's checkpoints, and their names, oldest first."""
        place = Storage(storage or self.bucket)
        run = next((name.split("/")[0] for name in place.names() if name.startswith("train-")), "train-none")
        below = place.below(f"{run}/checkpoints")
        return below, [name.split("/")[0] for name in below.names() if name.endswith("state.json")]

    def judged(self, line: Line, fault_at: float | None = None, workers: int = 2) -> Line:
        """Compare what a training came to with the undisturbed one."""
        steps = self.steps()
        if fault_at is not None:
            before = [step.number for step in steps if step.time <= fault_at]
            after = [step for step in steps if step.time > fault_at and step.number <= max(before)]
            again = [step for step in after if step.pid not in {s.pid for s in steps if s.time <= fault_at}]
            later = [
                step.time
                for step in steps
                if step.time > fault_at and step.pid not in {s.pid for s in steps if s.time <= fault_at}
            ]
            line.lost = len({step.number for step in again})
            line.seconds = round(min(later) - fault_at, 1) if later else None
            if line.lost > EVERY:
                line.problems.append(f"{line.lost} steps lost, {EVERY} allowed")
            if not later:
                line.problems.append("no step was done after the fault")
        same = (self.work / MODEL).is_file() and file_sha256(self.work / MODEL) == self.weights
        line.weights = "identical" if same else "other sums" if workers != 2 else "DIFFERENT"
        if workers == 2 and not same:
            line.problems.append("the final weights differ")
        seen: dict[int, dict[int, int]] = {}
        for step in steps:
            seen.setdefault(step.number, {})[step.rank if step.world > 1 else -1] = step.seen
        other = [
            n for n, by in seen.items() if self.seen and self.seen[n] not in (by.get(-1), by.get(0, 0) + by.get(1, 0))
        ]
        if other or len(seen) != STEPS * EPOCHS:
            line.problems.append(f"other samples than undisturbed at {len(other)} steps of {len(seen)}")
        line.runs = len(self.runs())
        if line.runs != 1:
            line.problems.append(f"{line.runs} MLflow runs")
        else:
            line.problems += self._logged_twice_or_not()
        return line

    def _logged_twice_or_not(self) -> list[str]:
        client = tracking.connect()
        steps = [point.step for point in client.get_metric_history(self.runs()[0], "train/loss")]
        return [] if sorted(steps) == list(range(20, STEPS * EPOCHS + 1, 20)) else [f"train/loss was logged at {steps}"]


class Training:
    """A run of the stage `train` on the nodes of a drill."""

    def __init__(self, drill: Drill, environment: dict[str, str]):
        self.drill, self.log = drill, drill.place / f"train-{time.time_ns()}.log"
        command = [sys.executable, "-c", NOTING]
        self.process = subprocess.Popen(
            command,
            cwd=drill.work,
            env={**os.environ, **environment},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def reached(self, number: int, since: float = 0) -> Step:
        """Wait until rank 1, or the only one, has done a step of that number after a time."""

        def found() -> Step | None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the training ended before step {number}:\n{self.said()}")
            ranks = [step for step in self.drill.steps() if step.number >= number and step.time > since]
            return next((step for step in ranks if step.rank == step.world - 1), None)

        return _within(WITHIN, found)

    def ended(self, code: int = 0) -> None:
        """Wait for its end. Raises RuntimeError, with what it printed, if its exit code is another."""
        found = self.process.wait(WITHIN)
        if found != code:
            raise RuntimeError(f"the training ended with {found}, not {code}:\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def undisturbed(drill: Drill) -> Line:
    began = time.time()
    with drill.training() as training:
        training.ended()
    drill.weights = file_sha256(drill.work / MODEL)
    for step in drill.steps():
        drill.seen[step.number] = drill.seen.get(step.number, 0) + step.seen
    line = drill.judged(Line("none"))
    first, last = drill.steps()[0].time, drill.steps()[-1].time
    line.told = f"first step after {first - began:.0f} s, steps for {last - first:.0f} s"
    began = time.time()
    with drill.training() as training:
        training.ended()
    line.told += f"; asked again: {time.time() - began:.1f} s"
    return line


def worker_killed(drill: Drill) -> Line:
    with drill.training() as training:
        os.kill(training.reached(STEPS + 17).pid, signal.SIGKILL)
        at = time.time()
        training.ended()
        return drill.judged(Line("a worker killed", told=told(training, "interrupted")), at)


def node_replaced(drill: Drill) -> Line:
    with drill.training() as training:
        training.reached(STEPS + 17)
        drill.nodes.kill(2)
        at = time.time()
        time.sleep(15)
        drill.nodes.start(2)
        training.ended()
        return drill.judged(
            Line("a node killed, another joins after 15 s", told=told(training, "waiting for nodes")), at
        )


def node_lost(drill: Drill) -> Line:
    drill.change(cluster={"train_workers": [1, 2]})
    try:
        with drill.training() as training:
            training.reached(STEPS + 17)
            drill.nodes.kill(2)
            at = time.time()
            training.ended()
            line = Line(
                "a node killed, none joins, cluster.train_workers: [1, 2]", told=told(training, "training with")
            )
            return drill.judged(line, at, workers=1)
    finally:
        drill.nodes.start(2)
        drill.change(cluster={"train_workers": 2})


def driver_killed(drill: Drill, number: int = signal.SIGKILL) -> Line:
    with drill.training() as training:
        pid = training.reached(STEPS + 17).pid
        training.process.send_signal(number)
        at = time.time()
        training.process.wait(60)
        _within(60, lambda: not psutil.pid_exists(pid))
        gone = time.time() - at
    with drill.training() as training:
        training.ended()
        name = signal.Signals(number).name
        return drill.judged(
            Line(f"the driver gets {name}, started again", told=f"its workers ended in {gone:.0f} s"), at
        )


def driver_terminated(drill: Drill) -> Line:
    return driver_killed(drill, signal.SIGTERM)


def driver_interrupted(drill: Drill) -> Line:
    return driver_killed(drill, signal.SIGINT)


def tracking_away(drill: Drill) -> Line:
    with drill.training() as training:
        training.reached(15)
        assert drill.tracking is not None
        drill.tracking.kill()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "mlflow" in " ".join(child.cmdline()) and "server" in " ".join(child.cmdline()):
                    child.kill()
        at = time.time()
        training.reached(STEPS * EPOCHS - 1)
        went = time.time() - at
        time.sleep(max(0.0, 60 - went))
        drill.start_tracking()
        training.ended()
    steps = [step for step in drill.steps() if step.rank == 0]
    gaps = [second.time - first.time for first, second in pairwise(steps)]
    before = sorted(gap for gap, step in zip(gaps, steps, strict=False) if step.time < at)
    away = sorted(gap for gap, step in zip(gaps, steps, strict=False) if step.time >= at)
    slower = away[len(away) // 2] / before[len(before) // 2]
    line = Line("the tracking server away for a minute", told=f"a step took {slower:.2f} times as long meanwhile")
    if slower > 1.3 or max(away[:-2]) > 5:
        line.problems.append(f"training was slowed: {slower:.2f}, longest step {max(away):.1f} s")
    return drill.judged(line)


def disk_full(drill: Drill) -> Line:
    """On one machine with a small disk as storage: what a node of it would write to is full."""
    disk = drill.place / "disk"
    filler = disk / "filler"
    with drill.training(RIS_STORAGE=str(disk), RAY_ADDRESS="", MLFLOW_TRACKING_URI=drill.tracking_uri) as training:
        training.reached(STEPS + 5)
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"0" * 65536)
        at = time.time()
        training.ended(code=1)
        error = told(training, "error:")
    line = Line("the disk full, and room again at the next start", told=error[:150])
    if training.said().count("Traceback") or "No space" not in error:
        line.problems.append("not one clear error")
    halves = [folder for folder in disk.glob("train-*/checkpoints/*") if not (folder / "state.json").exists()]
    if halves:
        line.problems.append(f"half a checkpoint is left: {halves[0].name}")
    filler.unlink()
    with drill.training(RIS_STORAGE=str(disk), RAY_ADDRESS="") as training:
        training.ended()
    return drill.judged(line, at)


def damaged(what: str) -> Callable[[Drill], Line]:
    """Alter, cut or delete the newest checkpoint's weights while nobody trains."""

    def fault(drill: Drill) -> Line:
        with drill.training() as training:
            training.reached(STEPS + 27)
            training.kill()
            at = time.time()
        place, names = drill.checkpoints()
        name = f"{names[-1]}/last.safetensors"
        content = bytearray(place.read(name))
        content[len(content) // 2] ^= 1
        if what == "deleted":
            place.delete(name)
        else:
            place.write(name, bytes(content) if what == "altered by a bit" else bytes(content[:-1000]))
        with drill.training() as training:
            training.ended()
            line = drill.judged(Line(f"the newest checkpoint {what}", told=told(training, "warning:")[-90:]), at)
        line.problems = [p for p in line.problems if "steps lost" not in p or (line.lost or 0) > 2 * EVERY]
        if f"going on from {names[-2]}" not in training.said():
            line.problems.append(f"it did not go on from {names[-2]}")
        return line

    return fault


def shard_altered(drill: Drill) -> Line:
    shard = next((drill.work / "data/shards/shapes").glob("*.arrow"))
    content = shard.read_bytes()
    altered = bytearray(content)
    altered[len(altered) // 2] ^= 1
    shard.write_bytes(bytes(altered))
    try:
        with drill.training() as training:
            training.ended(code=1)
            line = Line("a shard altered by a bit", told=told(training, "error:")[:90])
            line.problems += (
                [] if "other bytes than were written" in line.told else ["it was not found by its checksum"]
            )
    finally:
        shard.write_bytes(content)
    return line


def model_altered(drill: Drill) -> Line:
    weights = drill.work / "models/start/cris-shapes/model.safetensors"
    content = weights.read_bytes()
    altered = bytearray(content)
    altered[-5] ^= 1
    weights.write_bytes(bytes(altered))
    try:
        with drill.training() as training:
            training.ended(code=1)
            line = Line("the start model altered by a bit", told=told(training, "error:")[:150])
            line.problems += [] if "checksums differ" in line.told else ["it was not found by its checksum"]
    finally:
        weights.write_bytes(content)
    return line


def object_altered(drill: Drill) -> Line:
    """What the storage holds for the nodes, and what a node's cache holds."""
    place = Storage(drill.bucket)
    name, size = max(
        ((name, place.sizes(name)[0] or 0) for name in place.names() if name.startswith("objects/")),
        key=lambda item: item[1],
    )
    content = bytearray(place.read(name))
    content[size // 2] ^= 1
    place.write(name, bytes(content))
    for node in (1, 2):
        shutil.rmtree(drill.place / f"cache{node}", ignore_errors=True)
    with drill.training() as training:
        training.ended(code=1)
        line = Line("an object in the bucket altered by a bit", told=told(training, "error:")[:160])
        line.problems += [] if "not what its name says" in training.said() else ["it was not found by its checksum"]
    with drill.training() as training:
        training.ended()
    line = drill.judged(line)
    kept = next(file for file in (drill.place / "cache1").rglob("*.arrow"))
    kept.write_bytes(kept.read_bytes()[:-10])
    drill.fresh()
    with drill.training() as training:
        training.ended()
        line.problems += (
            [] if "fetching it again" in training.said() else ["a cut file in a node's cache was not found"]
        )
    return drill.judged(line)


def head_restarted(drill: Drill) -> Line:
    with drill.training() as training:
        training.reached(STEPS + 17)
        for node in (2, 1, HEAD):
            drill.nodes.kill(node)
        at = time.time()
        training.process.wait(180)
    for node in (HEAD, 1, 2):
        drill.nodes.start(node)
    with drill.training() as training:
        training.ended()
        return drill.judged(Line("the head restarted, nodes and driver started again"), at)


def nobody_sees(drill: Drill) -> Line:
    with drill.training(RIS_STORAGE=str(drill.work / "runs")) as training:
        training.ended(code=1)
        line = Line("a storage folder that the nodes do not see", told=told(training, "error:")[:120])
        line.problems += [] if "nodes that do not reach the storage" in line.told else ["it was not told at the start"]
    return line


FAULTS: dict[str, Callable[[Drill], Line]] = {
    "worker": worker_killed,
    "node": node_replaced,
    "fewer": node_lost,
    "kill": driver_killed,
    "term": driver_terminated,
    "int": driver_interrupted,
    "tracking": tracking_away,
    "disk": disk_full,
    "altered": damaged("altered by a bit"),
    "cut": damaged("cut"),
    "deleted": damaged("deleted"),
    "shard": shard_altered,
    "model": model_altered,
    "object": object_altered,
    "storage": nobody_sees,
    "head": head_restarted,
}
SHORT = ("node",)
APART_ONLY = (
    "object",
    "storage",
    "disk",
)  # where all nodes see the same files nothing travels; a small disk needs root
DISK = "size=250m"


def told(training: Training, about: str) -> str:
    """Give the last line of a log that has a word in it."""
    return next((line.strip() for line in reversed(training.said().splitlines()) if about in line), "")


def _within(seconds: float, what: Callable[[], Any]) -> Any:
    """Ask again and again until the answer is yes; it."""
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if found := what():
                return found
        except (OSError, ClusterError) as error:
            last = error
        time.sleep(0.2)
    raise RuntimeError(f"it did not happen in {seconds:.0f} s ({last})")


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep the table under benchmarks/records/")
    parser.add_argument("--short", action="store_true", help=f"of the faults only {', '.join(SHORT)}")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these faults")
    parser.add_argument("--keep", action="store_true", help="keep logs and storage, and tell where")
    arguments = parser.parse_args()
    chosen = arguments.only or (SHORT if arguments.short else tuple(FAULTS))
    place = Path(tempfile.mkdtemp(prefix="ris-drill-"))
    lines, before = [], machine()
    place.chmod(0o755)  # PostgreSQL runs as another user
    for name in ("work", "disk"):
        (place / name).mkdir()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with Nodes(2, place, [REPOSITORY / "pipelines", REPOSITORY / "ris_core", place / "work"]) as nodes:
            drill = Drill(nodes, place)
            if nodes.apart:
                subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "ris-drill", str(place / "disk")], check=True)
            print(f"two nodes {'in namespaces of their own' if nodes.apart else 'on one host, which share all files'}")
            drill.serve()
            drill.make_world()
            for name, fault in {"none": undisturbed, **{name: FAULTS[name] for name in chosen}}.items():
                if name in APART_ONLY and not nodes.apart:
                    continue
                drill.fresh()
                try:
                    line = fault(drill)
                except (RuntimeError, subprocess.TimeoutExpired, OSError, StopIteration) as error:
                    line = Line(name, problems=[f"{type(error).__name__}: {error}"])
                lines.append(line)
                print(shown(line), flush=True)
    finally:
        subprocess.run(["umount", str(place / "disk")], capture_output=True, check=False)
        if arguments.keep:
            print(f"kept in {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    if arguments.record:
        path = RECORDS / f"{time.strftime('%Y-%m-%d')}-drill.json"
        settings = {"steps_between_checkpoints": EVERY, "steps": STEPS * EPOCHS, "apart": nodes.apart}
        content = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "machine": before, "settings": settings}
        write_json(path, {**content, "lines": [asdict(line) for line in lines]})
    if failed := [line.fault for line in lines if line.problems]:
        sys.exit(f"these do not hold: {'; '.join(failed)}")


def shown(line: Line) -> str:
    """Write a line of the table."""
    numbers = [
        f"{line.lost} steps lost" if line.lost is not None else "",
        f"{line.seconds:.0f} s to the next" if line.seconds is not None else "",
        f"weights {line.weights}" if line.weights else "",
        f"{line.runs} MLflow run{'s' if line.runs != 1 else ''}" if line.runs is not None else "",
    ]
    problems = [f"\n    NOT AS IT SHOULD: {problem}" for problem in line.problems]
    text = ", ".join(filter(None, numbers))
    return f"{line.fault}: {text}{f' ({line.told})' if line.told else ''}{''.join(problems)}"


if __name__ == "__main__":
    main()

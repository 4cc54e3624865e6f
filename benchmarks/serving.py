"""The service beside the predictor it serves, and beside `mlflow models serve`; and under load and hostile requests.

python -m benchmarks.serving [--model models:/ris-cris-shapes@champion] [--seconds 60] [--record]
python -m benchmarks.serving --fuzz 2000

Needs a model in the registry, which `dvc repro` makes. Clients are threads of this process, on the same cores as the server.

Four loads of 640x480 photos, one expression a request: one client beside the predictor in process (images that are known,
images that are new); eight clients, who keep a server busy, beside MLflow's server (seven expressions about each image, as
in RefCOCO, and images that are all new); fifty clients, every answer compared with the one that a client alone got.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import fuzz_service
from benchmarks.clients import Client, Server, load, mlflow_serve, percentile, requested, ris_serve
from benchmarks.fuzz_service import Sent
from benchmarks.measure import Report
from benchmarks.samples import WORDS, photos
from pipelines.serve import find, leave_a_core
from ris_core.data.masks import decode
from ris_core.predictor import RISPredictor

SATURATING, MANY = 8, 50  # clients
KNOWN, TEXTS = 12, 7  # images that are asked about again and again, and expressions about each
NEW = 400  # images of which each is asked about once, in turn: more than any cache here holds while they come round
TURNS = 60  # requests of the client alone, of each kind
SETTLED = 10.0  # seconds of load after which memory is looked at for the first time
MOST_PIXELS = 3  # of a mask that may fall to the other side of the threshold
SEED = 20261126

Body = Callable[[str, str], bytes]  # of an image in base64 and a text


def of_service(image: str, text: str) -> bytes:
    return json.dumps({"image": image, "expression": text}).encode()


def of_mlflow(image: str, text: str) -> bytes:
    return json.dumps({"dataframe_split": {"columns": ["image", "text"], "data": [[image, text]]}}).encode()


class Requests:
    """What clients ask: prepared beforehand, so that they cost little."""

    def __init__(self) -> None:
        random = np.random.default_rng(SEED)
        views = photos(random)
        self.known = [next(views) for _ in range(KNOWN)]
        self.new = [next(views) for _ in range(NEW)]
        self.texts = [" ".join(random.choice(WORDS, 4)) for _ in range(TEXTS)]

    def about_known(self, path: str, body: Body) -> list[Sent]:
        """Every text about every known image; neighbours are about the same image."""
        pairs = itertools.product(enumerate(self.known), enumerate(self.texts))
        return [requested(f"known {i}/{j}", body(_text(image), text), path) for (i, image), (j, text) in pairs]

    def about_new(self, path: str, body: Body) -> list[Sent]:
        """One text about each new image."""
        pairs = zip(enumerate(self.new), itertools.cycle(self.texts))
        return [requested(f"new {i}", body(_text(image), text), path) for (i, image), text in pairs]


def _text(image: bytes) -> str:
    return base64.b64encode(image).decode()


class Found(NamedTuple):
    """An answer: its mask in COCO RLE, and its score."""

    counts: str
    height: int
    width: int
    score: float

    def differs(self, other: Found) -> int:
        """The pixels that are in one of the masks alone."""
        if self.counts == other.counts:
            return 0
        return int((decode(*self[:3]) != decode(*other[:3])).sum())


def answer_of(body: bytes) -> Found:
    """Read an answer of either server."""
    content = json.loads(body)
    if "predictions" in content:
        (row,) = content["predictions"]
        return Found(row["counts"], row["height"], row["width"], row["score"])
    (entry,) = content["answers"]
    height, width = entry["mask"]["size"]
    return Found(entry["mask"]["counts"], height, width, entry["score"])


def alone(server: Server, sent: Sequence[Sent]) -> dict[str, Found]:
    """The answer to each request that a client alone gets."""
    client = Client(server.port)
    return {each.name: answer_of(client.send(each)[1]) for each in sent}


class Comparison:
    """Says whether an answer is another than a client alone got.

    Sums are added up in another order in a batch of another size, so that a pixel whose probability is the threshold but for
    a millionth may fall to the other side; these are counted.
    """

    def __init__(self, expected: Mapping[str, Found]):
        self.expected, self.equal, self.nearly, self.most = expected, 0, 0, 0

    def __call__(self, sent: Sent, body: bytes) -> str | None:
        found, right = answer_of(body), self.expected[sent.name]
        pixels = found.differs(right)
        if pixels > MOST_PIXELS or abs(found.score - right.score) > 1e-5:
            return f"another answer: {pixels} pixels differ, score {found.score}, alone {right.score}"
        self.equal += pixels == 0
        self.nearly += pixels > 0
        self.most = max(self.most, pixels)
        return None


def in_turn(sent: Sequence[Sent], clients: int) -> Callable[[int, int], Sent]:
    """All clients together go through the requests in order, again and again."""
    return lambda client, count: sent[(count * clients + client) % len(sent)]


def beside_predictor(report: Report, server: Server, predictor: RISPredictor, requests: Requests) -> None:
    """One client and the predictor in this process with as many threads, in turns."""
    leave_a_core()
    client = Client(server.port)
    known, new = requests.about_known("/v1/segment", of_service), requests.about_new("/v1/segment", of_service)
    encoded = [predictor.encode(image) for image in requests.known]
    alone(server, known)
    for what, ask, compute in (
        (
            "known images",
            lambda n: client.send(known[n % len(known)]),
            lambda n: predictor.answer(encoded[n % len(known) // TEXTS], [requests.texts[n % TEXTS]])[0].rle,
        ),
        (
            "new images",
            lambda n: client.send(new[-1 - n]),
            lambda n: predictor.answer(predictor.encode(requests.new[n]), [requests.texts[n % TEXTS]])[0].rle,
        ),
    ):
        seconds: dict[str, list[float]] = {"service": [], "predictor": []}
        for turn in range(TURNS):
            for name, function in (("service", ask), ("predictor", compute)):
                start = time.perf_counter()
                function(turn)
                seconds[name].append(time.perf_counter() - start)
        service, base = (1e3 * percentile(seconds[name], 0.5) for name in ("service", "predictor"))
        report.add(f"{what}: predictor, p50", base, "ms")
        report.add(f"{what}: service, p50", service, "ms", service / base, "the predictor")
        report.add(f"{what}: service, p95", 1e3 * percentile(seconds["service"], 0.95), "ms")
        report.add(f"{what}: the service's own part, p50", service - base, "ms")


def saturated(report: Report, server: Server, peer: Server, requests: Requests, seconds: float) -> list[str]:
    """Eight clients at each server in turns: faults."""
    faults = []
    for what, make in (("7 expressions an image", Requests.about_known), ("every image new", Requests.about_new)):
        rates: dict[str, float] = {}
        for name, each, path, body in (
            ("mlflow models serve", peer, "/invocations", of_mlflow),
            ("ris serve", server, "/v1/segment", of_service),
        ):
            sent = make(requests, path, body)
            load(each.port, SATURATING, min(3.0, seconds), in_turn(sent[::-1], SATURATING), lambda *_: None)  # warms up
            seen = load(each.port, SATURATING, seconds, in_turn(sent, SATURATING), lambda *_: None)
            faults += seen.faults
            rates[name] = seen.rate
        report.add(f"{SATURATING} clients, {what}: mlflow", rates["mlflow models serve"], "answers/s")
        ratio = rates["ris serve"] / rates["mlflow models serve"]
        report.add(
            f"{SATURATING} clients, {what}: service", rates["ris serve"], "answers/s", ratio, "mlflow models serve"
        )
    same = alone(peer, requests.about_known("/invocations", of_mlflow)[:TEXTS])
    ours = alone(server, requests.about_known("/v1/segment", of_service)[:TEXTS])
    return faults + [f"{name}: the two servers differ" for name in same if same[name].differs(ours[name]) > MOST_PIXELS]


def many(report: Report, server: Server, requests: Requests, seconds: float) -> list[str]:
    """Fifty clients, every answer compared: faults."""
    sent = requests.about_known("/v1/segment", of_service)
    check, order = Comparison(alone(server, sent)), np.random.default_rng(SEED).integers(0, len(sent), (MANY, 10_000))

    def some(client: int, count: int) -> Sent:
        return sent[order[client, count % 10_000]]

    first = load(server.port, MANY, min(SETTLED, seconds), some, check)
    before = server.memory
    seen = load(server.port, MANY, seconds, some, check)
    report.add(f"{MANY} clients: answers", seen.rate, "answers/s")
    report.add(f"{MANY} clients: p50", 1e3 * percentile(seen.seconds, 0.5), "ms")
    report.add(f"{MANY} clients: p95", 1e3 * percentile(seen.seconds, 0.95), "ms")
    for status, count in sorted(seen.counts.items()):
        report.add(f"{MANY} clients: status {status}", count, "")
    report.add(f"{MANY} clients: answers that differ or fail", len(seen.faults) + len(first.faults), "")
    report.add(f"{MANY} clients: answers equal in every pixel", check.equal, "")
    report.add(f"{MANY} clients: answers that differ in at most {check.most} pixels of 307,200", check.nearly, "")
    report.add(f"{MANY} clients: memory before", before, "MiB")
    report.add(f"{MANY} clients: memory after", server.memory, "MiB", server.memory / before, "before")
    return first.faults + seen.faults


def fuzzed(report: Report, server: Server, count: int) -> list[str]:
    """Damaged images and requests: faults."""
    client, faults = Client(server.port), list[str]()
    for what, make in (("images", fuzz_service.images), ("requests", fuzz_service.requests)):
        before, start = server.memory, time.perf_counter()
        counts, wrong = fuzz_service.tried(client.send, make(SEED, count))
        faults += wrong
        for status, number in sorted(counts.items()):
            report.add(f"fuzzed {what}: status {status}", number, "")
        report.add(f"fuzzed {what}: faults", len(wrong), "")
        report.add(f"fuzzed {what}: time", time.perf_counter() - start, "s")
        report.add(f"fuzzed {what}: memory after", server.memory, "MiB", server.memory / before, "before")
    return faults


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, report, and give what was wrong."""
    settings: dict[str, Any] = {"model": args.model, "seconds": args.seconds}
    if args.fuzz:
        report = Report("serving-fuzz", {"model": args.model, "each": args.fuzz, "seed": SEED})
        with ris_serve(args.model) as server:
            yield from fuzzed(report, server, args.fuzz)
        report.finish(args.record)
        return
    report, requests = Report("serving", settings), Requests()
    with ris_serve(args.model) as server:
        beside_predictor(report, server, RISPredictor.from_folder(find(args.model).folder), requests)
        with tempfile.TemporaryDirectory() as place, mlflow_serve(args.model, Path(place) / "mlflow.log") as peer:
            yield from saturated(report, server, peer, requests, args.seconds / 4)
        yield from many(report, server, requests, args.seconds)
    report.finish(args.record)


def main() -> None:
    """Run the benchmark; exit code 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models:/ris-cris-shapes@champion", help="of the registry")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the fifty clients; the others take a quarter each"
    )
    parser.add_argument("--fuzz", type=int, default=0, help="instead, send so many damaged images and requests")
    parser.add_argument("--record", action="store_true", help="keep the table under records/")
    faults = list(run(parser.parse_args()))
    for fault in faults[:20]:
        print(f"FAULT {fault}", file=sys.stderr)
    if faults:
        raise SystemExit(f"{len(faults)} faults")


if __name__ == "__main__":
    main()

"""Images and requests as nobody should send them, and what an answer to them must never be.

Everything is a function of a seed. Each thing sent has a name, so that what went wrong can be sent again.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = str(Path(__file__).resolve().parent.parent)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# Signs of a fault's inside: a traceback, a file of the server's, an object's address.
INSIDES = (b"Traceback", b"site-packages", b'File \\"', b".py", b"/usr/", b"/home/", b" at 0x", ROOT.encode())
UVICORN = b"Invalid HTTP request received."  # of what is no HTTP, and never comes to the service
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
DOCUMENTED = {400, 401, 404, 405, 408, 413, 415, 422, 429, 503}  # refusals; 500 is the fault that is looked for


@dataclass(frozen=True)
class Sent:
    """One request."""

    name: str
    body: bytes
    content_type: str = JSON
    method: str = "POST"
    path: str = "/v1/segment"
    headers: dict[str, str] = field(default_factory=dict)


Send = Callable[[Sent], tuple[int, bytes]]  # the status and body of the answer


def wrong_with(sent: Sent, status: int, body: bytes) -> str | None:
    """What must not be in an answer, if anything is."""
    if status not in DOCUMENTED | {200}:
        return f"{sent.name}: status {status}: {body[:200]!r}"
    inside = [sign.decode() for sign in INSIDES if sign in body]
    if inside and status != 200:
        return f"{sent.name}: status {status} tells {inside}: {body[:300]!r}"
    if status != 200 and len(body) > 20_000:
        return f"{sent.name}: {len(body)} bytes of refusal"
    if (status, body) == (400, UVICORN):
        return None
    try:
        told = json.loads(body) if body else {}
    except ValueError:
        return f"{sent.name}: status {status}, and no JSON: {body[:100]!r}"
    if status != 200 and body and set(told) != {"error"}:
        return f"{sent.name}: status {status} in another form: {body[:200]!r}"
    return None


def tried(send: Send, sent: Iterator[Sent]) -> tuple[Counter[int], list[str]]:
    """Send all: how many answers had each status, and what was wrong."""
    counts: Counter[int] = Counter()
    faults = []
    for each in sent:
        status, body = send(each)
        counts[status] += 1
        if fault := wrong_with(each, status, body):
            faults.append(fault)
    return counts, faults


# ------------------------------------------------------------------ images


def picture(random: np.random.Generator, form: str, side: int = 24) -> bytes:
    """A small whole image of some mode."""
    mode = str(
        random.choice(
            {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"]}.get(form, ["RGB"])
        )
    )
    image = Image.fromarray(random.integers(0, 256, (side, side + 8, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (side, side), dtype=np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def images(seed: int, count: int) -> Iterator[Sent]:
    """Damaged images of all formats, and crafted ones, in JSON and forms by turns."""
    random = np.random.default_rng(seed)
    made = crafted_images()
    for number in range(count):
        if number < len(made):
            name, content = made[number]
        else:
            form = str(random.choice(FORMATS))
            name, content = f"image {seed}/{number} {form}", mutated(picture(random, form), random)
        yield in_json(name, content) if number % 2 else in_form(name, content)


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes flipped, cut, repeated, replaced or inserted, one to eight times; the head more often than the rest."""
    found = bytearray(content)
    for _ in range(int(random.integers(1, 9))):
        if not found:
            break
        end = len(found) if random.random() < 0.5 else min(len(found), 64)
        place = int(random.integers(0, end))
        length = int(random.integers(1, 17))
        match int(random.integers(0, 7)):
            case 0:
                found[place] ^= 1 << int(random.integers(0, 8))
            case 1:
                found[place] = int(random.choice([0, 1, 127, 128, 255]))
            case 2:
                del found[place:]
            case 3:
                del found[place : place + length]
            case 4:
                found[place:place] = random.integers(0, 256, length, dtype=np.uint8).tobytes()
            case 5:
                found[place:place] = found[place : place + length] * 8
            case _:
                found[place : place + 4] = struct.pack(">I", int(random.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])))
    return bytes(found)


def crafted_images() -> list[tuple[str, bytes]]:
    """Images that are meant to harm: bombs, impossible sizes, odd modes, programs in the place of pixels."""
    exif = Image.Exif()
    exif[0x0112] = 99
    frames = [Image.new("P", (16, 16), colour) for colour in range(40)]
    grey = Image.new("L", (20, 20), 90)
    return [
        ("bomb of one colour", png(7000, 7000, colour=0)),
        ("more pixels than a PNG may have", png(2**31 - 1, 2**31 - 1, rows=1)),
        ("wide line", png(1_780_000, 100, rows=1)),
        ("tall line", png(1, 60_000)),
        ("width 0", png(0, 10, rows=1)),
        (
            "a text chunk that unpacks to 50 MB",
            png(8, 8, extra=_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))),
        ),
        ("a profile that is none", png(8, 8, extra=_chunk(b"iCCP", b"p\0\0" + zlib.compress(b"no profile")))),
        ("orientation 99", saved(grey.convert("RGB"), "JPEG", exif=exif)),
        ("EXIF cut", saved(grey, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")),
        ("EXIF is noise", saved(grey, "JPEG", exif=b"Exif\0\0" + bytes(range(256)))),
        ("animation", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        ("pages", saved(grey, "TIFF", save_all=True, append_images=[grey] * 20)),
        ("floats", saved(grey.convert("F"), "TIFF")),
        ("32 bits", saved(grey.convert("I"), "TIFF")),
        ("CMYK", saved(Image.new("CMYK", (20, 20)), "TIFF")),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\nshowpage\n"),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("PPM of huge size", b"P6 99999 99999 255\n"),
        ("PPM of negative size", b"P6 -5 5 255\n123"),
        ("PPM of long numbers", b"P6 " + b"9" * 5000 + b" 5 255\n"),
        ("nothing", b""),
        ("one byte", b"\xff"),
        ("zeros", bytes(100_000)),
        ("a path", b"/etc/passwd"),
        ("a pickle", b"\x80\x04cos\nsystem\n(S'id'\ntR."),
        ("icon", saved(grey, "ICO")),
        ("TIFF whose directory is itself", b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"),
    ]


def png(width: int, height: int, colour: int = 120, rows: int | None = None, extra: bytes = b"") -> bytes:
    """A grey PNG as its header says it, with as many rows as that, or `rows`."""
    pixels = zlib.compress((b"\0" + bytes([colour]) * min(width, 2_000_000)) * (height if rows is None else rows), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def in_json(name: str, content: bytes, **fields: Any) -> Sent:
    """A request about encoded bytes as JSON."""
    whole = {"image": base64.b64encode(content).decode(), "expression": "the red star", **fields}
    return Sent(name, json.dumps(whole).encode())


def in_form(name: str, content: bytes, *fields: tuple[str, str]) -> Sent:
    """The same as a form."""
    return Sent(name, form([("image", content), *(fields or [("expression", "the red star")])]), FORM)


def form(fields: Sequence[tuple[str, str | bytes]]) -> bytes:
    """A multipart body; bytes are files."""
    parts = []
    for name, value in fields:
        file = '; filename="x"\r\nContent-Type: application/octet-stream' if isinstance(value, bytes) else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


# ------------------------------------------------------------------ requests


def requests(seed: int, count: int) -> Iterator[Sent]:
    """Crafted requests first, then right ones damaged: bytes, values, fields, headers."""
    random = np.random.default_rng(seed)
    content = picture(random, "PNG")
    made = crafted_requests(content)
    for number in range(count):
        if number < len(made):
            yield made[number]
            continue
        name = f"request {seed}/{number}"
        match number % 4:
            case 0:
                yield Sent(name, mutated(in_json(name, content).body, random))
            case 1:
                yield Sent(name, mutated(in_form(name, content).body, random), FORM)
            case 2:
                yield Sent(name, json.dumps(_odd_fields(content, random)).encode())
            case _:
                fields = [(str(random.choice(FIELDS)), str(random.choice(TEXTS))) for _ in range(random.integers(1, 6))]
                yield in_form(name, content, *fields)


FIELDS = ["image", "expression", "expressions", "model", "threshold", "masks", "location", "__class__", "a" * 300, ""]
TEXTS = [
    "the red star",
    "",
    " ",
    "0.5",
    "nan",
    "-1",
    "7",
    "true",
    "rle",
    "png",
    "\0",
    "\u202e",
    "é" * 600,
    "<script>",
    "../../etc/passwd",
]
VALUES: list[Any] = [
    *TEXTS,
    None,
    True,
    0,
    -1,
    7,
    1e308,
    10**400,
    [],
    {},
    [[]],
    ["x"] * 65,
    ["a", ""],
    [None],
    {"a": 1},
    "\ud800",
    "A" * 5000,
]


def _odd_fields(content: bytes, random: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {"image": base64.b64encode(content).decode(), "expressions": ["left", "the circle"]}
    for _ in range(int(random.integers(1, 4))):
        found[str(random.choice(FIELDS))] = VALUES[int(random.integers(len(VALUES)))]
    return found


THRESHOLDS: list[Any] = [7, -1, "0.5", True, [], {}, 1e308, 10**400]


def crafted_requests(content: bytes) -> list[Sent]:
    """Requests that are meant to harm, or that people send by mistake."""
    text = base64.b64encode(content).decode()
    right = {"image": text, "expression": "x"}

    def raw(name: str, body: str | bytes, content_type: str = JSON, **headers: str) -> Sent:
        return Sent(name, body.encode() if isinstance(body, str) else body, content_type, headers=headers)

    def fields(name: str, **values: Any) -> Sent:
        return raw(name, json.dumps({**right, **values}))

    inside = json.dumps(right)[:-1]
    body = form([("image", content), ("expression", "x")])
    return [
        raw("empty body", b""),
        raw("null", "null"),
        raw("a list", "[]"),
        raw("a number", "7"),
        raw("not UTF-8", b'{"image": "\xff\xfe"}'),
        raw("UTF-16", json.dumps(right).encode("utf-16")),
        raw("a mark of byte order", b"\xef\xbb\xbf" + json.dumps(right).encode()),
        raw("deep lists", "[" * 100_000),
        raw("deep objects", '{"a":' * 50_000),
        raw("deep inside", inside + ', "model": ' + "[" * 20_000 + "]" * 20_000 + "}"),
        raw("a deep twin", '{"image": ' + "[" * 150 + "]" * 150 + f', "image": "{text}", "expression": "x"}}'),
        raw(
            "a twin with a huge number",
            '{"threshold": ' + "9" * 6000 + f', "threshold": 0.5, "image": "{text}", "expression": "x"}}',
        ),
        raw("twins", inside + ', "expression": "y"}'),
        raw("many fields", "{" + ",".join(f'"f{i}": 0' for i in range(100_000)) + "}"),
        raw("many texts", json.dumps({"image": text, "expressions": ["x"] * 50_000})),
        raw("a field of 100 kB", json.dumps({**right, "f" * 100_000: 1})),
        raw("NaN", inside + ', "threshold": NaN}'),
        raw("infinity", inside + ', "threshold": Infinity}'),
        raw("1e999", inside + ', "threshold": 1e999}'),
        raw("a number of 100,000 digits", inside + ', "threshold": ' + "1" * 100_000 + "}"),
        raw("a lone surrogate", '{"image": "' + text + '", "expression": "red \\ud800"}'),
        raw("a zero in a text", '{"image": "' + text + '", "expression": "red \\u0000 star"}'),
        raw("cut", json.dumps(right)[:-9]),
        raw("two documents", json.dumps(right) * 2),
        raw("JSON as a form", json.dumps(right), FORM),
        raw("a form as JSON", body, JSON),
        raw("text", json.dumps(right), "text/plain"),
        raw("a query as a body", "image=x&expression=y", "application/x-www-form-urlencoded"),
        raw("an image alone", content, "image/png"),
        raw("no content type", json.dumps(right), ""),
        raw("a content type of 8 kB", json.dumps(right), "application/json; x=" + "y" * 8000),
        raw("compressed", zlib.compress(json.dumps(right).encode()), JSON, **{"Content-Encoding": "deflate"}),
        raw("no boundary", body, "multipart/form-data"),
        raw("an empty boundary", body, "multipart/form-data; boundary="),
        raw("a boundary of 5 kB", body, "multipart/form-data; boundary=" + "x" * 5000),
        raw("another boundary", body, "multipart/form-data; boundary=other"),
        *(
            raw(f"charset {name}", body, f"{FORM}; charset={name}")
            for name in ("undefined", "idna", "zlib", "utf-16", "nowhere", "punycode")
        ),
        raw("two charsets", body, f'{FORM}; charset=utf-8; charset="undefined"'),
        raw("a form without an end", body[:-20], FORM),
        raw("a form of nothing", b"", FORM),
        raw("only boundaries", f"--{BOUNDARY}\r\n".encode() * 1000, FORM),
        raw("a part without a name", body.replace(b'; name="expression"', b""), FORM),
        raw("a part of many headers", body.replace(b"\r\n\r\n", b"\r\n" + b"A: b\r\n" * 5000 + b"\r\n", 1), FORM),
        raw("a head without end", f"--{BOUNDARY}\r\nContent-Disposition: ".encode() + b"x" * 200_000, FORM),
        raw("two images", form([("image", content), ("image", content), ("expression", "x")]), FORM),
        raw("an image as text", form([("image", text), ("expression", "x")]), FORM),
        raw("an expression as a file", form([("image", content), ("expression", b"x")]), FORM),
        raw("5,000 fields", form([("image", content), *[("expression", "x")] * 5000]), FORM),
        raw("a long field", form([("image", content), ("expression", "x" * 300_000)]), FORM),
        raw("a form's text is not UTF-8", body.replace(b"\r\n\r\nx", b"\r\n\r\n\xff\xfe"), FORM),
        fields("a path for an image", image="/etc/passwd"),
        fields("an address for an image", image="http://127.0.0.1:1/x.png"),
        fields("a file's address", image="file:///etc/passwd"),
        fields("a data URI of text", image="data:text/plain,hello"),
        fields("5 MB of a character", image="A" * 5_000_000),
        fields("base64 of ideograms", image="漢" * 1000),
        fields("a model of a path", model="../../../etc/passwd"),
        fields("a model of 100 kB", model="m" * 100_000),
        fields("a word of 500 letters", expression="a" * 500),
        fields("a text of 100 kB", expression="red " * 25_000),
        fields("64 long texts", expression=None, expressions=["the " * 120 + str(i) for i in range(64)]),
        fields("65 texts", expression=None, expressions=["x"] * 65),
        fields("no text", expression=None, expressions=[]),
        fields("both", expressions=["y"]),
        fields("a mask of no kind", masks="exe"),
        fields("location as text", location="true"),
        *(fields(f"threshold {value!r:.20}", threshold=value) for value in THRESHOLDS),
        *(
            Sent(f"{method} {path}", b"", method=method, path=path)
            for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS")
            for path in ("/v1/segment", "/nowhere")
        ),
        *(
            Sent(f"path {path}", b"", method="GET", path=path)
            for path in (
                "/../../etc/passwd",
                "/%2e%2e/%2e%2e/etc/passwd",
                "/page.js/../x",
                "/%00",
                "/" + "a" * 5000,
                "/v1/models/",
                "/docs",
            )
        ),
        Sent("a lying length", json.dumps(right).encode(), headers={"Content-Length": "999999999999"}),
        Sent("a length of no number", json.dumps(right).encode(), headers={"Content-Length": "-5"}),
    ]

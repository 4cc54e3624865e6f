"""Pickles made to hurt: each is refused with a short message, or read rightly, without hanging or filling the memory."""

from __future__ import annotations

import pickle
import random
import resource
import struct
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from refer_fixture import small_dataset

from ris_core.data.refer.plain_pickle import NotPlain, read_plain_pickle
from ris_core.data.refer.untrusted import parse_pickle
from ris_core.errors import DataError, short

FAR = 2**61 - 1  # integers that differ by it have the same hash


def shared(levels: int, make: bytes) -> bytes:
    """Nest containers of which each holds the one before twice."""
    content = b"\x80\x02K\x01q\x00"
    for level in range(levels):
        content += b"h" + bytes([level]) + b"h" + bytes([level]) + make + b"q" + bytes([level + 1])
    return content


def listed(entries: bytes) -> bytes:
    return b"\x80\x02](" + entries + b"e."


TWICE = b"\x86"
HOSTILE = {
    "tuples of tuples as a key": b"\x80\x02}" + shared(90, TWICE)[2:] + b"K\x01s.",
    "tuples of tuples": shared(90, TWICE) + b"\x87.",
    "tuples of tuples in a list": b"\x80\x02]" + shared(45, TWICE)[2:] + b"a.",
    "the duplicating opcode": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a dict that holds itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "lists in lists": b"\x80\x02" + b"](" * 90_000 + b"K\x01" + b"e" * 90_000 + b".",
    "lists of one": b"\x80\x02" + b"]" * 60_000 + b"a" * 59_999 + b".",
    "tuples of one": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "values in no container": b"\x80\x02" + b"N" * 200_000 + b".",
    "empty dicts": b"\x80\x02(" + b"}" * 2_000_000 + b"l.",
    "empty dicts in lists": b"\x80\x02]" + b"}a" * 1_000_000 + b".",
    "an integer of kilobytes": listed(b"\x8b" + struct.pack("<i", 2000) + b"\x01" * 2000),
    "an integer of gigabytes": listed(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "an integer of negative size": listed(b"\x8b" + struct.pack("<i", -4)),
    "an integer of 255 bytes": listed(b"\x8a\xff" + b"\x01" * 255),
    "an integer in a line": b"I" + b"9" * 200_000 + b"\n.",
    "a long integer in a line": b"L" + b"9" * 200_000 + b"L\n.",
    "no integer in a line": b"I1_000\n.",
    "a float in a line": b"F" + b"9" * 200_000 + b"\n.",
    "a text of the rest of the world": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"a.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffa.",
    "a text of negative size": b"\x80\x02T\xff\xff\xff\xffa.",
    "a byte array of four gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b".",
    "bytes": b"\x80\x03C\x01a.",
    "bytes of four gigabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**32) + b".",
    "a long text again and again": b"\x80\x02](X"
    + struct.pack("<I", 100_000)
    + b"a" * 100_000
    + b"q\x00"
    + b"h\x00" * 50_000
    + b"e.",
    "integers of equal hash as keys": b"\x80\x02}("
    + b"".join(b"\x8a\x10" + (n * FAR).to_bytes(16, "little") + b"K\x01" for n in range(1, 40_000))
    + b"u.",
    "a float as a key": b"\x80\x02}G" + struct.pack(">d", float("nan")) + b"K\x01s.",
    "a long text as a key": b"\x80\x02}X" + struct.pack("<I", 5000) + b"k" * 5000 + b"K\x01s.",
    "a key without its value": b"\x80\x02}(K\x01K\x02K\x03u.",
    "entries of what is no list": b"\x80\x02}(K\x01e.",
    "a value that was never named": b"\x80\x02j\xff\xff\xff\xff.",
    "a name for nothing": b"\x80\x02q\x00.",
    "a name of many digits": b"]p" + b"1" * 100_000 + b"\n.",
    "an unknown protocol": b"\x80\x77N.",
    "an unknown opcode": b"\x80\x02\xf0.",
    "an escape that is none": b"S'\\xZZ'\n.",
    "a text without quotes": b"Sabc\n.",
    "a class": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    "a class with a name of a megabyte": b"\x80\x02c" + b"o" * 1_000_000 + b"\nsystem\n.",
    "a class of the newer kind": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a class by its number": b"\x80\x02\x84\xff\xff\xff\xff.",
    "another file's object": b"\x80\x02K\x01Q.",
    "a set": pickle.dumps({1}, 4),
    "two values": b"\x80\x02NN.",
    "nothing": b".",
    "a mark alone": b"(.",
}


@contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused(case: str) -> None:
    with little_memory(), pytest.raises(DataError) as raised:
        parse_pickle(HOSTILE[case], Path("refs.p"), "Get it again.")
    assert len(str(raised.value)) < 500


def test_mutated_pickles_are_refused_or_read() -> None:
    """As in the wild: bytes changed, cut out, doubled, put elsewhere."""
    draw = random.Random(0)
    originals = [pickle.dumps(small_dataset().refs, protocol) for protocol in (0, 1, 2, 4)]
    outcomes = {"read": 0, "refused": 0}
    with little_memory():
        for _ in range(1000):
            content = bytearray(draw.choice(originals))
            if draw.random() < 0.5:
                content[draw.randrange(len(content))] = draw.randrange(32, 127)
            for _ in range(draw.choice((0, 1, 4))):
                start, length = draw.randrange(len(content)), draw.randint(1, 40)
                piece = content[start : start + length]
                match draw.randrange(4):
                    case 0:
                        content[start : start + length] = bytes(draw.randrange(256) for _ in piece)
                    case 1:
                        del content[start : start + length]
                    case 2:
                        content[start:start] = piece * draw.randint(1, 20)
                    case _:
                        place = draw.randrange(len(content))
                        content[place : place + 1] = piece
            try:
                parse_pickle(bytes(content), Path("refs.p"), "")
                outcomes["read"] += 1
            except DataError as error:
                outcomes["refused"] += len(str(error)) < 500
    assert sum(outcomes.values()) == 1000
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_what_pickle_writes(protocol: int) -> None:
    values = [
        {"a": [1, -1, 0, 255, 256, 65535, 65536, 2**31, -(2**31), 2**62, -(2**63)]},
        [1.5, -0.0, float("inf"), 1e-300],
        [True, False, None, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
        ["", "plain", "caf\u00e9 \u2603 \U0001f600", "line\nline\\", "x" * 70_000],
        {1: "a", "b": {"c": [[], {}]}},
    ]
    again = ["the same text"] * 3
    for value in [*values, [again, again], values]:
        assert read_plain_pickle(pickle.dumps(value, protocol), "utf-8") == value


def test_what_it_asks_for_is_named() -> None:
    with pytest.raises(NotPlain, match=r"^the Python object os\.system$"):
        read_plain_pickle(HOSTILE["a class of the newer kind"], "utf-8")
    with pytest.raises(NotPlain, match=r"^the Python object \?\.system$"):
        read_plain_pickle(HOSTILE["a class with a name of a megabyte"], "utf-8")


@pytest.mark.parametrize("value", [np.int64(3), OrderedDict(ref_id=3), defaultdict(list, ref_id=[3])])
def test_honest_pickles_of_other_tools_are_told_how_to_be_written(value: object) -> None:
    with pytest.raises(
        DataError, match=r"asks for the Python object .*write refs\(umd\)\.json .*`json\.dump"
    ) as caught:
        parse_pickle(pickle.dumps([value], 2), Path("refs(umd).p"), "Unpack it.")
    assert "Unpack it." not in str(caught.value)  # which would bring other data than one's own


def test_values_in_messages_are_short() -> None:
    deep: list[object] = []
    for _ in range(sys.getrecursionlimit() * 2):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**6)), {"a": {"b": "c" * 10**6}}, b"y" * 10**6):
        assert len(short(value)) < 300

"""The pickles of REFER without `pickle`: a machine for the opcodes that lists, dicts, texts and numbers need.

The standard library's unpicklers, in C or in Python, cannot be held back: a key of nested tuples that share each other is
hashed for ever, an index of four bytes makes gigabytes of empty memo table, an integer of two kilobytes hangs whoever prints
it. Here each opcode has its bounds, and an unknown one ends the reading. What the opcodes do is in `pickletools`.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from typing import Any

DEPTH_CAP = 50
STACK_CAP = 100_000  # what is not yet in a container; writers put a thousand entries into one at a time
KEY_CAP = 200  # characters of a dict's key
# Bytes in memory, roughly: a fixed part and a multiple of the file's size, of which an honest file takes two thirds.
MEMORY_CAP, MEMORY_PER_BYTE = 32 * 2**20, 14
CONTAINER, TEXT, NUMBER, REMEMBERED, ENTRY, PAIR = 64, 60, 32, 100, 16, 120

_WHOLE = re.compile(rb"-?[0-9]{1,40}")
_FRACTION = re.compile(rb"[-+.0-9einfa]{1,40}")
_NAME = re.compile(r"[\w.]{1,60}")
_SIZES = {"<B": 1, "<H": 2, "<i": 4, "<I": 4, "<Q": 8, ">d": 8}
# Those that make objects of classes, or ask for what is not in the file.
_ASKING = {
    b"c"[0]: "a Python object",
    0x93: "a Python object",
    b"i"[0]: "a Python object",
    b"o"[0]: "a Python object",
    b"R"[0]: "a call",
    b"b"[0]: "the state of an object",
    0x81: "a new object",
    0x92: "a new object",
    0x82: "a registered object",
    0x83: "a registered object",
    0x84: "a registered object",
    b"P"[0]: "the external object of another file",
    b"Q"[0]: "the external object of another file",
    b"B"[0]: "bytes",
    b"C"[0]: "bytes",
    0x8E: "bytes",
    0x96: "a byte array",
    0x97: "an external buffer",
    0x98: "an external buffer",
    0x8F: "a set",
    0x90: "a set",
    0x91: "a set",
}


class NotPlain(ValueError):
    """A pickle asks for something that is not a plain container, text or number."""


def read_plain_pickle(content: bytes, encoding: str) -> Any:
    """Give the value of a pickle; texts of Python 2 are read in `encoding`, strictly.

    Raises NotPlain where the pickle asks for more than plain values, ValueError (UnicodeDecodeError for a text that is not
    in `encoding`) where it is damaged or out of bounds. Their texts are short whatever the file holds.
    """
    return _Machine(content, encoding).run()


class _Mark:
    """Where a container's entries begin on the stack."""


_MARK = _Mark()


class _Machine:
    def __init__(self, content: bytes, encoding: str):
        self.content, self.encoding, self.at = content, encoding, 0
        self.left = MEMORY_CAP + MEMORY_PER_BYTE * len(content)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        content, table = self.content, _TABLE
        while True:
            if self.at >= len(content):
                raise ValueError("it ends before its end mark")
            code = content[self.at]
            self.at += 1
            step = table[code]
            if step is None:
                if code == b"."[0]:
                    break
                self._refuse(code)
            else:
                step(self)
            if len(self.stack) > STACK_CAP:
                raise ValueError(f"more than {STACK_CAP} values outside of any container")
            if self.left < 0:
                raise ValueError("it would take too much memory for its size")
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise ValueError(f"{len(self.stack)} values instead of one")
        _check_depth(self.stack[0], len(content))
        return self.stack[0]

    def _refuse(self, code: int) -> None:
        if code not in _ASKING:
            raise ValueError(f"the byte {code:#04x} at {self.at - 1}, which is no opcode of a plain pickle")
        what = _ASKING[code]
        if code in (b"c"[0], b"i"[0]):
            what = "the Python object " + ".".join(_name(self.line()) for _ in range(2))
        elif code == 0x93:  # its names are on the stack
            what = "the Python object " + ".".join(map(_name, self.stack[-2:]))
        raise NotPlain(what)

    # Reading

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.content):
            raise ValueError(f"it ends within a value of {count} bytes")
        taken = self.content[self.at : end]
        self.at = end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(_SIZES[form]))[0]

    def line(self) -> bytes:
        end = self.content.find(b"\n", self.at)
        if end < 0:
            raise ValueError("it ends within a line")
        return self.take(end + 1 - self.at)[:-1]

    def whole(self, line: bytes) -> int:
        if not _WHOLE.fullmatch(line):
            raise ValueError(f"a number of {len(line)} characters that is no integer, or a very long one")
        return int(line)

    # The stack

    def push(self, value: object, cost: int = 0) -> None:
        self.left -= cost
        self.stack.append(value)

    def push_text(self, taken: bytes, encoding: str, errors: str = "strict") -> None:
        self.push(taken.decode(encoding, errors), TEXT + len(taken))

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it asks for a value where there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                entries = self.stack[index + 1 :]
                del self.stack[index:]
                return entries
        raise ValueError("a container without its beginning")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"entries of a {kind.__name__} where there is none")
        return self.stack[-1]

    def remember(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it names a value where there is none")
        self.left -= REMEMBERED
        self.memo[index] = self.stack[-1]

    def fetch(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it asks for value {index}, which it never named")
        value = self.memo[index]
        self.push(
            value, len(value) if type(value) is str else 0
        )  # a text's readers work for each place where it stands

    def extend(self, target: list[Any], entries: list[Any]) -> None:
        self.left -= ENTRY * len(entries)
        target.extend(entries)

    def fill(self, target: dict[Any, Any], entries: list[Any]) -> None:
        if len(entries) % 2:
            raise ValueError("a key without its value")
        self.left -= PAIR * (len(entries) // 2)
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            # Larger integers of equal hash are easily made: a dict of them takes for ever.
            if not ((type(key) is int and abs(key) < 2**60) or (type(key) is str and len(key) <= KEY_CAP)):
                raise ValueError(f"a {type(key).__name__} as key of a dict; expected a short text")
            target[key] = value

    def tuple_of(self, entries: list[Any]) -> None:
        self.push(tuple(entries), CONTAINER + ENTRY * len(entries))


def _name(text: object) -> str:
    told = text.decode("latin-1") if isinstance(text, bytes) else text
    return told if isinstance(told, str) and _NAME.fullmatch(told) else "?"


def _check_depth(value: Any, size: int) -> None:
    """Refuse what is nested too deep, in itself, or much larger written out than the file (parts that share parts)."""
    entries, waiting = 0, [(value, 1)] if type(value) in (list, dict, tuple) else []
    while waiting:
        found, depth = waiting.pop()
        if depth > DEPTH_CAP:
            raise ValueError(f"containers within containers, more than {DEPTH_CAP} deep")
        inner = list(found.values()) if type(found) is dict else found
        entries += 1 + len(inner)
        if entries > 1000 + 2 * size:
            raise ValueError("containers that hold the same containers again and again")
        waiting += [(each, depth + 1) for each in inner if type(each) in (list, dict, tuple)]
        if len(waiting) > 1000 + size:
            raise ValueError("containers that hold the same containers again and again")


def _text_number(machine: _Machine) -> None:
    line = machine.line()
    if line in (b"00", b"01"):  # so protocol 0 and 1 write False and True
        machine.push(line == b"01")
    else:
        machine.push(machine.whole(line), NUMBER)


def _long(machine: _Machine, size: int) -> None:
    if not 0 <= size <= 16:
        raise ValueError(f"an integer of {size} bytes; expected 16 at most")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True), NUMBER)


def _float_line(machine: _Machine) -> None:
    line = machine.line()
    if not _FRACTION.fullmatch(line):
        raise ValueError(f"a number of {len(line)} characters that is none")
    machine.push(float(line), NUMBER)


def _quoted(machine: _Machine) -> None:
    line = machine.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a text without its quotes")
    text, _ = codecs.escape_decode(line[1:-1])  # as pickle does
    machine.push_text(text, machine.encoding)


def _proto(machine: _Machine) -> None:
    if (version := machine.number("<B")) > 5:
        raise ValueError(f"pickle protocol {version}; 0 to 5 are known")


def _unicode_line(machine: _Machine) -> None:
    machine.push_text(machine.line(), "raw-unicode-escape")


def _sized_text(form: str, encoding: str | None = "utf-8") -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        size = machine.number(form)
        if size < 0:
            raise ValueError(f"a text of {size} bytes")
        if encoding is None:
            machine.push_text(machine.take(size), machine.encoding)
        else:
            machine.push_text(machine.take(size), encoding, "surrogatepass")

    return step


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.tuple_of([machine.pop() for _ in range(count)][::-1])

    return step


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.extend(machine.top(list), [value])


def _appends(machine: _Machine) -> None:
    entries = machine.pop_to_mark()
    machine.extend(machine.top(list), entries)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.fill(machine.top(dict), [key, value])


def _set_items(machine: _Machine) -> None:
    entries = machine.pop_to_mark()
    machine.fill(machine.top(dict), entries)


def _list(machine: _Machine) -> None:
    entries = machine.pop_to_mark()
    machine.push([], CONTAINER)
    machine.extend(machine.stack[-1], entries)


def _dict(machine: _Machine) -> None:
    entries = machine.pop_to_mark()
    machine.push({}, CONTAINER)
    machine.fill(machine.stack[-1], entries)


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto,
    0x95: lambda machine: machine.number("<Q") and None,  # a frame's size: nothing is read ahead here
    b"("[0]: lambda machine: machine.push(_MARK),
    b"N"[0]: lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    b"I"[0]: _text_number,
    b"L"[0]: lambda machine: machine.push(machine.whole(machine.line().removesuffix(b"L")), NUMBER),
    b"J"[0]: lambda machine: machine.push(machine.number("<i"), NUMBER),
    b"K"[0]: lambda machine: machine.push(machine.number("<B")),
    b"M"[0]: lambda machine: machine.push(machine.number("<H"), NUMBER),
    0x8A: lambda machine: _long(machine, machine.number("<B")),
    0x8B: lambda machine: _long(machine, machine.number("<i")),
    b"F"[0]: _float_line,
    b"G"[0]: lambda machine: machine.push(machine.number(">d"), NUMBER),
    b"S"[0]: _quoted,
    b"T"[0]: _sized_text("<i", None),
    b"U"[0]: _sized_text("<B", None),
    b"V"[0]: _unicode_line,
    b"X"[0]: _sized_text("<I"),
    0x8C: _sized_text("<B"),
    0x8D: _sized_text("<Q"),
    b"]"[0]: lambda machine: machine.push([], CONTAINER),
    b"}"[0]: lambda machine: machine.push({}, CONTAINER),
    b")"[0]: lambda machine: machine.push(()),
    b"l"[0]: _list,
    b"d"[0]: _dict,
    b"t"[0]: lambda machine: machine.tuple_of(machine.pop_to_mark()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    b"a"[0]: _append,
    b"e"[0]: _appends,
    b"s"[0]: _set_item,
    b"u"[0]: _set_items,
    b"p"[0]: lambda machine: machine.remember(machine.whole(machine.line())),
    b"q"[0]: lambda machine: machine.remember(machine.number("<B")),
    b"r"[0]: lambda machine: machine.remember(machine.number("<I")),
    0x94: lambda machine: machine.remember(len(machine.memo)),
    b"g"[0]: lambda machine: machine.fetch(machine.whole(machine.line())),
    b"h"[0]: lambda machine: machine.fetch(machine.number("<B")),
    b"j"[0]: lambda machine: machine.fetch(machine.number("<I")),
}
_TABLE = [_STEPS.get(code) for code in range(256)]

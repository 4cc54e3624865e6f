import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from refer_fixture import HTML, Malicious, python2_pickle, small_dataset

from ris_core.data.refer.untrusted import parse_json, parse_pickle, read_input
from ris_core.errors import DataError

PLACE = Path("refcoco/refs(unc).p")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_plain_pickles_of_all_official_protocols_are_read(protocol: int) -> None:
    refs = small_dataset().refs
    assert parse_pickle(pickle.dumps(refs, protocol), PLACE, "") == (refs, "utf-8")


def test_python_2_texts_are_utf8_or_else_latin1() -> None:
    value = [{"sent": "café", "sent_id": 3}]
    assert parse_pickle(python2_pickle(value, "utf-8"), PLACE, "") == (value, "utf-8")
    assert parse_pickle(python2_pickle(value, "latin-1"), PLACE, "") == (value, "latin-1")


def test_nothing_is_executed(tmp_path: Path) -> None:
    victim = tmp_path / "created"
    bomb = Malicious(victim)
    pickle.loads(pickle.dumps(bomb)).close()
    assert victim.exists()  # the bomb works
    victim.unlink()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(
            DataError, match=r"refs\(unc\)\.p asks for the Python object .*open, but.*may be malicious.*Mend"
        ):
            parse_pickle(pickle.dumps([{"ref_id": bomb}], protocol), PLACE, "Mend it.")
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"P1\n.", b"I1\nQ.", pickle.dumps([np.int64(3)]), pickle.dumps({1, 2}, 2)])
def test_other_than_plain_values_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"asks for the (Python|external) object"):
        parse_pickle(content, PLACE, "")


@pytest.mark.parametrize("protocol", [0, 2])
def test_a_pickle_cut_anywhere_is_refused(protocol: int) -> None:
    content = pickle.dumps(small_dataset().refs[:1], protocol)
    for length in range(len(content)):
        with pytest.raises(DataError, match=r"is damaged, cut short or no pickle at all"):
            parse_pickle(content[:length], PLACE, "")


def test_damaged_pickles_raise_data_errors_and_take_no_memory() -> None:
    rng = np.random.default_rng(0)
    content = bytearray(pickle.dumps(small_dataset().refs, 0))
    refused = 0
    for position, value in zip(rng.integers(0, len(content), 1500), rng.integers(32, 127, 1500), strict=True):
        damaged = content.copy()
        damaged[position] = value
        try:
            parse_pickle(bytes(damaged), PLACE, "")
        except DataError:
            refused += 1
    assert refused > 300  # the others changed a letter or a digit


def test_a_huge_memo_index_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, _ = parse_pickle(b"\x80\x02]r\x00\x00\x00\x20.", PLACE, "")  # half a billion: 8 GB in the C unpickler
    assert value == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_json_is_no_pickle_and_broken_json_is_named() -> None:
    with pytest.raises(DataError, match=r"is JSON text, not a pickle: call it .*\.json, which is read as well"):
        parse_pickle(b'  [{"ref_id": 1}]', PLACE, "")
    for content in (b'{"images": [', b"\x80\x02]q\x00.", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 100_000):
        with pytest.raises(DataError, match=r"instances\.json is damaged, cut short or no JSON at all .* Get it again"):
            parse_json(content, Path("instances.json"), "Get it again.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HTML, "is an HTML or XML page"),
        (b"\xef\xbb\xbf \n" + HTML, "is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-LFS pointer.*git lfs pull"),
        (b"PK\x03\x04rest", "is a zip archive: unpack it"),
        (b"\x1f\x8brest", "is a gzip archive: unpack it"),
        (b"  \n", "is empty"),
        (b"", "is empty"),
        (b"x" * 101, "has 101 bytes, more than the allowed 100"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(DataError, match=rf"refs\(unc\)\.p {message}.*Get it again\.$"):
        read_input(tmp_path, "refs(unc).p", "Get it again.", cap_bytes=100)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: no such file\. Get it\."):
        read_input(tmp_path, "refs(unc).p", "Get it.")


def test_the_identity_of_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_bytes(b"{}")
    content, identity = read_input(tmp_path, "a/b.json", "")
    assert content == b"{}"
    assert (identity.path, identity.size) == ("a/b.json", 2)
    assert identity.sha256 == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

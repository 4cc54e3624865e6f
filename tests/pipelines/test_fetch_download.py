"""One file from servers that cut, lie, change, refuse and answer with pages: it comes whole, or it is said why not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetch_world import Handler, Server, cut, lying, page, range_of, serving, sha256, slow, status, tag, without_ranges

from pipelines.fetching import download as downloading
from pipelines.fetching.catalogue import Wanted
from pipelines.fetching.download import download, part_bytes
from pipelines.fetching.sources import Sources, problem_of, shown
from ris_core.errors import DataError

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 3000  # 768,004 bytes
HALF = 400_000
NAME = "/refcoco.zip"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloading, "PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as world:
        world.files[NAME] = world.files["/other.zip"] = CONTENT
        yield world


def wanted(content: bytes = CONTENT, size: int | None = len(CONTENT)) -> Wanted:
    return Wanted("refcoco.zip", "http://nowhere", (sha256(content),), size, len(content))


def fetched(folder: Path, *addresses: str, what: Wanted | None = None) -> tuple[bytes, list[str]]:
    """Content of the file, and what was told on the way; nothing else is left in the folder."""
    told: list[str] = []
    path = download(what or wanted(), addresses, folder / "refcoco.zip", Sources(), told.append)
    assert [each.name for each in folder.iterdir()] == ["refcoco.zip"]
    return path.read_bytes(), told


def refused(folder: Path, *addresses: str, what: Wanted | None = None) -> str:
    with pytest.raises(DataError) as error:
        download(what or wanted(), addresses, folder / "refcoco.zip", Sources(), lambda line: None, "Then do this.")
    assert str(error.value).endswith("Then do this.")
    assert not (folder / "refcoco.zip").exists()
    return str(error.value)


def test_a_file_comes_whole_and_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])
    assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])
    assert server.asked(NAME) == [""]


def test_a_damaged_file_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "refcoco.zip").write_bytes(CONTENT[:-1] + b"?")
    content, told = fetched(tmp_path, server.address(NAME))
    assert content == CONTENT
    assert "has the SHA-256" in told[0]
    assert told[0].endswith("it is fetched anew")


def test_a_cut_connection_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.quirks[NAME] = [cut(HALF), cut(HALF // 2)]
    content, told = fetched(tmp_path, server.address(NAME))
    assert content == CONTENT
    assert len(told) == 2
    first, second, third = server.asked(NAME)
    assert first == ""
    assert 0 < int(second[6:-1]) <= HALF < int(third[6:-1])
    assert server.sent(NAME) < len(CONTENT) + 3 * 65_536, "what was there was not sent again, but for unwritten pieces"


def test_what_an_earlier_call_left_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.quirks[NAME] = [cut(HALF), *[status(503)] * downloading.ATTEMPTS]
    told = refused(tmp_path, server.address(NAME))
    assert f"answers 503 Service Unavailable, {downloading.ATTEMPTS} times in a row" in told
    there = part_bytes(tmp_path / "refcoco.zip")
    assert HALF - 65_536 < there <= HALF
    server.log.clear()
    assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])
    assert server.asked(NAME) == [f"bytes={there}-"]
    assert server.sent(NAME) == len(CONTENT) - there


def test_a_part_of_which_nothing_is_known_is_not_trusted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "refcoco.zip.part").write_bytes(b"PK??" * 1000)
    assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])
    for note in ("no JSON", "[]", json.dumps({"addresses": 1})):
        (tmp_path / "refcoco.zip").rename(tmp_path / "refcoco.zip.part")
        (tmp_path / "refcoco.zip.part.json").write_text(note)
        assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])
    assert server.asked(NAME) == [""] * 4


def test_a_server_that_knows_no_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    server.quirks[NAME] = [without_ranges(HALF), without_ranges()]
    assert fetched(tmp_path, server.address(NAME))[0] == CONTENT
    assert server.asked(NAME)[0] == ""
    assert server.asked(NAME)[1].startswith("bytes=")


def test_a_server_that_gives_less_than_it_was_asked_for_is_asked_for_the_rest(server: Server, tmp_path: Path) -> None:
    """As caches do that answer in blocks."""

    def block(handler: Handler, content: bytes) -> None:
        start = range_of(handler, content)
        end = min(start + 100_000, len(content))
        headers = {"Content_Range": f"bytes {start}-{end - 1}/{len(content)}", "ETag": tag(content)}
        handler.head(206, end - start, **headers)
        handler.body(content[start:end])

    server.quirks[NAME] = [cut(HALF), block, block]
    content, told = fetched(tmp_path, server.address(NAME))
    assert content == CONTENT
    assert "ended after 493,216 of 768,004 bytes: trying again" in told[1]
    assert server.sent(NAME) < len(CONTENT) + 65_536


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server: Server, tmp_path: Path) -> None:
    server.always[NAME] = without_ranges(HALF)
    told = refused(tmp_path, server.address(NAME))
    assert f"{downloading.ATTEMPTS} times in a row" in told
    assert len(server.asked(NAME)) == 1 + downloading.ATTEMPTS


def test_a_file_that_changes_between_attempts_is_not_mixed(server: Server, tmp_path: Path) -> None:
    """Of equal size: only its ETag tells."""
    new = CONTENT[:4] + CONTENT[4:][::-1]

    def changing(handler: Handler, content: bytes) -> None:
        cut(HALF)(handler, content)
        server.files[NAME] = new

    server.quirks[NAME] = [changing]
    assert fetched(tmp_path, server.address(NAME), what=wanted(new)) == (new, [f"{server.address(NAME)} {BROKEN}"])
    assert [served.status for served in server.log] == [200, 200]


CUT = "Connection broken: IncompleteRead(400000 bytes read, 368004 more expected)"
BROKEN = f"does not answer as it should ({CUT}): trying again in 0 s"


def test_a_part_that_is_longer_than_the_file_now(server: Server, tmp_path: Path) -> None:
    short = CONTENT[: HALF // 2]
    server.quirks[NAME] = [cut(HALF), *[status(500)] * downloading.ATTEMPTS]
    refused(tmp_path, server.address(NAME), what=wanted(short, None))
    server.files[NAME] = short
    server.quirks[NAME] = [
        lambda handler, content: handler.head(416, 0, Content_Range=f"bytes */{len(content)}"),
    ]
    content, told = fetched(tmp_path, server.address(NAME), what=wanted(short, None))
    assert content == short
    assert "has a shorter file now, and what was fetched before is given up" in told[0]


def test_another_part_than_was_asked_for(server: Server, tmp_path: Path) -> None:
    def other(handler: Handler, content: bytes) -> None:
        handler.head(206, 10, Content_Range=f"bytes 5-14/{len(content)}")
        handler.body(content[5:15])

    server.quirks[NAME] = [cut(HALF), other]
    content, told = fetched(tmp_path, server.address(NAME))
    assert content == CONTENT
    assert "gives another part of the file than it was asked for" in told[1]


@pytest.mark.parametrize("more", [-1000, 1000])
def test_a_wrong_length_is_told_where_the_size_is_published(more: int, server: Server, tmp_path: Path) -> None:
    server.always[NAME] = lying(more)
    told = refused(tmp_path, server.address(NAME))
    assert f"has {len(CONTENT) + more:,} bytes, published are {len(CONTENT):,}: that is another file" in told


@pytest.mark.parametrize("more", [-1000, 1000])
def test_a_wrong_length_is_found_where_no_size_is_known(more: int, server: Server, tmp_path: Path) -> None:
    server.always[NAME] = lying(more)
    told = refused(tmp_path, server.address(NAME), what=wanted(size=None))
    assert ("has the SHA-256" if more < 0 else "IncompleteRead") in told
    assert fetched(tmp_path, server.address("/other.zip"), what=wanted(size=None))[0] == CONTENT


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_page_in_place_of_the_file(size: int | None, server: Server, tmp_path: Path) -> None:
    server.always[NAME] = page
    told = refused(tmp_path, server.address(NAME), what=wanted(size=size))
    assert "gives a web page in place of the archive, which says '404 Not Found'" in told


def test_a_page_does_not_cost_what_was_fetched_before(server: Server, tmp_path: Path) -> None:
    """A portal that asks for a password comes up in the middle."""
    server.quirks[NAME] = [cut(HALF), page]
    content, told = fetched(tmp_path, server.address(NAME), server.address("/other.zip"), what=wanted(size=None))
    assert content == CONTENT
    assert "gives a web page" in told[1]
    assert server.asked("/other.zip")[0].startswith("bytes=")
    assert server.sent("/other.zip") <= len(CONTENT) - HALF + 65_536


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "gives an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "gives no archive: it is a Git LFS pointer, not the file"),
        (b"\x1f\x8b\x08\x00 whatever", "gives no archive: it begins with b'\\x1f\\x8b"),
        (b'<?xml version="1.0"?><Error><Message>Access Denied</Message>', "which says 'Access Denied'"),
    ],
)
def test_something_else_in_place_of_the_file(content: bytes, message: str, server: Server, tmp_path: Path) -> None:
    server.files[NAME] = content
    assert message in refused(tmp_path, server.address(NAME), what=wanted(size=None))


def test_another_file_is_told_with_both_sums_and_not_kept(server: Server, tmp_path: Path) -> None:
    other = CONTENT[:-1] + b"?"
    server.files[NAME] = other
    told = refused(tmp_path, server.address(NAME))
    assert f"has the SHA-256 {sha256(other)}, published is {sha256(CONTENT)}" in told
    assert list(tmp_path.iterdir()) == []


def test_addresses_are_tried_in_turn_and_each_failure_is_told(server: Server, tmp_path: Path) -> None:
    server.always["/gone.zip"] = status(404)
    server.always["/closed.zip"] = status(403)
    nobody = "http://127.0.0.1:9/refcoco.zip"
    bad = [server.address("/gone.zip"), server.address("/closed.zip"), nobody, (tmp_path / "no.zip").as_uri()]
    content, told = fetched(tmp_path, *bad, server.address(NAME))
    assert content == CONTENT
    final = [line for line in told if "trying again" not in line]
    assert [line.split()[0] for line in final] == bad
    assert "answers 404 Not Found" in final[0]
    assert "answers 403 Forbidden" in final[1]
    assert "Connection refused" in final[2]
    assert "holds no such file" in final[3]
    assert len(server.asked("/gone.zip")) == 1, "what is gone is not asked for again"


def test_beginnings_of_two_addresses_are_put_together_only_if_that_is_the_file(server: Server, tmp_path: Path) -> None:
    server.files["/bad.zip"] = CONTENT[:5] + b"?" + CONTENT[6:]
    server.quirks["/bad.zip"] = [cut(HALF), *[status(503)] * downloading.ATTEMPTS]
    content, _ = fetched(tmp_path, server.address("/bad.zip"), server.address(NAME))
    assert content == CONTENT
    assert [bool(asked) for asked in server.asked(NAME)] == [True, False], "first the rest, then all of it"


def test_a_wrong_mirror_does_not_cost_what_was_fetched_before(server: Server, tmp_path: Path) -> None:
    """Its file is shorter than what there is already."""
    (tmp_path / "to").mkdir()
    (tmp_path / "short.zip").write_bytes(CONTENT[:1000])
    server.files["/short.zip"] = CONTENT[:1000]
    server.quirks[NAME] = [cut(HALF), status(404)]
    wrong = [(tmp_path / "short.zip").as_uri(), server.address("/short.zip")]
    content, told = fetched(tmp_path / "to", server.address(NAME), *wrong, server.address("/other.zip"))
    assert content == CONTENT
    assert [line.split()[0] for line in told[2:]] == wrong
    assert server.asked("/other.zip")[0].startswith("bytes=")


def test_what_is_noted_beside_a_part_holds_no_secrets(server: Server, tmp_path: Path) -> None:
    """And an address whose signature was renewed is the same address."""
    address = server.address(NAME).replace("//", "//me:secret@") + "?signature={}"
    for number in (1, 2):
        server.files[f"{NAME}?signature={number}"] = CONTENT
    server.quirks[f"{NAME}?signature=1"] = [cut(HALF), status(403)]
    refused(tmp_path, address.format(1))
    noted = (tmp_path / "refcoco.zip.part.json").read_text()
    assert "secret" not in noted
    assert "signature" not in noted
    assert fetched(tmp_path, address.format(2)) == (CONTENT, [])
    assert server.asked(f"{NAME}?signature=2")[0].startswith("bytes=")


def test_a_busy_server_is_asked_again_when_it_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(downloading.time, "sleep", waited.append)
    monkeypatch.setattr(downloading, "PAUSE", 1.0)
    server.quirks[NAME] = [status(503, Retry_After="7"), status(429, Retry_After="9999"), status(500), status(502)]
    assert fetched(tmp_path, server.address(NAME))[0] == CONTENT
    assert waited == [7, 60, 4, 8]


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.quirks[NAME] = [slow(8, 0.02)]
    assert fetched(tmp_path, server.address(NAME)) == (CONTENT, [])


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.fetching.sources.SILENT_SECONDS", 0.3)
    server.quirks[NAME] = [slow(2, 1.0)]
    content, told = fetched(tmp_path, server.address(NAME))
    assert content == CONTENT
    assert "Read timed out" in told[0]


def test_a_file_that_is_packed_on_its_way(server: Server, tmp_path: Path) -> None:
    server.always[NAME] = lambda handler, content: handler.head(200, 0, Content_Encoding="gzip")
    assert "packs the file on its way (gzip), although asked not to" in refused(tmp_path, server.address(NAME))


def test_more_than_was_said_is_not_written(server: Server, tmp_path: Path) -> None:
    def endless(handler: Handler, content: bytes) -> None:
        handler.head(200, None)
        handler.body(content + content)

    server.always[NAME] = endless
    told = refused(tmp_path, server.address(NAME))
    assert f"gives more than the {len(CONTENT):,} bytes that it should have" in told
    assert part_bytes(tmp_path / "refcoco.zip") <= len(CONTENT)


def test_files_of_this_machine(tmp_path: Path) -> None:
    source = tmp_path / "a folder" / "refcoco+.zip"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    target = tmp_path / "to"
    target.mkdir()
    assert fetched(target, source.as_uri()) == (CONTENT, [])


def test_a_file_of_this_machine_is_gone_on_with_unless_it_changed(tmp_path: Path) -> None:
    source, target = tmp_path / "refcoco.zip", tmp_path / "to"
    source.write_bytes(CONTENT)
    target.mkdir()
    status_of = source.stat()
    begun = {"addresses": [source.as_uri()], "total": len(CONTENT), "sha256": [sha256(CONTENT)]}
    for mark, told in ((f"{status_of.st_mtime_ns}-{status_of.st_size}", 0), ("1-1", 1)):
        (target / "refcoco.zip.part").write_bytes(CONTENT[:HALF])
        (target / "refcoco.zip.part.json").write_text(json.dumps({**begun, "mark": mark}))
        content, lines = fetched(target, source.as_uri())
        assert content == CONTENT
        assert len(lines) == told
        os.remove(target / "refcoco.zip")


@pytest.mark.parametrize(
    "address", ["ftp://host/x", "/mnt/x.zip", "file://host/x", "http:///x", "s3:///x", "http://a:b/"]
)
def test_what_is_no_address(address: str) -> None:
    assert problem_of(address)


@pytest.mark.parametrize("address", ["https://host/x", "http://h:8/x", "file:///mnt/x", "s3://bucket/x?region=eu"])
def test_addresses(address: str) -> None:
    assert problem_of(address) is None


def test_secrets_of_an_address_are_not_shown() -> None:
    assert shown("https://me:secret@host:8080/file.zip?X-Amz-Signature=abc") == "https://host:8080/file.zip"

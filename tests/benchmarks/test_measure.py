import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import Report, Timing, alone, best_of, machine, number, peak_memory


class Clocks:
    """Stands in for the module `time`: functions move these hands instead of taking time."""

    def __init__(self) -> None:
        self.cpu = self.wall = 100.0

    def process_time(self) -> float:
        return self.cpu

    def perf_counter(self) -> float:
        return self.wall


def test_best_of_keeps_the_least_of_each_clock_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, calls = Clocks(), []
    monkeypatch.setattr(measure, "time", clocks)

    def takes(name: str, *times: tuple[float, float]) -> Callable[[], None]:
        left = iter(times)

        def work() -> None:
            calls.append(name)
            cpu, wall = next(left)
            clocks.cpu += cpu
            clocks.wall += wall

        return work

    found = best_of({"a": takes("a", (9, 9), (2, 4), (3, 1)), "b": takes("b", (5, 5), (5, 6), (4, 7))}, rounds=3)
    assert found == {"a": Timing(cpu=2, wall=1), "b": Timing(cpu=4, wall=5)}
    assert calls == ["a", "b"] * 3


def test_work_still_under_way_belongs_to_the_call_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, under_way = Clocks(), [40.0]  # seconds of earlier work on the device
    monkeypatch.setattr(measure, "time", clocks)

    def finish() -> None:
        clocks.wall += sum(under_way)
        under_way.clear()

    found = best_of({"launch": lambda: under_way.append(3.0)}, 1, finish)
    assert found["launch"].wall == 3


def test_alone_is_another_process_and_passes_errors_on() -> None:
    assert alone(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        alone(int, "seven")


def memory_before_and_after_a_block_came_and_went() -> tuple[float, float]:
    before = peak_memory()
    block = bytearray(b"1" * 2**20) * 256
    del block
    return before, peak_memory()


def test_peak_memory_sees_what_was_freed_again() -> None:
    before, after = alone(memory_before_and_after_a_block_came_and_went)
    assert 200 < after - before < 300


def test_a_new_process_does_not_begin_with_the_peak_of_its_parent() -> None:
    block = bytearray(b"1" * 2**20) * 256
    assert alone(peak_memory) < len(block) / 2**20 < peak_memory()


def test_the_machine_is_described_without_its_name() -> None:
    found = machine()
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0.5
    assert found["torch"].startswith("2.")
    assert platform.node() not in json.dumps(found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.012345, "0.0123"),
        (1.5, "1.5"),
        (999.4, "999"),
        (98_765.0, "98,800"),
        (45_210_000.0, "45,200,000"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_report_shows_each_number_beside_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("sorting", {"rows": 7, "share": 0.12345}, {"cpu": "Abacus"})
    report.add("floor", 200.0, "rows/s")
    report.add("ours", 150.0, "rows/s", 0.75, "the floor")
    report.finish(record=False)
    assert capsys.readouterr().out.splitlines() == [
        "sorting: rows 7, share 0.123",
        "on cpu Abacus",
        "  floor       200 rows/s",
        "  ours        150 rows/s  0.75 x the floor",
    ]


def test_a_record_is_dated_whole_and_replaces_the_one_of_the_same_day(tmp_path: Path) -> None:
    report = Report("sorting", {"rows": 7})
    report.add("ours", 1.0, "s")
    first = report.write(tmp_path / "records")
    report.add("theirs", 2.0, "s", 2.0, "ours")
    path = report.write(tmp_path / "records")
    assert path == first
    assert list(path.parent.iterdir()) == [path]
    content = json.loads(path.read_text())
    assert path.name == f"{content['date']}-sorting.json"
    assert content["commit"]
    assert content["settings"] == {"rows": 7}
    assert content["machine"] == report.machine
    assert content["rows"][1] == {"what": "theirs", "value": 2.0, "unit": "s", "ratio": 2.0, "of": "ours"}

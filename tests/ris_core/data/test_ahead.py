"""What is made ahead comes in order, whoever makes it, and no more of it than is wanted."""

from __future__ import annotations

import threading
import time

import pytest

from ris_core.data.ahead import EACH, ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads: int) -> None:
    def slowly_at_first(number: int) -> int:
        time.sleep(0.02 / (1 + number))
        return number**2

    assert list(ahead(slowly_at_first, range(20), threads)) == [number**2 for number in range(20)]
    assert list(ahead(slowly_at_first, [], threads)) == []


def test_threads_make_and_nobody_makes_more_than_is_waited_for() -> None:
    made: list[tuple[int, str]] = []
    results = ahead(lambda number: made.append((number, threading.current_thread().name)), range(100), 2)
    for _ in range(3):
        next(results)
    time.sleep(0.1)
    assert len(made) <= 3 + 2 * EACH
    assert all(name.startswith("ahead") for _, name in made)
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("threads", [0, 2])
def test_what_goes_wrong_is_told_in_its_place(threads: int) -> None:
    results = ahead(lambda number: 6 // (2 - number), range(5), threads)
    assert [next(results), next(results)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)

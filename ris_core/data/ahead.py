"""Work done ahead of the one who needs it, by threads: what they make is in this process already when it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

EACH = 2  # results of a thread that may wait to be taken: one more while it works, so that none stands still

T = TypeVar("T")
N = TypeVar("N")


def ahead(make: Callable[[N], T], numbers: Iterable[N], threads: int) -> Iterator[T]:
    """Give `make` of each number, in their order, made ahead by so many threads; by none, each when it is asked for.

    What `make` raises is raised in the place of its result. Work that was not begun is dropped when nobody asks any more.
    """
    if not threads:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > EACH * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

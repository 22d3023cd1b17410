"""Map a function over items in threads, with results in order.

Useful only for work that releases Python's global lock, such as decoding images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 4  # batches per thread that are submitted before their results are requested


def map_in_order(work: Callable[[T], R], items: Iterable[T], batch: int = 1) -> Iterator[R]:
    """Apply `work` to every item on all cores and yield the results lazily, in the order of the items.

    An error of `work` is raised at the position of its item; an error of iterating over `items`, after the results of
    all earlier items.

    Args:
        work: a thread-safe function.
        items: iterated over in the calling thread.
        batch: number of items that a thread takes at a time; raise it if the work per item is small.
    """
    threads = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    pending = deque[Future[list[R]]]()
    try:
        for next_batch in _batches(items, batch):
            if isinstance(next_batch, Exception):
                yield from _results(pending)
                raise next_batch
            pending.append(pool.submit(_apply_to_batch, work, next_batch))
            if len(pending) > threads * _AHEAD:
                yield from pending.popleft().result()
        yield from _results(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T] | Exception]:
    """Yield the items in batches and, if iterating over them fails, the error as the last value."""
    batch: list[T] = []
    failure = None
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception as error:
        failure = error
    if batch:
        yield batch
    if failure is not None:
        yield failure


def _apply_to_batch(work: Callable[[T], R], items: list[T]) -> list[R]:
    return [work(item) for item in items]


def _results(pending: deque[Future[list[R]]]) -> Iterator[R]:
    while pending:
        yield from pending.popleft().result()

"""Work on many things at once, results in order: for what runs outside of Python's lock, such as decoding images."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 4  # batches for each thread that are begun before they are wanted


def map_in_order(work: Callable[[T], R], items: Iterable[T], batch: int = 1) -> Iterator[R]:
    """`work` of every item, on all cores, as the results are wanted and in the order of the items.

    What an item's work raises is raised in its place, and what stops the items themselves after all of theirs.

    Args:
        work: safe to run in several threads.
        items: read in this thread.
        batch: how many items a thread takes at a time; more where there is little to do for each.
    """
    threads = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    pending = deque[Future[list[R]]]()
    try:
        for taken in _batches(items, batch):
            if isinstance(taken, Exception):
                yield from _results(pending)
                raise taken
            pending.append(pool.submit(_all, work, taken))
            if len(pending) > threads * _AHEAD:
                yield from pending.popleft().result()
        yield from _results(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T] | Exception]:
    """The items in batches, and last what stopped them."""
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


def _all(work: Callable[[T], R], items: list[T]) -> list[R]:
    return [work(item) for item in items]


def _results(pending: deque[Future[list[R]]]) -> Iterator[R]:
    while pending:
        yield from pending.popleft().result()

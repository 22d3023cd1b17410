"""Coroutines that are run from scripts and from notebooks, whose cells run under an event loop."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from purld.event_loops import run_async


async def double(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


def test_a_coroutine_is_run_to_its_end():
    assert run_async(double(4)) == 8


def test_under_a_running_loop_the_work_is_done_and_the_loop_goes_on():
    """What a cell calls blocks its loop, uses this thread's connections, and leaves the loop as it was."""
    database = sqlite3.connect(":memory:")

    async def ask() -> int:
        return int(database.execute("SELECT 21").fetchone()[0]) + await double(0)

    async def cell() -> list[int]:
        other = asyncio.create_task(double(5))
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        found = [run_async(ask()), run_async(double(run_async(double(1))))]
        assert asyncio.get_running_loop() is loop and asyncio.current_task() is task
        await asyncio.sleep(0)
        return [*found, await other]

    assert asyncio.run(cell()) == [21, 4, 10]


def test_an_error_leaves_the_running_loop_as_it_was():
    async def fail() -> None:
        raise ValueError("no")

    async def cell() -> int:
        with pytest.raises(ValueError, match="no"):
            run_async(fail())
        return await double(1)

    assert asyncio.run(cell()) == 2

"""Run a coroutine to its end, also where an event loop runs already, as under every cell of a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine, run by an event loop of its own in this thread.

    `asyncio.run` refuses to work under a running loop. That one is set aside for the time, since a thread of its own
    would part the work from the ledger's connection and from the handling of signals. Nothing else of the notebook
    runs meanwhile, as under any call that blocks.
    """
    outer = asyncio._get_running_loop()
    if outer is None:
        return asyncio.run(coroutine)
    task = asyncio.current_task(outer)
    if task is not None:
        asyncio.tasks._leave_task(outer, task)
    asyncio._set_running_loop(None)
    try:
        return asyncio.run(coroutine)
    finally:
        asyncio.set_event_loop(outer)  # asyncio.run leaves the thread without one
        asyncio._set_running_loop(outer)
        if task is not None:
            asyncio.tasks._enter_task(outer, task)

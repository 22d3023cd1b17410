"""Stop at SIGINT (Ctrl-C), SIGTERM and SIGHUP: the command line turns them into `Stopped`, and code that must finish
something first defers them.

A signal that the process ignores, as under `nohup`, stays ignored. Outside the main thread, where no handlers can be
set, nothing is deferred.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end. Not an `Exception`, so that no handler of errors takes it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status by the shell's convention: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


@contextlib.contextmanager
def stopping_signals() -> Iterator[None]:
    """Raise `Stopped` in this block at every signal that asks the process to stop."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    with _handled_by(stop):
        yield


class DeferredSignals:
    """The signals that arrived in a `deferred_signals` block."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._on_signal: Callable[[int], object] | None = None

    def notify(self, on_signal: Callable[[int], object]) -> None:
        """Call `on_signal` with each signal, in the signal handler; at once with those that have arrived already."""
        self._on_signal = on_signal
        for number in self.received:
            on_signal(number)

    def receive(self, signum: int) -> None:
        """Record a signal and pass it on."""
        self.received.append(signum)
        if self._on_signal:
            self._on_signal(signum)


@contextlib.contextmanager
def deferred_signals() -> Iterator[DeferredSignals]:
    """Defer the signals to the end of the block, where the first one reaches the handler that it was meant for.

    Without a handler in the process, SIGTERM and SIGHUP then end it, and SIGINT raises KeyboardInterrupt.
    """
    deferred = DeferredSignals()

    def receive(signum: int, frame: FrameType | None) -> None:
        deferred.receive(signum)

    try:
        with _handled_by(receive):
            yield deferred
    finally:
        if deferred.received:
            signal.raise_signal(deferred.received[0])


@contextlib.contextmanager
def ignored_signals() -> Iterator[None]:
    """Ignore the signals in this block, which ends the work anyhow."""
    with _handled_by(lambda signum, frame: None):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler of the signals that are not ignored, and restore those before it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # None: the handler was not set from Python and could not be restored.
    replaced = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)

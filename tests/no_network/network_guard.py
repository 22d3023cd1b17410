"""An audit hook that forbids every connection and look-up but those of this machine, and records what tried.

Python raises audit events in every thread, so the telemetry thread of a library cannot slip by. A library may swallow
the error, so each attempt is also appended to the file that `PURLD_NETWORK_LOG` names, which the tests read. Processes
that a test starts install the hook by the `sitecustomize` module beside this one.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

LOG_VARIABLE = "PURLD_NETWORK_LOG"

_ADDRESS_EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}  # index of the address
_NAME_EVENTS = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0, "socket.getnameinfo": 0}
_LOCAL_NAMES = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}  # the last two: what a server listens on


class NetworkForbiddenError(OSError):
    """Something tried to reach another machine."""


def is_local(address: Any) -> bool:
    """Return whether a host name or socket address is of this machine: loopback, a Unix socket, or none."""
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    return host in _LOCAL_NAMES or str(host).startswith(("127.", "/", "\0"))


def forbid_network() -> None:
    """Install the hook in this process, for good."""
    sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _ADDRESS_EVENTS:
        target = arguments[_ADDRESS_EVENTS[event]]
    elif event in _NAME_EVENTS:
        target = arguments[_NAME_EVENTS[event]]
    else:
        return
    if is_local(target):
        return
    _record(f"{event} {target!r}")
    raise NetworkForbiddenError(f"the tests allow loopback only: {event} {target!r}")


def _record(attempt: str) -> None:
    stack = "".join(traceback.format_stack()[:-2])
    if path := os.environ.get(LOG_VARIABLE):
        with open(path, "a", encoding="utf-8") as log:
            log.write(f"{attempt} in process {os.getpid()}:\n{stack}\n")

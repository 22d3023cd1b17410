"""Run `purld` commands in forked children, in each of which one system call fails; see fault_shim.c.

Started with the shim in LD_PRELOAD. Reads one JSON line per command, {"arguments", "root", "nth", "mode", "said"}, and
answers with its exit status (negative: the signal). `said` receives what the command prints, and in its last line the
number of durable system calls. Forking saves the seconds that importing takes, so all is imported before.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from importlib import import_module

from purld.cli import main

for module in ("purld.pipeline.pipeline", "httpx2", "transformers.models.qwen2.modeling_qwen2"):
    import_module(module)  # as the command does, which imports what it needs when it needs it

SHIM = ctypes.CDLL(None)


def run_command(order: dict) -> None:
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["purld", *order["arguments"]]
    SHIM.fault_arm(order["root"].encode(), ctypes.c_long(order["nth"]), order["mode"])
    status = 1
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        os.write(said, f"\n{SHIM.fault_count()}".encode())
    os._exit(status)


def serve() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            run_command(order)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    serve()

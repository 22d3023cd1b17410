"""Run `purld` commands in forked children, in each of which one system call fails; see fault_shim.c.

Started with the shim in LD_PRELOAD and the path of a configuration. Reads one JSON line per command, {"arguments",
"root", "nth", "mode", "said"}, and answers with its exit status (negative: the signal) and with one letter for each
durable system call that it made. `said` receives what the command prints. Forking saves the seconds that importing
takes, so all is imported before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from purld.cli import main
from purld.config.load import load_config
from purld.model.load import load_model
from purld.pipeline import sweep
from purld.pipeline.preflight import check_before_spending
from purld.runs.run_dir import RunDir

for module in (
    *("purld.pipeline.pipeline", "purld.pipeline.export", "purld.report.page", "purld.training.sft"),
    *("purld.training.align", "purld.display.results", "httpx2", "peft"),
    "transformers.models.qwen2.modeling_qwen2",
):
    import_module(module)  # as the commands do, which import what they need when they need it

SHIM = ctypes.CDLL(None)
SHIM.fault_calls.restype = ctypes.c_char_p


class ForkedCommand:
    """Stands in for `subprocess.Popen` in a sweep: a command in a fork, in which no call fails.

    The commands that a sweep starts have their own tests, and starting Python for each would take hours.
    """

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def __init__(self, arguments: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], **_: object) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            SHIM.fault_disarm()
            os.setsid()
            os.environ.update(env)
            run_command(list(arguments[arguments.index("-c") + 2 :]), stdout.fileno())

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_command(arguments: list[str], said: int, calls: int | None = None) -> None:
    """Run a command to the end of this process; at its end, write the letters of its calls to `calls`."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["purld", *arguments]
    status = 1
    try:
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if calls is not None:
        os.write(calls, SHIM.fault_calls())
    os._exit(status)


def run_with_fault(order: dict) -> None:
    """Fork, run the command of an order, and answer."""
    calls, calls_in_child = os.pipe()
    child = os.fork()
    if not child:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if order["arguments"][0] == "sweep":
            sweep.subprocess = SimpleNamespace(
                Popen=ForkedCommand, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
            )
        SHIM.fault_arm(order["root"].encode(), ctypes.c_long(order["nth"]), order["mode"])
        run_command(order["arguments"], said, calls_in_child)
    os.close(calls_in_child)
    with open(calls) as letters:  # at most a pipe's 64 KiB
        _, status = os.waitpid(child, 0)
        made = letters.read()
    print(json.dumps([os.waitstatus_to_exitcode(status), made]), flush=True)


def serve(config: Path) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    student = load_config(config).student
    check_before_spending(load_config(config), RunDir(config.parent / "none"))  # fills caches, as does the next
    load_model(student, student.model)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(60)  # that loaded weights
    assert threading.active_count() == 1, f"a fork would lose the other threads: {threading.enumerate()}"
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        run_with_fault(json.loads(line))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

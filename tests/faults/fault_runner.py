"""Run `purld` commands in forked children, in each of which one system call fails; see fault_shim.c.

Started with the shim in LD_PRELOAD and the path of a configuration. Reads one JSON line per command, {"arguments",
"root", "nth", "mode", "said", "calls"}, and answers with its exit status (negative: the signal). `said` receives what
the command prints; `calls`, if it ends by itself, the durable system calls that it made, one a line. Forking saves the
seconds that importing takes, so all is imported before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import typer
import yaml

from purld.cli import app, main
from purld.config import read_yaml
from purld.config.load import load_config
from purld.model.load import load_model
from purld.pipeline import pipeline, sweep
from purld.pipeline.preflight import check_before_spending
from purld.report import page
from purld.report.markup import PageSection
from purld.runs.run_dir import RunDir

for module in (
    *("purld.pipeline.pipeline", "purld.pipeline.export", "purld.report.page", "purld.training.sft"),
    *("purld.training.align", "purld.display.results", "purld.testbed.world.world", "httpx2", "peft"),
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


def run_command(arguments: list[str], said: int, calls: str | None = None) -> None:
    """Run a command to the end of this process; at its end, write its calls to the file `calls`."""
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
        SHIM.fault_disarm()
        Path(calls).write_bytes(SHIM.fault_calls())
    os._exit(status)


def run_with_fault(order: dict) -> None:
    """Fork, run the command of an order, and answer."""
    child = os.fork()
    if not child:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if order["arguments"][0] == "sweep":
            sweep.subprocess = SimpleNamespace(
                Popen=ForkedCommand, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
            )
        SHIM.fault_arm(order["root"].encode(), ctypes.c_long(order["nth"]), order["mode"])
        run_command(order["arguments"], said, order["calls"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def warm_up(path: Path) -> None:
    """Do once what every command does anew, without a durable call; it is most of the time of a short command."""
    config = load_config(path)
    checked = check_before_spending(config, RunDir(path.parent / "none"))
    pipeline.check_before_spending = lambda config, run: checked
    load_model(config.student, config.student.model)  # for what it imports
    page.draw_figures = lambda *_, **__: []
    page.changes_section = lambda _: PageSection("changes", "", "")
    command = typer.main.get_command(app)
    typer.main.get_command = lambda _: command
    parse = read_yaml.parse_yaml
    files = list(path.parent.glob("*.yaml"))
    texts = [file.read_text() for file in files]
    texts += [yaml.safe_dump(load_config(file).model_dump(mode="json"), sort_keys=False) for file in files]
    parsed = {text: pickle.dumps(parse(text)) for text in texts}
    read_yaml.parse_yaml = lambda text: pickle.loads(parsed[text]) if text in parsed else parse(text)


def serve(config: Path) -> None:
    warm_up(config)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
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

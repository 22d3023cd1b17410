"""After the anchors are collected, nothing needs a network: run where the kernel gives none.

That nothing tries to use one either is watched by the audit hook of every test (tests/no_network).
"""

import os

import pytest
from forked import ForkedPython
from typer.testing import CliRunner

from purld.cli import app
from purld.runs.run_dir import RunDir

NO_NAMESPACE = 77
STAGES = f"""
import ctypes, errno, os, socket, sys
from pathlib import Path
from purld.cli import main

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # linux/sched.h
me = os.getuid()
if ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NETWORK):
    print(os.strerror(ctypes.get_errno()))
    sys.exit({NO_NAMESPACE})
Path("/proc/self/uid_map").write_text(f"0 {{me}} 1")  # as unshare(1) does with --map-root-user
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
assert interfaces == ["lo"], interfaces
try:
    socket.create_connection(("127.0.0.1", 80), timeout=1)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
else:
    raise AssertionError("there is a network here")
config, run = sys.argv[1:]
for stage in ("sft", "align", "evaluate", "report"):
    sys.argv = ["purld", stage, config, "--run-dir", run]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, stage
"""


def test_every_stage_after_the_anchors_runs_without_a_network_interface(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    result = CliRunner().invoke(app, ["anchors", str(tiny_config), "--run-dir", str(run.path)], catch_exceptions=False)
    assert result.exit_code == 0
    (tmp_path / "answers.jsonl").unlink()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    process = ForkedPython(STAGES, tiny_config, run.path, said=tmp_path / "said", env=environment)
    status, said = process.wait(), process.said.read_text()
    if status == NO_NAMESPACE:
        pytest.skip(f"the kernel gives no network namespace: {said.strip()}")
    assert status == 0, said
    assert set(run.finished_stages()) == {"anchors", "sft", "probe", "align", "evaluate", "report"}
    assert run.results.exists() and run.report.exists()

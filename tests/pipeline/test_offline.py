"""After the anchors are collected, nothing needs a network: run where the kernel gives none."""

import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from purld.cli import app
from purld.runs.run_dir import RunDir

UNSHARE = ["unshare", "--map-root-user", "--net"]
STAGES = """
import errno, socket, sys
from purld.cli import main
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
assert interfaces == ["lo"], interfaces
for address in ("127.0.0.1", "192.0.2.1"):
    try:
        socket.create_connection((address, 80), timeout=1)
    except OSError as error:
        assert error.errno == errno.ENETUNREACH, error
    else:
        raise AssertionError("there is a network here")
config, run = sys.argv[1:]
for stage in ("align", "evaluate", "report"):
    sys.argv = ["purld", stage, config, "--run-dir", run]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, stage
"""


def no_namespace() -> str | None:
    """Why no network namespace can be made here, if so."""
    if shutil.which(UNSHARE[0]) is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return f"the kernel forbids it: {tried.stderr.strip()}" if tried.returncode else None


def test_stage_two_and_evaluation_run_without_a_network_interface(tiny_config, tmp_path):
    if reason := no_namespace():
        pytest.skip(reason)
    run = RunDir(tmp_path / "run")
    for stage in ("anchors", "sft"):
        result = CliRunner().invoke(app, [stage, str(tiny_config), "--run-dir", str(run.path)], catch_exceptions=False)
        assert result.exit_code == 0
    (tmp_path / "answers.jsonl").unlink()
    command = [*UNSHARE, sys.executable, "-c", STAGES, str(tiny_config), str(run.path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert set(run.finished_stages()) == {"anchors", "sft", "probe", "align", "evaluate", "report"}
    assert run.results.exists() and run.report.exists()

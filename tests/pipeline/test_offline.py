"""After the anchors are collected, nothing needs a network: run where the kernel gives none.

That nothing tries to use one either is watched by the audit hook of every test (tests/no_network).
"""

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


def no_namespace() -> str | None:
    """Why no network namespace can be made here, if so."""
    if shutil.which(UNSHARE[0]) is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return f"the kernel forbids it: {tried.stderr.strip()}" if tried.returncode else None


def test_every_stage_after_the_anchors_runs_without_a_network_interface(tiny_config, tmp_path):
    if reason := no_namespace():
        pytest.skip(reason)
    run = RunDir(tmp_path / "run")
    result = CliRunner().invoke(app, ["anchors", str(tiny_config), "--run-dir", str(run.path)], catch_exceptions=False)
    assert result.exit_code == 0
    (tmp_path / "answers.jsonl").unlink()
    command = [*UNSHARE, sys.executable, "-c", STAGES, str(tiny_config), str(run.path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert set(run.finished_stages()) == {"anchors", "sft", "probe", "align", "evaluate", "report"}
    assert run.results.exists() and run.report.exists()

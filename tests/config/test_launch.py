"""The files of configs/launch: what they start is read by the launchers' own parsers; the torchrun one is run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import purld
from fake_vllm import FakeVllm
from network_guard import LOG_VARIABLE
from rank_processes import assert_only_own_name, free_port

from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir

LAUNCH = Path(__file__).parents[2] / "configs" / "launch"
MEASURED = ("groups", "revisited")  # numbers, which may differ by rounding
OF_PURLD = ["run", "run.yaml", "align.steps=4"]


def torchrun_arguments(script, **variables):
    """Return what torchrun would be given, by a script that a shell runs with a torchrun that only prints."""
    printing = 'torchrun() { printf "%s\\0" "$@"; }; '
    text = re.sub(r"exec torchrun|~/purld-env/bin/torchrun", "torchrun", script)
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(
        ["bash", "-c", printing + text, "script", *OF_PURLD[1:]], env=environment, capture_output=True, check=True
    )
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(done.stdout.decode().split("\0")[:-1])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ("1", 0, "127.0.0.1", "auto")), ({"NODES": "2", "NODE": "1", "HEAD": "a", "GPUS": "8"}, ("2", 1, "a", "8"))],
)
def test_torchrun_gets_its_options_and_purld_its_own(variables, expected):
    found = torchrun_arguments((LAUNCH / "torchrun.sh").read_text(), **variables)
    assert (found.nnodes, found.node_rank, found.master_addr, found.nproc_per_node) == expected
    assert found.module and [found.training_script, *found.training_script_args] == ["purld", *OF_PURLD]


def test_skypilot_starts_torchrun_on_every_node():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "volumes", "file_mounts", "setup", "run"}
    assert set(task) <= known and task["num_nodes"] == 2
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    found = torchrun_arguments(task["run"], SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", **nodes, **task["envs"])
    assert (found.nnodes, found.node_rank, found.nproc_per_node, found.master_addr) == ("2", 1, "8", "10.0.0.1")
    assert found.training_script_args == ["run", "run.yaml", "--run-dir", "/shared/runs/run"]


def test_slurm_starts_one_task_per_gpu():
    text = (LAUNCH / "slurm.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in text.splitlines() if "#SBATCH " in line)
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    (command,) = (shlex.split(line) for line in text.splitlines() if line.startswith("srun "))
    assert command[-3:] == ["purld", "run", "$@"] and "--kill-on-bad-exit=1" in command


def test_accelerate_reads_its_configuration_and_shards_nothing():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / "accelerate.yaml"))
    assert (config.num_processes, config.distributed_type.value) == (8, "MULTI_GPU")
    assert not config.fsdp_config and not config.deepspeed_config


@pytest.fixture
def environment(tmp_path):
    """What torchrun.sh reads, for two processes that reach nothing but this machine."""
    own = {"GPUS": "2", "PORT": str(free_port()), "OMP_NUM_THREADS": "1", LOG_VARIABLE: str(tmp_path / "network.log")}
    return os.environ | own | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_runs_a_whole_run_and_tells_of_a_mistake_once(tiny_config, environment, tmp_path):
    command = [LAUNCH / "torchrun.sh", tiny_config, "--run-dir", tmp_path / "run", "align.steps=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Stage II: alignment") == 1  # rank 0 alone prints
    assert done.stdout.count("Report:") == 1 and (tmp_path / "run" / "report.html").exists()
    failed = subprocess.run([*command, "sft.epochs=9"], env=environment, capture_output=True, text=True)
    ours = [line for line in failed.stderr.splitlines() if line.startswith("purld: ")]
    assert len(ours) == 1 and "sft.epochs" in ours[0], failed.stderr
    assert failed.stderr.count("exitcode  : 2") == 2  # both processes, in torchrun's own summary
    assert_only_own_name(tmp_path / "network.log")


@pytest.fixture
def engine(random_student):
    """A vLLM server for the student."""
    server = FakeVllm(random_student)
    yield server
    server.close()


def run_in_two_processes_and_in_one(overrides, tiny_config, environment, folder, monkeypatch):
    two, one = RunDir(folder / "two"), RunDir(folder / "one")
    command = [LAUNCH / "torchrun.sh", tiny_config, "--run-dir", two.path, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert purld(monkeypatch, "run", tiny_config, "--run-dir", one.path, *overrides) == 0
    return two, one


def assert_same_answers(two, one):
    files = sorted(path.name for path in (one.path / "generations").glob("*.jsonl") if path.stem not in MEASURED)
    assert len(files) == 6  # three models, drawn and greedy
    for name in files:
        assert (two.path / "generations" / name).read_bytes() == (one.path / "generations" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("student", [[], ["student.lora={r: 4}"]], ids=["all weights", "LoRA"])
def test_a_divided_student_gives_the_answers_of_one_process(student, tiny_config, environment, tmp_path, monkeypatch):
    overrides = ["student.shard=fsdp", *student, "align.steps=2", "align.prompts_per_step=3"]
    two, one = run_in_two_processes_and_in_one(overrides, tiny_config, environment, tmp_path, monkeypatch)
    assert_same_answers(two, one)
    for run in (two, one):
        assert purld(monkeypatch, "export", run.path, "--out", run.path / "exported") == 0
    exported = [sorted(path.name for path in (run.path / "exported").iterdir()) for run in (two, one)]
    assert exported[0] == exported[1] and "model.safetensors" in exported[0]
    assert_only_own_name(tmp_path / "network.log")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_draws_the_same_for_a_divided_student(engine, tiny_config, environment, tmp_path, monkeypatch):
    overrides = [
        "student.shard=fsdp",
        "student.lora={r: 4}",
        f"student.engine={{kind: vllm, base_url: {engine.url}}}",
        "align.steps=3",
        "align.prompts_per_step=3",
        "align.importance_cap=2",
    ]
    two, one = run_in_two_processes_and_in_one(overrides, tiny_config, environment, tmp_path, monkeypatch)
    assert_same_answers(two, one)
    ours, theirs = (read_rows(run.groups) for run in (two, one))
    assert [row["candidates"] for row in ours] == [row["candidates"] for row in theirs]
    for row in (row for run in (two, one) for row in read_rows(run.metrics) if row["stage"] == "align"):
        assert row["engine_gap_max"] < 1e-4
    assert_only_own_name(tmp_path / "network.log")

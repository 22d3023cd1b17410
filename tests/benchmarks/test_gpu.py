"""The script that measures GPUs, tried on a CPU with a toy: what it starts, what it says of a part that fails."""

import json
import sys
import time

import gpu
import pytest
from network_guard import LOG_VARIABLE
from rank_processes import assert_only_own_name

TOY = ["--device", "cpu", "--shape", "toy", "--dtype", "float32", "--prompt", "48", "--completion", "8"]
TOY += ["--candidates", "2", "--prompts-per-step", "3"]


def test_a_part_gets_the_sizes_of_the_whole():
    options = gpu.parse_arguments([*TOY, "--all-weights", "--processes", "1", "2"])
    commands = gpu.part_commands(options, "processes")
    assert [gpu.describe_processes(command) for command in commands] == [", 1", ", 2", ", 2, divided weights"]
    _, _, *arguments = gpu.own_command(options)
    again = gpu.parse_arguments([*arguments, "--part", "processes"])
    kept = ("shape", "device", "dtype", "prompt", "completion", "candidates", "prompts_per_step", "lora", "folder")
    assert [getattr(again, name) for name in kept] == [getattr(options, name) for name in kept]


@pytest.mark.parametrize(("gpus", "counts"), [(1, [", 1"]), (6, [", 1", ", 6", ", 6, divided weights"])])
def test_one_process_and_one_on_every_gpu_are_measured(gpus, counts, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: gpus)
    commands = gpu.part_commands(gpu.parse_arguments([]), "processes")
    assert [gpu.describe_processes(command) for command in commands] == counts


ROW = {"what": "a", "result": "7 s"}
SAY = f"print('a warning'); print('''{json.dumps(ROW)}''', flush=True);"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", None),
        ("raise SystemExit(3)", "out of memory"),
        ("raise ValueError('no such shape')", "failed: ValueError: no such shape"),
        ("raise SystemExit(1)", "failed: no message"),
        ("import time; time.sleep(60)", "ended after 1 s, its share of --minutes"),
        (
            "import subprocess; subprocess.run(['sleep', '60'], start_new_session=True)",  # as torchrun starts workers
            "ended after 1 s, its share of --minutes",
        ),
    ],
)
def test_a_part_that_fails_or_takes_too_long_keeps_its_rows_and_is_told(code, said):
    started = time.monotonic()
    assert run_part(SAY + code, 1 if "sleep" in code else 60) == ([ROW], said)
    assert time.monotonic() - started < 30, "what it has started ends with it"


def run_part(code, seconds):
    """Return the rows of a part, and why there are no more."""
    rows, part = [], gpu.run_part([sys.executable, "-c", code], seconds)
    while True:
        try:
            rows.append(next(part))
        except StopIteration as end:
            return rows, end.value


def test_a_row_is_there_before_its_part_has_ended():
    started = time.monotonic()
    part = gpu.run_part([sys.executable, "-c", SAY + "import time; time.sleep(60)"], 60)
    assert next(part) == ROW
    part.close()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ValueError: a\nTraceback\n[rank1]: RuntimeError: b\n====\nRoot Cause", "failed: RuntimeError: b"),
        ("E: KeyError\nRuntimeError: b\npurld.ranks.PeerError: process 1 of 2 …", "failed: RuntimeError: b"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n===", "failed: ==="),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n====", "out of memory"),
    ],
)
def test_what_failed_among_several_processes_is_told(said, told):
    assert gpu.describe_end(1, said) == told


def test_parts_after_the_time_are_left_out():
    options = gpu.parse_arguments([*TOY, "--minutes", "0"])
    rows = list(gpu.measure_all(options, deadline=0.0))
    assert {row["result"] for row in rows[:-1]} == {"left out: 0 minutes were over"}
    assert [row["what"] for row in rows] == [*list(gpu.PARTS)[:-1], "processes, 1", "processes, divided weights"]


@pytest.mark.parametrize("gpus", [1, 8])
def test_all_parts_fit_into_ten_minutes_though_each_takes_25_seconds_to_start(gpus, monkeypatch):
    """By what they take on a GPU that draws a token in 35 ms, and in three times that from divided weights."""
    draw = 256 * 0.035
    seconds = {"groups": 25, "micro-batches": 15, "step": 5 * draw + 15 + 4 * draw, "memory": 10, "processes": 30}
    now, ended = 0.0, []

    def run_part(command, share):
        nonlocal now
        part = command[command.index("--part") + 1]
        needed = 25 + seconds[part] + (25 + 2 * draw if "--divided" in command else 0)
        now += min(needed, share)
        ended.append(needed <= share)
        yield from ()
        return None

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: gpus)
    rows = list(gpu.measure_all(gpu.parse_arguments([]), deadline=600.0))
    assert ended == [True] * (5 if gpus == 1 else 7)
    assert [row["result"] for row in rows] == ["left out: this takes two GPUs of one machine"] * (gpus == 1)


def test_without_trl_the_phases_are_measured_and_the_row_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    rows = list(gpu.measure_step(gpu.parse_arguments(TOY)))
    assert [row["what"] for row in rows] == [*(f"{p}, plain / shared" for p in ("sample", "score", "update")), STEP]
    assert all("figures" in row for row in rows[:3])
    assert rows[3]["result"].startswith("left out, TRL does not run here: ModuleNotFoundError: ")


STEP = "step, TRL / purld"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_table_of_a_toy_on_the_cpu(tmp_path, monkeypatch, capsys):
    output, log = tmp_path / "gpu.json", tmp_path / "network.log"
    monkeypatch.setenv(LOG_VARIABLE, str(log))
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu.py", *TOY, "--all-weights", "--processes", "1", "2", "--minutes", "60", "--output", str(output)],
    )
    gpu.main()
    rows = json.loads(output.read_text())["rows"]
    groups = "toy: 8 groups of 8 x 48 tokens"
    assert [row["what"] for row in rows] == [
        f"{groups}, sampling",
        *(f"{groups}, {n} in a pass" for n in (1, 2, 4, 8)),
        *(f"update, micro-batch {n}" for n in (1, 2)),
        *(f"{phase}, plain / shared" for phase in ("sample", "score", "update")),
        STEP,
        "update's peak",
        "update's peak, plain / shared",
        *(f"step of 3 prompts, {n}" for n in ("1 processes", "2 processes", "2 processes, divided weights")),
    ]
    assert all("figures" in row for row in rows), rows
    assert [row["figures"]["processes"] for row in rows[-3:]] == [1, 2, 2]
    whole, divided = (row["figures"] for row in rows[-2:])
    assert 0.49 * whole["held_bytes"] < divided["held_bytes"] < 0.51 * whole["held_bytes"]
    assert whole["held_bytes"] < whole["peak_bytes"] and "peak_bytes" not in divided  # which gloo hides from torch
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
    assert_only_own_name(log)

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
    assert [command[command.index("--nproc-per-node") + 1] for command in commands] == ["1", "2"]
    _, _, *arguments = gpu.own_command(options)
    again = gpu.parse_arguments([*arguments, "--part", "processes"])
    kept = ("shape", "device", "dtype", "prompt", "completion", "candidates", "prompts_per_step", "lora")
    assert [getattr(again, name) for name in kept] == [getattr(options, name) for name in kept]


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
    assert gpu.run_part([sys.executable, "-c", SAY + code], 1 if "sleep" in code else 60) == ([ROW], said)
    assert time.monotonic() - started < 30, "what it has started ends with it"


def test_parts_after_the_time_are_left_out():
    options = gpu.parse_arguments([*TOY, "--minutes", "0"])
    rows = list(gpu.measure_all(options, deadline=0.0))
    assert [row["result"] for row in rows] == ["left out: 0 minutes were over"] * len(gpu.PARTS)


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
        sys, "argv", ["gpu.py", *TOY, "--processes", "1", "2", "--minutes", "60", "--output", str(output)]
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
        "update's peak, plain / shared",
        *(f"step of 3 prompts, {n} processes" for n in (1, 2)),
    ]
    assert all("figures" in row for row in rows), rows
    assert [row["figures"]["processes"] for row in rows[-2:]] == [1, 2]
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
    assert_only_own_name(log)

"""The script that measures GPUs, tried on a CPU with a toy: what it starts, what it says of a part that fails."""

import json
import sys

import gpu
import pytest
from network_guard import LOG_VARIABLE
from rank_processes import assert_only_own_name

TOY = ["--device", "cpu", "--shape", "toy", "--dtype", "float32", "--prompt", "48", "--completion", "8"]
TOY += ["--candidates", "2", "--prompts-per-step", "3"]


def test_a_part_gets_the_sizes_of_the_whole():
    options = gpu.parse_arguments([*TOY, "--all-weights", "--processes", "1", "2"])
    _, _, *arguments = gpu.own_command(options)
    again = gpu.parse_arguments([*arguments, "--part", "share"])
    kept = ("shape", "device", "dtype", "prompt", "completion", "candidates", "prompts_per_step", "lora")
    assert [getattr(again, name) for name in kept] == [getattr(options, name) for name in kept]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(7)", None),
        ("raise SystemExit(3)", "out of memory"),
        ("raise ValueError('no such shape')", "failed: ValueError: no such shape"),
        ("raise SystemExit(1)", "failed: no message"),
    ],
)
def test_a_part_that_fails_is_told_in_its_row(code, said):
    printed, problem = gpu.run_part([sys.executable, "-c", code])
    assert problem == said and (printed == "7\n") == (said is None)


def test_parts_after_the_time_are_left_out():
    options = gpu.parse_arguments([*TOY, "--minutes", "0"])
    rows = list(gpu.measure_all(options, deadline=0.0))
    assert [row["result"] for row in rows] == ["left out: 0 minutes were over"] * 3


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
    assert [row["what"] for row in rows] == [
        "step and memory, TRL / purld",
        "update, micro-batch 1",
        "update, micro-batch 2",
        "step of 3 prompts, 1 processes",
        "step of 3 prompts, 2 processes",
    ]
    assert all("figures" in row for row in rows), rows
    assert [row["figures"]["processes"] for row in rows[3:]] == [1, 2]
    assert capsys.readouterr().out.count("\n| ") == 6
    assert_only_own_name(log)

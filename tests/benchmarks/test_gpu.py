"""The script that measures GPUs, tried on a CPU with a toy: what it starts, what it says of a part that fails."""

import json
import random
import sys
import time
from types import SimpleNamespace

import gpu
import pytest
import torch
from network_guard import LOG_VARIABLE
from rank_processes import assert_only_own_name
from step import score_for_trl

from purld.model import log_probs
from purld.model.self_evaluation import GroupTexts, SelfEvaluator

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
    seconds = {"groups": 25, "micro-batches": 15, "prompts": 8 * draw + 20, "step": 8 * draw + 15}
    seconds |= {"memory": 10, "processes": 30}
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
    assert ended == [True] * (6 if gpus == 1 else 8)
    assert [row["result"] for row in rows] == ["left out: this takes two GPUs of one machine"] * (gpus == 1)


def test_without_trl_the_phases_are_measured_and_the_row_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    rows = list(gpu.measure_step(gpu.parse_arguments(TOY)))
    assert [row["what"] for row in rows] == [*(f"{p}, plain / shared" for p in ("score", "update", "sample")), STEP]
    assert all("figures" in row for row in rows[:3])
    assert rows[3]["result"].startswith("left out, TRL does not run here: ModuleNotFoundError: ")


STEP = "step, TRL / purld"


def test_steps_of_several_prompts_are_measured_with_the_prompt_shared_and_repeated(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    make_prefixes, passes = log_probs.make_prefixes, []

    def note_pass(model, groups, *others):
        found = make_prefixes(model, groups, *others)
        passes.append((type(found).__name__, len(groups)))
        return found

    monkeypatch.setattr(log_probs, "make_prefixes", note_pass)
    part = gpu.measure_prompts(gpu.parse_arguments(TOY))
    shared, against_trl = next(part), next(part)
    assert set(passes) == {("SharedPrefixes", 3)}, "all prompts of a step go through the student together"
    passes.clear()
    (repeated,) = part
    assert set(passes) == {("FullSequences", 3)}
    assert against_trl["result"].startswith("left out, TRL does not run here: ")
    for row in (shared, repeated):
        assert row["figures"]["micro_batch"] == 8, "as the trainer chooses on a CPU"
        assert all(min(row["figures"][phase]) > 0 for phase in ("sample", "score", "update"))


def test_trl_gets_the_largest_batch_that_fits(monkeypatch):
    tried = []

    def steps(bench, step, repeats):
        tried.append(step.micro_batch)
        if step.micro_batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"trl": [2.0], "purld": [1.0], "trl_peak_bytes": [2.0**31], "purld_peak_bytes": [2.0**30]}

    monkeypatch.setattr(gpu, "steps_against_trl", steps)
    monkeypatch.setattr(gpu, "release_memory", lambda: None)  # which takes a second among all that tests keep
    bench = SimpleNamespace(cell=SimpleNamespace(candidates=4))
    row = gpu.compare_with_trl(bench, SimpleNamespace(questions=[None] * 3, take=None), "step", 1)
    assert tried == [12, 6, 3] and row["figures"]["trl_batch"] == 3
    assert row["result"] == "2 / 1 s = 2.00; TRL's batch 3; at the peak 2 / 1 GiB beyond what each holds"


def test_our_steps_take_passes_that_fit(monkeypatch):
    step = gpu.StudentStep.__new__(gpu.StudentStep)
    step.update = gpu.GroupUpdate(roles=None, micro_batch_size=8, pad=0, backward=None, autocast=None)
    step._optimizer = SimpleNamespace(zero_grad=lambda: None)
    tried = []

    def take(drawn):
        tried.append(step.update.micro_batch_size)
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step, "take", take)
    monkeypatch.setattr(gpu, "release_memory", lambda: None)
    limit = 2
    step.warm_up()
    assert tried == [8, 4, 2]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        step.warm_up()
    assert tried == [8, 4, 2, 2, 1]


def test_a_reward_function_gives_the_scores_of_the_trainers_own_scorer():
    options = gpu.parse_arguments(TOY)
    bench = gpu.make_bench(options)
    questions = gpu.make_questions(bench.encoder, options)
    assert len({question.prompt.id for question in questions}) == 3
    texts = [gpu.random_words(8, random.Random(n)) for n in range(6)]
    step = gpu.ComparedStep(questions, bench.step, micro_batch=4)
    groups = [GroupTexts(q.prompt, q.anchor, texts[2 * n : 2 * n + 2]) for n, q in enumerate(questions)]
    with bench.roles.frozen() as model:
        scored = SelfEvaluator(bench.encoder, "expected", 16).score_groups(model, groups)
    expected = [score for group in scored for score in group.candidates]
    assert score_for_trl(bench, step, texts) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fits", [True, False])
def test_each_form_of_a_phase_warms_up_before_its_first_turn(fits, monkeypatch):
    monkeypatch.setattr(gpu, "release_memory", lambda: None)
    done = []

    def plain():
        done.append("plain")
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    forms = {"plain": plain, "shared": lambda: done.append("shared")}
    warm_up = {"plain": lambda: done.append("first plain"), "shared": lambda: done.append("first shared")}
    seconds = gpu.time_both(forms, warm_up, torch.device("cpu"))
    assert done == ["first shared", "first plain", *(["plain", "shared"] * 3 if fits else ["plain", "shared"])]
    assert [len(seconds[form]) for form in ("plain", "shared")] == ([3, 3] if fits else [0, 1])


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
        *(f"step of 3 prompts{what}" for what in ("", ", TRL / purld", ", prompt repeated / shared")),
        *(f"{phase}, plain / shared" for phase in ("score", "update", "sample")),
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

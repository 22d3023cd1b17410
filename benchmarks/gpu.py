"""Fill a table about the GPUs of this machine in ten minutes: time and memory of a step, and several processes.

    python benchmarks/gpu.py                                    1.5b, LoRA, bfloat16, on every GPU
    python benchmarks/gpu.py --shape 7b --completion 1024 --output gpu.json
    python benchmarks/gpu.py --device cpu --shape toy --dtype float32 --prompt 48 --completion 16   tries the script

Five parts, each in a process of its own, so that one which fails or runs out of memory does not end the others:

1. 1, 2, 4 and 8 groups of short prompts in one pass (a student of 135 million weights);
2. the update of a group at micro-batches of 1, 2, 4, ...: what fits, and what it takes;
3. the phases of a step against forms that repeat the prompt, and one step against TRL's GRPOTrainer if it is installed;
4. the peak memory of the update in both forms;
5. a step of several prompts on 1, 2, ... processes that torchrun starts, one per GPU.

A part is ended when its share of `--minutes` is over, which is at least a minute and a half while there is time. The
table keeps what the part had measured until then, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from step import (
    SHAPES,
    Bench,
    Cell,
    bytes_in_use,
    format_ratio,
    measure_peaks,
    peak_bytes,
    random_words,
    read_clock,
    read_versions,
    steps_against_trl,
    time_call,
    time_phases,
    update_rate,
)

from purld import ranks
from purld.methods.losses import GroupLoss, GroupTokens
from purld.model.likelihood import AnchoredRows, in_context_scores
from purld.records import Prompt
from purld.training.group_update import GroupUpdate, UnmeasuredGroup

_NO_MEMORY = 3  # the exit status of a part that does not fit
_TURNS = 3
_LEAST_SECONDS = 90.0  # of a part: starting Python, the libraries and a model of 1.5b takes 20 or more
_SHORT = Cell(prompt=100, completion=48, candidates=8)  # of the part on several groups; other prompts are shorter
_GROUPS = 8

Row = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Step time and memory on this machine's GPUs.")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a candidate")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=8, help="in the part with several processes")
    parser.add_argument("--all-weights", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="how many, each; 1, 2, 4, ... up to the GPUs by default"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to measure")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lora = not options.all_weights
    return options


def main() -> None:
    """Measure every part and print the table, or print the rows of one part as JSON."""
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py: there is no GPU here that torch can use; --device cpu --shape toy tries the script."
        )
    if options.part is None:
        print_table(options)
        return
    try:
        for row in PARTS[options.part](options):
            print(json.dumps(row), flush=True)
    except torch.OutOfMemoryError as error:
        print(f"OutOfMemoryError: {error}", file=sys.stderr)  # torchrun ends with a status of its own
        sys.exit(_NO_MEMORY)


# --- the table -----------------------------------------------------------------------------------------------


def print_table(options: argparse.Namespace) -> None:
    """Print the table as its parts end, and write the figures as JSON where `options` say so."""
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"machine": describe_machine(options), "rows": []}
    print(report["machine"], "\n\n| what | result |\n|---|---|", sep="", flush=True)
    for row in measure_all(options, deadline):
        report["rows"].append(row)
        print(f"| {row['what']} | {row['result']} |", flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def describe_machine(options: argparse.Namespace) -> str:
    """Return the device, the versions and the sizes in one line."""
    device = "CPU"
    if options.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({memory:.0f} GiB)"
    weights = "LoRA r=16" if options.lora else "all weights"
    sizes = f"prompt {options.prompt}, completion {options.completion}, {options.candidates} candidates"
    versions = ", ".join(f"{name} {version}" for name, version in read_versions().items())
    return f"{device}; {options.shape}, {weights}, {options.dtype}; {sizes}; {versions}"


def measure_all(options: argparse.Namespace, deadline: float) -> Iterator[Row]:
    """Yield the table's rows: what was measured, the result in words, and the figures."""
    for index, part in enumerate(options.parts):
        left = deadline - time.monotonic()
        if left <= 0:
            yield {"what": part, "result": f"left out: {options.minutes:g} minutes were over"}
            continue
        # Parts that end early leave their time to the others, so each may take somewhat more than its share; and where
        # time is short, the first parts to their end say more than the beginning of each.
        share = min(left, max(_LEAST_SECONDS, 1.5 * left / (len(options.parts) - index)))
        for command in part_commands(options, part):
            rows, problem = run_part(command, min(share, deadline - time.monotonic()))
            yield from rows
            if problem is not None:
                yield {"what": part, "result": problem}
                break


def part_commands(options: argparse.Namespace, part: str) -> list[list[str]]:
    """Return the commands that measure a part: one, or for several processes one per number of them."""
    command = [*own_command(options), "--part", part]
    if part != "processes":
        return [command]
    gpus = torch.cuda.device_count() if options.device == "cuda" else 1
    counts = options.processes or [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [[*launch, str(count), *command[1:]] for count in counts]


def own_command(options: argparse.Namespace) -> list[str]:
    """Return the command that runs this script with the same sizes."""
    names = ("shape", "device", "dtype", "prompt", "completion", "candidates", "prompts_per_step")
    sizes = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, __file__, *sizes, *["--all-weights"] * options.all_weights]


def run_part(command: Sequence[str], seconds: float) -> tuple[list[Row], str | None]:
    """Run a part for at most so many seconds; return its rows, and in words why there are no more, if so."""
    one_gpu = {} if "torch.distributed.run" in command else {"CUDA_VISIBLE_DEVICES": first_gpu()}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | one_gpu,
    )
    try:
        printed, said = process.communicate(timeout=max(seconds, 0.0))
        problem = describe_end(process.returncode, said)
    except subprocess.TimeoutExpired:
        end_with_children(process.pid)
        printed, _ = process.communicate()
        problem = f"ended after {seconds:.0f} s, its share of --minutes"
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"what"')], problem


def end_with_children(pid: int) -> None:
    """End a process and all that it has started; torchrun's workers are in sessions of their own."""
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def first_gpu() -> str:
    """Return the first GPU as CUDA_VISIBLE_DEVICES names it; libraries would spread one process over several."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def describe_end(status: int, said: str) -> str | None:
    """Return in words why a part ended, by its exit status and what it wrote on stderr; None if it is complete."""
    if status == 0:
        return None
    if status == _NO_MEMORY or "OutOfMemoryError" in said:
        return "out of memory"
    last = (said.strip().splitlines() or ["no message"])[-1]
    return f"failed: {last[:200]}"


# --- 1. several groups in one pass ---------------------------------------------------------------------------


def measure_groups(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per number of groups in a pass: the seconds of scoring and of updating on eight groups."""
    shape = "toy" if options.shape == "toy" else "135m"
    bench = Bench.for_text(SHAPES[shape], _SHORT, options)
    rng = random.Random(2)
    prompts = [
        Prompt.from_text(random_words(rng.randrange(_SHORT.prompt // 2, _SHORT.prompt), rng)) for _ in range(_GROUPS)
    ]
    encoded = [bench.encoder.encode_prompt(prompt) for prompt in prompts]
    name = f"{shape}: {_GROUPS} groups of {_SHORT.candidates} x {_SHORT.completion} tokens"
    seconds = [
        time_call(lambda: bench.sampler(bench.policy, encoded, _SHORT.candidates, range(_GROUPS)), bench.device)
        for _ in range(2)
    ]
    yield {"what": f"{name}, sampling", "result": f"{seconds[-1]:.3g} s", "figures": {"seconds": seconds[-1]}}
    groups = [UnmeasuredGroup(prompt, bench.completions) for prompt in encoded]
    to_score = [AnchoredRows(prompt, bench.anchor, bench.completions) for prompt in prompts]
    alone: dict[str, float] = {}
    for together in [2**n for n in range(_GROUPS.bit_length())]:
        update = make_update(bench, together * _SHORT.candidates)
        score = partial(score_groups, bench, to_score, together * (_SHORT.candidates + 1))
        forms: dict[str, Callable[[], Any]] = {"score": score, "update": partial(step_on, bench, update, groups)}
        found = {phase: median_seconds(work, bench.device) for phase, work in forms.items()}
        alone = alone or found
        told = ", ".join(
            f"{phase} {found[phase]:.3g} s ({alone[phase] / found[phase]:.2f} times as fast)" for phase in found
        )
        yield {"what": f"{name}, {together} in a pass", "result": told, "figures": found}


def score_groups(bench: Bench, groups: Sequence[AnchoredRows], batch_size: int) -> None:
    """Score groups by their likelihood with the anchor in the context."""
    with bench.roles.frozen() as model:
        in_context_scores(model, bench.encoder, groups, batch_size)


def step_on(bench: Bench, update: GroupUpdate, groups: Sequence[UnmeasuredGroup]) -> None:
    """Measure groups as the trainer does, add their gradient, and update the weights."""
    add_gradient(bench, update, groups, 1.0 / len(groups))
    take_step(bench)


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of some turns, after one to warm up."""
    return statistics.median([time_call(work, device) for _ in range(1 + _TURNS)][1:])


# --- 2. micro-batches ----------------------------------------------------------------------------------------


def measure_micro_batches(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per micro-batch, up to the first that does not fit: seconds of a group's update, and peak bytes."""
    bench = make_bench(options)
    groups = [UnmeasuredGroup(bench.encoded_prompt, bench.completions)]
    size = 1
    while size <= options.candidates:
        bytes_in_use(bench.device)
        seconds = median_seconds(partial(step_on, bench, make_update(bench, size), groups), bench.device)
        peak = peak_bytes(bench.device)
        yield {
            "what": f"update, micro-batch {size}",
            "result": f"{seconds:.3g} s, {peak / 2**30:.3g} GiB in all at its peak",
            "figures": {"seconds": seconds, "peak_bytes": peak},
        }
        size *= 2


# --- 3. and 4. against plain forms and TRL --------------------------------------------------------------------


def measure_step(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per phase, and one on whole steps of TRL's and ours, or on why there are none."""
    bench = make_bench(options)
    phases = time_phases(bench, _TURNS)
    for phase, both in phases.items():
        plain, shared = (statistics.median(both[form]) for form in ("plain", "shared"))
        result = f"{plain:.3g} / {shared:.3g} s = {format_ratio(both['plain'], both['shared'])}"
        if phase == "update":
            rate = update_rate(SHAPES[options.shape], bench.cell, shared, options.lora)
            result += f"; {rate / 1e12:.3g} TFLOP/s"
        yield {"what": f"{phase}, plain / shared", "result": result, "figures": both}
    what = "step, TRL / purld"
    try:
        seconds = steps_against_trl(bench, _TURNS)
    except torch.OutOfMemoryError:
        yield {"what": what, "result": "out of memory"}
    except Exception as error:  # any other version of TRL may raise anything
        yield {"what": what, "result": f"left out, TRL does not run here: {type(error).__name__}: {str(error)[:200]}"}
    else:
        theirs, ours = (statistics.median(seconds[side]) for side in ("trl", "purld"))
        result = f"{theirs:.3g} / {ours:.3g} s = {format_ratio(seconds['trl'], seconds['purld'])}"
        yield {"what": what, "result": result, "figures": seconds}


def measure_memory(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row on the update's peak memory in both forms."""
    peaks = measure_peaks(Cell(options.prompt, options.completion, options.candidates), options)
    plain, shared = (peaks[form] / 2**30 for form in ("plain", "shared"))
    result = f"{plain:.3g} / {shared:.3g} GiB = {plain / shared:.2f}"
    yield {"what": "update's peak, plain / shared", "result": result, "figures": peaks}


# --- 5. several processes ------------------------------------------------------------------------------------


def measure_processes(options: argparse.Namespace) -> Iterator[Row]:
    """Take steps that the processes of a job share; in process 0 yield a row with the median seconds."""
    with ranks.together():
        bench = make_bench(options)
        update = make_update(bench, options.candidates)
        turns = [share_step(bench, update, options.prompts_per_step) for _ in range(1 + _TURNS)][1:]
        if ranks.is_first():
            seconds, summing = (statistics.median(column) for column in zip(*turns, strict=True))
            yield {
                "what": f"step of {options.prompts_per_step} prompts, {ranks.count()} processes",
                "result": f"{seconds:.3g} s, of it {summing:.3g} s for the gradients",
                "figures": {"seconds": seconds, "sum_seconds": summing, "processes": ranks.count()},
            }


def share_step(bench: Bench, update: GroupUpdate, prompts: int) -> tuple[float, float]:
    """Sample, score and update on this process's prompts; return the wall seconds, and those of summing gradients."""
    ranks.barrier()
    started = time.perf_counter()
    numbers = range(prompts)[ranks.my_share(prompts)]
    drawn = bench.sampler(bench.policy, [bench.encoded_prompt] * len(numbers), bench.cell.candidates, numbers)
    groups = [UnmeasuredGroup(bench.encoded_prompt, [c.ids for c in group]) for group in drawn]
    for group in groups:
        bench.score_shared([bench.encoder.decode_text(ids) for ids in group.ids])
    add_gradient(bench, update, groups, 1.0 / prompts)
    read_clock(bench.device)
    summing = time.perf_counter()
    ranks.sum_gradients(bench.policy.parameters())
    read_clock(bench.device)
    summed = time.perf_counter() - summing
    take_step(bench)
    read_clock(bench.device)
    ranks.barrier()
    return time.perf_counter() - started, summed


# --- what they share -----------------------------------------------------------------------------------------


def make_bench(options: argparse.Namespace) -> Bench:
    """Make the model, the prompt and the candidates."""
    return Bench.for_text(SHAPES[options.shape], Cell(options.prompt, options.completion, options.candidates), options)


def make_update(bench: Bench, micro_batch: int) -> GroupUpdate:
    """Return the update of the trainer, on the bench's models."""
    return GroupUpdate(bench.roles, micro_batch, bench.encoder.pad, torch.Tensor.backward, contextlib.nullcontext)


def add_gradient(bench: Bench, update: GroupUpdate, groups: Sequence[UnmeasuredGroup], share: float) -> None:
    """Measure groups as the trainer does, and add their gradient."""
    members = update.members(bench.policy, groups, keep_old=False)

    def objective(tokens: GroupTokens) -> GroupLoss:
        gain = bench.advantages().unsqueeze(1) * tokens.policy * tokens.mask
        return GroupLoss(-(gain.sum(dim=1) / tokens.mask.sum(dim=1)).mean(), {})

    update(bench.policy, members, [objective] * len(members), share)


def take_step(bench: Bench) -> None:
    """Clip, update the weights, and clear the gradients."""
    torch.nn.utils.clip_grad_norm_(bench.policy.parameters(), 1.0)
    bench.optimizer.step()
    bench.optimizer.zero_grad()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "groups": measure_groups,
    "micro-batches": measure_micro_batches,
    "step": measure_step,
    "memory": measure_memory,
    "processes": measure_processes,
}


if __name__ == "__main__":
    main()

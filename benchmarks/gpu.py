"""Fill a table about the GPUs of this machine in ten minutes: step time and memory against TRL, and several processes.

    python benchmarks/gpu.py                                    1.5b, LoRA, bfloat16, on every GPU
    python benchmarks/gpu.py --shape 7b --completion 1024 --output gpu.json
    python benchmarks/gpu.py --device cpu --shape toy --dtype float32 --prompt 48 --completion 16   tries the script

Three parts, each in processes of its own, so that one which runs out of memory does not end the others:

1. one Stage II step of one prompt against TRL's GRPOTrainer, and the peak memory of the update (`benchmarks/step.py`);
2. the update of a group at micro-batches of 1, 2, 4, ...: what fits, and what it takes;
3. a step of several prompts on 1, 2, ... processes that torchrun starts, one per GPU.

A part that would start after `--minutes` is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from step import SHAPES, Bench, Cell, bytes_in_use, peak_bytes, read_clock

from purld import ranks
from purld.methods.losses import GroupLoss, GroupTokens
from purld.training.group_update import GroupUpdate

_NO_MEMORY = 3  # the exit status of a part that does not fit
_TURNS = 3


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
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    parser.add_argument("--part", choices=["fit", "share"], help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lora = not options.all_weights
    return options


def main() -> None:
    """Measure every part and print the table, or one part in a process of its own."""
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py: there is no GPU here that torch can use; --device cpu --shape toy tries the script."
        )
    if options.part == "fit":
        print(json.dumps(measure_update(options)))
    elif options.part == "share":
        measure_share(options)
    else:
        print_table(options)


def print_table(options: argparse.Namespace) -> None:
    """Print the table row by row, and write the figures as JSON where `options` say so."""
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
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    return f"{device}; {options.shape}, {weights}, {options.dtype}; {sizes}; {versions}"


def measure_all(options: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the table's rows: what was measured, the result in words, and the figures."""
    parts = [lambda: [compare_with_trl(options)], lambda: find_micro_batches(options), lambda: time_processes(options)]
    for name, part in zip(("step against TRL", "micro-batches", "several processes"), parts, strict=True):
        if time.monotonic() > deadline:
            yield {"what": name, "result": f"left out: {options.minutes:g} minutes were over"}
        else:
            yield from part()


def compare_with_trl(options: argparse.Namespace) -> dict[str, Any]:
    """Return the row on one step and its memory, TRL's and ours."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        command = [sys.executable, str(Path(__file__).with_name("step.py")), *model_arguments(options)]
        command += ["--prompts", str(options.prompt), "--repeats", str(_TURNS), "--output", str(output)]
        if options.lora:
            command.append("--lora")
        problem = run_part(command)[1]
        if problem is not None:
            return {"what": "step and memory, TRL / purld", "result": problem}
        (figures,) = json.loads(output.read_text())["rows"]
    theirs, ours = (statistics.median(figures["step"][side]) for side in ("trl", "purld"))
    plain, shared = (figures["peak_bytes"][form] / 2**30 for form in ("plain", "shared"))
    result = f"{theirs:.3g} / {ours:.3g} s = {theirs / ours:.2f}; {plain:.3g} / {shared:.3g} GiB = {plain / shared:.2f}"
    return {"what": "step and memory, TRL / purld", "result": result, "figures": figures}


def find_micro_batches(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per micro-batch, up to the first that does not fit."""
    size = 1
    while size <= options.candidates:
        command = [*own_command(options), "--part", "fit", "--micro-batch", str(size)]
        printed, problem = run_part(command)
        row: dict[str, Any] = {"what": f"update, micro-batch {size}"}
        if problem is not None:
            yield row | {"result": problem}
            return
        figures = json.loads(printed.splitlines()[-1])
        result = f"{figures['seconds']:.3g} s, {figures['peak_bytes'] / 2**30:.3g} GiB in all at its peak"
        yield row | {"result": result, "figures": figures}
        size *= 2


def time_processes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per number of processes."""
    gpus = torch.cuda.device_count() if options.device == "cuda" else 1
    counts = options.processes or [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]
    alone: float | None = None
    for count in counts:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        printed, problem = run_part([*start, *own_command(options)[1:], "--part", "share"])
        row: dict[str, Any] = {"what": f"step of {options.prompts_per_step} prompts, {count} processes"}
        if problem is not None:
            yield row | {"result": problem}
            return
        figures = json.loads(printed.splitlines()[-1])
        alone = alone or figures["seconds"]
        result = f"{figures['seconds']:.3g} s ({alone / figures['seconds']:.2f} times as fast)"
        yield row | {"result": f"{result}, of it {figures['sum_seconds']:.3g} s for the gradients", "figures": figures}


def model_arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments of model and sizes that both scripts take."""
    names = ("shape", "device", "dtype", "completion", "candidates")
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


def own_command(options: argparse.Namespace) -> list[str]:
    """Return the command that runs a part of this script with the same sizes."""
    more = ["--prompt", str(options.prompt), "--prompts-per-step", str(options.prompts_per_step)]
    return [sys.executable, __file__, *model_arguments(options), *more, *["--all-weights"] * options.all_weights]


def run_part(command: Sequence[str]) -> tuple[str, str | None]:
    """Run a part and return what it prints, and in words why there is no result; None if there is one."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout, None
    if done.returncode == _NO_MEMORY or "OutOfMemoryError" in done.stderr:
        return "", "out of memory"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return "", f"failed: {last[:200]}"


def make_bench(options: argparse.Namespace) -> Bench:
    """Make the model, the prompt and the candidates."""
    return Bench.for_text(SHAPES[options.shape], Cell(options.prompt, options.completion, options.candidates), options)


def measure_update(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a group's update with the optimizer's step, and the bytes in use at its peak."""
    try:
        bench = make_bench(options)
        update = make_update(bench, options.micro_batch)
        bytes_in_use(bench.device)
        seconds = [time_turn(bench, update) for _ in range(1 + _TURNS)][1:]
    except torch.OutOfMemoryError:
        sys.exit(_NO_MEMORY)
    return {"seconds": statistics.median(seconds), "peak_bytes": peak_bytes(bench.device)}


def make_update(bench: Bench, micro_batch: int) -> GroupUpdate:
    """Return the update of the trainer, on the bench's models."""
    return GroupUpdate(bench.roles, micro_batch, bench.encoder.pad, torch.Tensor.backward, contextlib.nullcontext)


def time_turn(bench: Bench, update: GroupUpdate) -> float:
    """Return the seconds of one update on the bench's candidates."""
    start = read_clock(bench.device)
    add_gradient(bench, update, bench.completions, 1.0)
    take_step(bench)
    return read_clock(bench.device) - start


def add_gradient(bench: Bench, update: GroupUpdate, completions: Sequence[Sequence[int]], share: float) -> None:
    """Measure a group as the trainer does, and add its gradient."""
    members = update.members(bench.policy, bench.encoded_prompt, completions, keep_old=False)

    def objective(tokens: GroupTokens) -> GroupLoss:
        gain = bench.advantages().unsqueeze(1) * tokens.policy * tokens.mask
        return GroupLoss(-(gain.sum(dim=1) / tokens.mask.sum(dim=1)).mean(), {})

    update(bench.policy, members, objective, share)


def take_step(bench: Bench) -> None:
    """Clip, update the weights, and clear the gradients."""
    torch.nn.utils.clip_grad_norm_(bench.policy.parameters(), 1.0)
    bench.optimizer.step()
    bench.optimizer.zero_grad()


def measure_share(options: argparse.Namespace) -> None:
    """Take steps that the processes of a job share; process 0 prints the median seconds."""
    with ranks.together():
        bench = make_bench(options)
        update = make_update(bench, min(8, options.candidates))
        turns = [share_step(bench, update, options.prompts_per_step) for _ in range(1 + _TURNS)][1:]
        if ranks.is_first():
            seconds, summing = (statistics.median(column) for column in zip(*turns, strict=True))
            print(json.dumps({"seconds": seconds, "sum_seconds": summing, "processes": ranks.count()}))


def share_step(bench: Bench, update: GroupUpdate, prompts: int) -> tuple[float, float]:
    """Sample, score and update on this process's prompts; return the wall seconds, and those of summing gradients."""
    ranks.barrier()
    started = time.perf_counter()
    for number in range(prompts)[ranks.my_share(prompts)]:
        (group,) = bench.sampler(bench.policy, [bench.encoded_prompt], bench.cell.candidates, seeds=[number])
        completions = [c.ids for c in group]
        bench.score_shared([bench.encoder.decode_text(ids) for ids in completions])
        add_gradient(bench, update, completions, 1.0 / prompts)
    read_clock(bench.device)
    summing = time.perf_counter()
    ranks.sum_gradients(bench.policy.parameters())
    read_clock(bench.device)
    summed = time.perf_counter() - summing
    take_step(bench)
    read_clock(bench.device)
    ranks.barrier()
    return time.perf_counter() - started, summed


if __name__ == "__main__":
    main()

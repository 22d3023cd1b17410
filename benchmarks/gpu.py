"""Fill a table about the GPUs of this machine in ten minutes: time and memory of a step, and several processes.

    python benchmarks/gpu.py                                    1.5b, LoRA, bfloat16, on every GPU
    python benchmarks/gpu.py --shape 7b --completion 1024 --output gpu.json
    python benchmarks/gpu.py --device cpu --shape toy --dtype float32 --prompt 48 --completion 16   tries the script

Five parts:

1. 1, 2, 4 and 8 groups of short prompts in one pass (a student of 135 million weights);
2. the update of a group at micro-batches of 1, 2, 4, ...: what fits, and what it takes;
3. the phases of a step against forms that repeat the prompt, and one step against TRL's GRPOTrainer if it is installed;
4. the peak memory of the update in both forms;
5. a step of several prompts, in one process and in one per GPU, which torchrun starts: as they are, and with the
   student's weights divided among them (`student.shard: fsdp`), with the seconds and the peak memory of a process.

Each part runs in a process of its own, so that one which fails or runs out of memory does not end the others. A row is
printed, and written to --output, as soon as it is measured. A part that takes more than its share of `--minutes` is
ended, and what it had measured stays. Starting a part takes 15 to 30 seconds: Python, the libraries and a model.

Part 5 needs two GPUs of one machine or more for the divided weights; they talk over NCCL, and over gloo on a CPU, where
`--processes 2` tries it, without their peak. Meanwhile the student lies in the folder for temporary files: 3 GB for
1.5b, 15 GB for 7b.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
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
    make_optimizer,
    make_tokenizer,
    peak_allocated,
    peak_bytes,
    peak_of_update,
    phase_forms,
    random_model,
    random_words,
    read_clock,
    read_versions,
    steps_against_trl,
    time_call,
    update_rate,
)

from purld import ranks
from purld.config.schema import Lora, Student
from purld.methods.losses import GroupLoss, GroupTokens
from purld.model.at_once import release_memory
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.likelihood import AnchoredRows, in_context_scores
from purld.model.load import default_device, load_roles
from purld.model.out_of_memory import is_out_of_memory
from purld.model.sample import Decoding, GenerateSampler
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Prompt
from purld.training.checkpoints import device_autocast
from purld.training.group_update import GroupUpdate, UnmeasuredGroup

_NO_MEMORY = 3  # the exit status of a part that does not fit
_TURNS = 3  # of a measurement, fewer where they take long
_TURN_SECONDS = 10.0  # after so many no other turn is begun
_LEAST_SECONDS = 90.0  # a command is given, of which starting takes up to 30
_RESERVED_SECONDS = 45.0  # that a command leaves to each of those after it, where it could use more than the least
_WARM_UP_TOKENS = 8
_ERROR_LINE = re.compile(r"(?m)^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .*)$")
_OF_OTHERS = ("torch.distributed.elastic", "purld.ranks.PeerError")  # what torchrun and the other processes say
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
    parser.add_argument("--processes", type=int, nargs="+", help="how many, each; by default 1 and as many as GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to measure")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--divided", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help=argparse.SUPPRESS)
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
    except Exception as error:
        traceback.print_exc()
        # Without waiting for the other processes' collectives, which may never end.
        ranks.exit_process(_NO_MEMORY if is_out_of_memory(error) else 1)


# --- the table -----------------------------------------------------------------------------------------------


def print_table(options: argparse.Namespace) -> None:
    """Print the table as its parts end, and write the figures as JSON where `options` say so."""
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"machine": describe_machine(options), "rows": []}
    print(report["machine"], "\n\n| what | result |\n|---|---|", sep="", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
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
    planned = [(part, command) for part in options.parts for command in part_commands(options, part)]
    for index, (part, command) in enumerate(planned):
        left = deadline - time.monotonic()
        what = f"{part}{describe_processes(command)}"
        if left <= 0:
            yield {"what": what, "result": f"left out: {options.minutes:g} minutes were over"}
            continue
        share = seconds_of_command([WEIGHTS[name] for name, _ in planned[index:]], left)
        problem = yield from run_part(command, share)
        if problem is not None:
            yield {"what": what, "result": problem}
    if "processes" in options.parts and not any("--divided" in command for _, command in planned):
        yield {"what": "processes, divided weights", "result": "left out: this takes two GPUs of one machine"}


def seconds_of_command(weights: Sequence[float], left: float) -> float:
    """Return the seconds that a command may take, by its weight and those of the commands after it.

    What one does not use goes to the others, so each may take more than its weight says, but what a start takes is left
    to all. Where time is short, the first commands to their end say more than the beginning of each.
    """
    wanted = 1.5 * left * weights[0] / sum(weights)
    return min(left, max(_LEAST_SECONDS, min(wanted, left - _RESERVED_SECONDS * (len(weights) - 1))))


def part_commands(options: argparse.Namespace, part: str) -> list[list[str]]:
    """Return the commands that measure a part: one, or for several processes those of each number of them."""
    command = [*own_command(options), "--part", part]
    if part != "processes":
        return [command]
    gpus = torch.cuda.device_count() if options.device == "cuda" else 1
    counts = options.processes or dict.fromkeys([1, max(gpus, 1)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    forms = [(count, divided) for count in counts for divided in ([], ["--divided"]) if count > 1 or not divided]
    return [[*launch, str(count), *command[1:], *divided] for count, divided in forms]


def describe_processes(command: Sequence[str]) -> str:
    """Return which of the commands for several processes this is, in words; nothing for another command."""
    if "--nproc-per-node" not in command:
        return ""
    count = command[command.index("--nproc-per-node") + 1]
    return f", {count}{', divided weights' if '--divided' in command else ''}"


def own_command(options: argparse.Namespace) -> list[str]:
    """Return the command that runs this script with the same sizes."""
    names = ("shape", "device", "dtype", "prompt", "completion", "candidates", "prompts_per_step", "folder")
    sizes = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, __file__, *sizes, *["--all-weights"] * options.all_weights]


def run_part(command: Sequence[str], seconds: float) -> Generator[Row, None, str | None]:
    """Run a command for at most so many seconds, yield its rows as they come; return why it did not end well."""
    late = threading.Event()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | own_devices(command)
        )

        def end() -> None:
            if process.poll() is None:
                late.set()
                end_with_children(process.pid)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            assert process.stdout is not None
            yield from (json.loads(line) for line in process.stdout if line.startswith('{"what"') and line[-1] == "\n")
            status = process.wait()
        finally:
            timer.cancel()
            end()  # where this script is interrupted
            process.wait()
        if late.is_set():
            return f"ended after {seconds:.0f} s, its share of --minutes"
        said.seek(0)
        return describe_end(status, said.read())


def own_devices(command: Sequence[str]) -> dict[str, str]:
    """Return the variable that shows a command its GPUs: to one process the first, none where it is to use none."""
    if "--device" in command and command[command.index("--device") + 1] == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {} if "--nproc-per-node" in command else {"CUDA_VISIBLE_DEVICES": first_gpu()}


def end_with_children(pid: int) -> None:
    """End a process and all that it has started, if it runs; torchrun's workers are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
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
    if status == _NO_MEMORY or "OutOfMemoryError" in said:  # torchrun ends with a status of its own
        return "out of memory"
    errors = [line for line in _ERROR_LINE.findall(said) if not line.startswith(_OF_OTHERS)]
    last = (errors or said.strip().splitlines() or ["no message"])[-1]
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
    draw = partial(bench.sampler, bench.policy, encoded, _SHORT.candidates, range(_GROUPS))
    seconds = median_seconds(draw, bench.device)
    yield {"what": f"{name}, sampling", "result": f"{seconds:.3g} s", "figures": {"seconds": seconds}}
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
    add_gradient(bench.policy, update, groups, 1.0 / len(groups))
    take_step(bench.policy, bench.optimizer)


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of some turns, after one to warm up."""
    work()
    seconds: list[float] = []
    while goes_on(seconds):
        seconds.append(time_call(work, device))
    return statistics.median(seconds)


def goes_on(seconds: Sequence[float]) -> bool:
    """Return whether there is another turn after those of so many seconds."""
    return len(seconds) < _TURNS and sum(seconds) < _TURN_SECONDS


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
    step_seconds = 0.0
    for phase, forms in phase_forms(bench).items():
        both = time_both(forms, bench.device)
        shared = statistics.median(both["shared"])
        result = f"out of memory / {shared:.3g} s"
        if both["plain"]:
            plain = statistics.median(both["plain"])
            result = f"{plain:.3g} / {shared:.3g} s = {format_ratio(both['plain'], both['shared'])}"
        if phase == "update":
            rate = update_rate(SHAPES[options.shape], bench.cell, shared, options.lora)
            result += f"; {rate / 1e12:.3g} TFLOP/s"
        step_seconds += shared
        yield {"what": f"{phase}, plain / shared", "result": result, "figures": both}
    what = "step, TRL / purld"
    try:
        seconds = steps_against_trl(bench, _TURNS if step_seconds < _TURN_SECONDS / _TURNS else 1)
    except Exception as error:  # any other version of TRL may raise anything
        why = f"left out, TRL does not run here: {type(error).__name__}: {str(error)[:200]}"
        yield {"what": what, "result": "out of memory" if is_out_of_memory(error) else why}
    else:
        theirs, ours = (statistics.median(seconds[side]) for side in ("trl", "purld"))
        result = f"{theirs:.3g} / {ours:.3g} s = {format_ratio(seconds['trl'], seconds['purld'])}"
        yield {"what": what, "result": result, "figures": seconds}


def time_both(forms: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of both forms of a phase, which take turns; none of the plain form if it does not fit."""
    forms["shared"]()  # warm-up, including the self-check
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    while goes_on(seconds["shared"]) and sum(seconds["plain"]) < _TURN_SECONDS:
        try:
            seconds["plain"].append(time_call(forms["plain"], device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            return {"plain": [], "shared": [time_call(forms["shared"], device)]}
        seconds["shared"].append(time_call(forms["shared"], device))
    return seconds


def measure_memory(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows on the update's peak memory: with the prompt shared, and in both forms."""
    cell = Cell(options.prompt, options.completion, options.candidates)
    shared = peak_of_update(SHAPES[options.shape], cell, "shared", options)
    yield {"what": "update's peak", "result": f"{shared / 2**30:.3g} GiB", "figures": {"shared": shared}}
    gc.collect()
    plain = peak_of_update(SHAPES[options.shape], cell, "plain", options)
    yield {
        "what": "update's peak, plain / shared",
        "result": f"{plain / 2**30:.3g} / {shared / 2**30:.3g} GiB = {plain / shared:.2f}",
        "figures": {"plain": plain, "shared": shared},
    }


# --- 5. several processes ------------------------------------------------------------------------------------


def measure_processes(options: argparse.Namespace) -> Iterator[Row]:
    """Take steps that the processes of a job share; in process 0 yield a row with the median seconds and the peak."""
    with ranks.together():
        job = Job(options)
        job.take_step(_WARM_UP_TOKENS)
        bytes_in_use(job.device)  # resets the peak
        turns: list[tuple[float, float]] = []
        while ranks.on_first(lambda: goes_on([seconds for seconds, _ in turns])):
            turns.append(job.take_step(options.completion))
        sizes = {"held_bytes": job.held_bytes()} | job.peak_bytes()
        sizes = {name: max(found[name] for found in ranks.gather_rows([sizes])) for name in sizes}
        if ranks.is_first():
            seconds, summing = (statistics.median(column) for column in zip(*turns, strict=True))
            divided = ", divided weights" if options.divided else ""
            told = "" if options.divided else f", of it {summing:.3g} s for the gradients"  # else in the backward pass
            yield {
                "what": f"step of {options.prompts_per_step} prompts, {ranks.count()} processes{divided}",
                "result": f"{seconds:.3g} s{told}; in each process {describe_sizes(sizes)}",
                "figures": {
                    "seconds": seconds,
                    "sum_seconds": summing,
                    "processes": ranks.count(),
                    "divided": options.divided,
                    **sizes,
                },
            }


def describe_sizes(sizes: dict[str, int]) -> str:
    """Return in words how many bytes a process holds between steps, and has at its peak where that is known."""
    words = {"held_bytes": "of weights and optimiser", "peak_bytes": "at its peak"}
    return ", ".join(f"{size / 2**30:.3g} GiB {words[name]}" for name, size in sizes.items())


class Job:
    """A student that the processes of a job train as a run does, each on its share of a step's prompts.

    Args:
        options: the sizes; `folder` is where the student's weights are written to for all processes.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._encoder = Encoder(make_tokenizer(SHAPES[options.shape].vocabulary), max_anchor_tokens=options.completion)
        path = options.folder / "student"
        ranks.on_first(lambda: write_student(options, self._encoder, path))
        lora, shard = (Lora(r=16) if options.lora else None), ("fsdp" if options.divided else None)
        self._roles = load_roles(Student(model=str(path), lora=lora, shard=shard), path)
        self._policy = self._roles.policy
        self._optimizer = make_optimizer(self._policy)
        self._update = GroupUpdate(
            self._roles, options.candidates, self._encoder.pad, torch.Tensor.backward, device_autocast
        )
        self._evaluator = SelfEvaluator(self._encoder, "expected", options.candidates + 1)
        rng = random.Random(1)
        self._prompt = Prompt.from_text(random_words(options.prompt, rng))
        self._encoded = self._encoder.encode_prompt(self._prompt)
        self._anchor = random_words(options.completion, rng)
        self.device = default_device()

    def take_step(self, tokens: int) -> tuple[float, float]:
        """Draw so many tokens, score and update on this process's prompts; return the seconds, and those of summing."""
        ranks.barrier()
        started, count = time.perf_counter(), self._options.prompts_per_step
        with device_autocast():
            groups = self._draw_and_score(range(count)[ranks.my_share(count)], tokens)
        add_gradient(self._policy, self._update, groups, 1.0 / count)
        read_clock(self.device)
        summing = time.perf_counter()
        ranks.sum_gradients(self._policy.parameters())
        read_clock(self.device)
        summed = time.perf_counter() - summing
        take_step(self._policy, self._optimizer)
        read_clock(self.device)
        ranks.barrier()
        return time.perf_counter() - started, summed

    def _draw_and_score(self, numbers: Sequence[int], tokens: int) -> list[UnmeasuredGroup]:
        sampler = GenerateSampler(self._encoder, Decoding(1.0, tokens))
        drawn = sampler(self._policy, [self._encoded] * len(numbers), self._options.candidates, numbers)
        groups = [UnmeasuredGroup(self._encoded, [c.ids for c in group]) for group in drawn]
        with self._roles.frozen() as model:
            for group in groups:
                texts = [self._encoder.decode_text(ids) for ids in group.ids]
                self._evaluator.score(model, self._prompt, self._anchor, texts)
        return groups

    def peak_bytes(self) -> dict[str, int]:
        """Return as `peak_bytes` the most bytes since the peak was reset; on a CPU those of another step.

        Nothing for divided weights on a CPU, where torch does not see what gloo's threads free.
        """
        if self.device.type == "cuda":
            return {"peak_bytes": peak_bytes(self.device)}
        if self._options.divided:
            return {}
        in_step = peak_allocated(lambda: self.take_step(self._options.completion))
        return {"peak_bytes": self.held_bytes() + in_step}

    def held_bytes(self) -> int:
        """Return the bytes of weights and of the optimiser's state in this process, between steps."""
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        parts = [ranks.local_part(values.detach()) for values in (*self._roles.weights(), *state)]
        return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def write_student(options: argparse.Namespace, encoder: Encoder, path: Path) -> None:
    """Write the student's random weights to a folder, unless an earlier command has."""
    if path.exists():
        return
    unfinished = path.with_name("unfinished")
    model = random_model(SHAPES[options.shape], encoder, default_device(), getattr(torch, options.dtype))
    model.save_pretrained(unfinished)
    unfinished.rename(path)
    del model
    release_memory()


# --- what they share -----------------------------------------------------------------------------------------


def make_bench(options: argparse.Namespace) -> Bench:
    """Make the model, the prompt and the candidates."""
    return Bench.for_text(SHAPES[options.shape], Cell(options.prompt, options.completion, options.candidates), options)


def make_update(bench: Bench, micro_batch: int) -> GroupUpdate:
    """Return the update of the trainer, on the bench's models."""
    return GroupUpdate(bench.roles, micro_batch, bench.encoder.pad, torch.Tensor.backward, contextlib.nullcontext)


def add_gradient(policy: CausalLM, update: GroupUpdate, groups: Sequence[UnmeasuredGroup], share: float) -> None:
    """Measure groups as the trainer does, and add their gradient."""
    members = update.members(policy, groups, keep_old=False)

    def objective(tokens: GroupTokens) -> GroupLoss:
        advantages = torch.linspace(-1.5, 1.5, len(tokens.mask), device=tokens.mask.device)
        gain = advantages.unsqueeze(1) * tokens.policy * tokens.mask
        return GroupLoss(-(gain.sum(dim=1) / tokens.mask.sum(dim=1)).mean(), {})

    update(policy, members, [objective] * len(members), share)


def take_step(policy: Any, optimizer: torch.optim.Optimizer) -> None:
    """Clip, update the weights, and clear the gradients."""
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "groups": measure_groups,
    "micro-batches": measure_micro_batches,
    "step": measure_step,
    "memory": measure_memory,
    "processes": measure_processes,
}
WEIGHTS = {"groups": 2.0, "micro-batches": 2.0, "step": 5.0, "memory": 2.0, "processes": 3.0}
"""How long a command of each part takes, as its share of --minutes."""


if __name__ == "__main__":
    main()

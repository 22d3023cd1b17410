"""Fill a table about the GPUs of this machine in ten minutes: time and memory of a step, and several processes.

    python benchmarks/gpu.py                                    1.5b, LoRA, bfloat16, on every GPU
    python benchmarks/gpu.py --shape 7b --completion 1024 --output gpu.json
    python benchmarks/gpu.py --device cpu --shape toy --dtype float32 --prompt 48 --completion 16   tries the script

Six parts:

1. 1, 2, 4 and 8 groups of short prompts in one pass (a student of 135 million weights);
2. the update of a group at micro-batches of 1, 2, 4, ...: what fits, and what it takes;
3. whole steps of `--prompts-per-step` different prompts as the trainer takes them: the phases, the step against that of
   TRL's GRPOTrainer if it is installed, both with their peak memory, and the phases with the prompt repeated;
4. the same for one prompt, which leaves most GPUs idle: the phases of a step against forms that repeat the prompt, and
   the step against TRL's;
5. the peak memory of the update of one prompt in both forms;
6. a step of several prompts, in one process and in one per GPU, which torchrun starts: as they are, and with the
   student's weights divided among them (`student.shard: fsdp`), with the seconds and the peak memory of a process.

Each part runs in a process of its own, so that one which fails or runs out of memory does not end the others. A row is
printed, and written to --output, as soon as it is measured. A part that takes more than its share of `--minutes` is
ended, and what it had measured stays. Starting a part takes 15 to 30 seconds: Python, the libraries and a model.

All compute in the precision of the trainer: under autocast on a GPU. Every form of a phase has a warm-up of its own.

Part 6 needs two GPUs of one machine or more for the divided weights; they talk over NCCL, and over gloo on a CPU, where
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
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from step import (
    LORA,
    SHAPES,
    WARM_UP_TOKENS,
    Bench,
    Cell,
    ComparedStep,
    Forms,
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
    warm_up_forms,
)

from purld import ranks
from purld.config.methods import AnchorGrpo
from purld.config.schema import Student
from purld.errors import PlainWarning
from purld.methods.losses import GroupLoss, GroupTokens
from purld.model.at_once import release_memory
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.likelihood import AnchoredRows, in_context_scores
from purld.model.load import Roles, default_device, load_roles
from purld.model.out_of_memory import is_out_of_memory
from purld.model.sample import Completion, Decoding, GenerateSampler
from purld.model.self_check import refuse_sharing
from purld.model.vision import EncodedPrompt
from purld.records import Prompt
from purld.training.align_trainer import stage_two_method
from purld.training.checkpoints import device_arguments, device_autocast
from purld.training.group_update import GroupUpdate, UnmeasuredGroup
from purld.training.memory import form_of_update
from purld.training.rollout import AnchoredPrompt, Rollout, RolloutMaker
from purld.training.scoring import ScorerContext, make_scorer

_NO_MEMORY = 3  # the exit status of a part that does not fit
_OUT_OF_MEMORY = "out of memory"  # what a row then says
_TURNS = 3  # of a measurement, fewer where they take long
_TURN_SECONDS = 10.0  # after so many no other turn is begun
_LEAST_SECONDS = 90.0  # a command is given, of which starting takes up to 30
_RESERVED_SECONDS = 45.0  # that a command leaves to each of those after it, where it could use more than the least
_ERROR_LINE = re.compile(r"(?m)^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .*)$")
_OF_OTHERS = ("torch.distributed.elastic", "purld.ranks.PeerError")  # what torchrun and the other processes say
_SHORT = Cell(prompt=100, completion=48, candidates=8)  # of the part on several groups; other prompts are shorter
_GROUPS = 8
_BETA = 0.04  # of the KL in steps of several prompts: the trainer measures p_sft whatever it is, so TRL's does as well
_PHASES = ("sample", "score", "update")

Row = dict[str, Any]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Step time and memory on this machine's GPUs.")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a candidate")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=8, help="in the parts on several prompts")
    parser.add_argument("--all-weights", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dtype", help="of the weights; by default that of a run: float32 of trained ones, else bfloat16"
    )
    parser.add_argument("--processes", type=int, nargs="+", help="how many, each; by default 1 and as many as GPUs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to measure")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--divided", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lora = not options.all_weights
    options.dtype = options.dtype or ("bfloat16" if options.lora else "float32")
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
        return _OUT_OF_MEMORY
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

    def draw() -> None:
        with device_autocast():
            bench.sampler(bench.policy, encoded, _SHORT.candidates, range(_GROUPS))

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
    with bench.roles.frozen() as model, device_autocast():
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


# --- 3. steps of several prompts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedSteps:
    """What steps took: the seconds of each phase, and on a GPU the most bytes beyond what is held between steps."""

    phases: dict[str, list[float]]
    peak_bytes: int | None

    @property
    def medians(self) -> dict[str, float]:
        """The median seconds of each phase."""
        return {phase: statistics.median(seconds) for phase, seconds in self.phases.items()}


class StudentStep:
    """A step of several different prompts, by the parts of the trainer and in the form that it chooses: GRPO with a KL.

    Args:
        encoder: the student's encoder.
        roles: the policy and p_sft.
        optimizer: the policy's.
        options: the sizes.

    Attributes:
        questions: the prompts, of 9/10 to 11/10 of `--prompt` tokens, with their anchors.
        update: measures and updates groups; by default in the trainer's micro-batches.
    """

    def __init__(
        self, encoder: Encoder, roles: Roles, optimizer: torch.optim.Optimizer, options: argparse.Namespace
    ) -> None:
        self._roles, self._optimizer, self._tokens = roles, optimizer, options.completion
        self.device = next(roles.policy.parameters()).device
        self.questions = make_questions(encoder, options)
        settings = AnchorGrpo(
            method="anchor_grpo",
            score="expected",
            candidates=options.candidates,
            max_new_tokens=options.completion,
            prompts_per_step=len(self.questions),
            beta=_BETA,
        )
        student = Student(model="", lora=LORA if options.lora else None, max_anchor_tokens=options.completion)
        form = form_of_update(settings, student, roles, self.questions, half=device_arguments()["bf16"])
        self.update = GroupUpdate(
            roles, form.micro_batch, encoder.pad, torch.Tensor.backward, device_autocast, recompute=form.recompute
        )
        method = stage_two_method(settings)
        self._score = make_scorer(method, ScorerContext(encoder, roles, settings, True, device_autocast))
        self._make = partial(RolloutMaker, method, settings, encoder)
        self._loss = lambda signal, tokens: method.loss(tokens, signal, settings)
        self._samplers = {n: GenerateSampler(encoder, Decoding(1.0, n)) for n in (WARM_UP_TOKENS, options.completion)}

    def warm_up(self) -> None:
        """Take a step of full size of which only the first tokens are drawn, in passes that fit."""
        while True:
            try:
                self.take(drawn=WARM_UP_TOKENS)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.update.micro_batch_size == 1:
                    raise
            self._optimizer.zero_grad()
            release_memory()
            self.update = replace(self.update, micro_batch_size=self.update.micro_batch_size // 2)

    def take(self, drawn: int | None = None) -> dict[str, float]:
        """Take a step and return the seconds of its phases; `drawn` as in `add_gradient`."""
        seconds = self.add_gradient(self.questions, drawn)
        seconds["update"] += time_call(partial(take_step, self._roles.policy, self._optimizer), self.device)
        return seconds

    def add_gradient(self, questions: Sequence[AnchoredPrompt], drawn: int | None = None) -> dict[str, float]:
        """Draw, score and measure groups, and add their gradient; return the seconds of each phase.

        What the trainer does besides drawing and scoring, such as p_sft's log-probs, is part of the update.

        Args:
            questions: those of the step's prompts that this process takes.
            drawn: how many tokens are drawn; repeated, they are as long as the options say. None: all are.
        """
        seconds = dict.fromkeys(_PHASES, 0.0)

        def timed(phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                started = read_clock(self.device)
                found = work(*arguments)
                seconds[phase] = read_clock(self.device) - started
                return found

            return run

        sampler = timed("sample", partial(self._draw, drawn or self._tokens))
        make = self._make(sampler=sampler, scorer=timed("score", self._score), update=self.update)
        started = read_clock(self.device)
        with device_autocast():
            rollouts = make(self._roles.policy, questions, 0)
        self._add_gradient([rollout for rollout in rollouts if rollout.usable])
        whole = read_clock(self.device) - started
        seconds["update"] = whole - seconds["sample"] - seconds["score"]
        return seconds

    def _draw(
        self, tokens: int, model: CausalLM, prompts: Sequence[EncodedPrompt], count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        drawn = self._samplers[tokens](model, prompts, count, seeds)
        if tokens == self._tokens:
            return drawn
        return [[Completion((c.ids * self._tokens)[: self._tokens], False) for c in group] for group in drawn]

    def _add_gradient(self, rollouts: Sequence[Rollout]) -> None:
        members = [rollout.members for rollout in rollouts if rollout.members is not None]
        objectives = [partial(self._loss, rollout.signal) for rollout in rollouts]
        self.update(self._roles.policy, members, objectives, 1.0 / len(self.questions))


def make_questions(encoder: Encoder, options: argparse.Namespace) -> list[AnchoredPrompt]:
    """Make the different prompts of a step, of about as many tokens as the options say, with their anchors."""
    rng = random.Random(3)
    template = len(encoder.encode_prompt(Prompt.from_text("")))
    questions = []
    for _ in range(options.prompts_per_step):
        tokens = max(1, rng.randint(options.prompt * 9 // 10, options.prompt * 11 // 10) - template)
        prompt, anchor = Prompt.from_text(random_words(tokens, rng)), random_words(options.completion, rng)
        questions.append(AnchoredPrompt(prompt, anchor, encoder.encode_prompt(prompt)))
    return questions


def measure_prompts(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows on steps of several prompts: ours by phase, against TRL's, and with the prompt repeated."""
    bench = make_bench(options)
    step = StudentStep(bench.encoder, bench.roles, bench.optimizer, options)
    what = f"step of {options.prompts_per_step} prompts"
    shared = time_steps(step)
    yield {
        "what": what,
        "result": f"{describe_phases(shared.medians)}; {describe_form(step, shared)}",
        "figures": figures_of(step, shared),
    }
    seconds = sum(shared.medians.values())
    yield compare_with_trl(bench, step, f"{what}, TRL / purld", _TURNS if seconds < _TURN_SECONDS / _TURNS else 1)
    release_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainWarning)
        for model in (bench.policy, bench.frozen):
            refuse_sharing(model, "this is for comparison")
    plain = time_steps(step)
    repeated = sum(plain.medians.values())
    each = ", ".join(f"{p} {plain.medians[p]:.3g} / {shared.medians[p]:.3g}" for p in _PHASES)
    together = f"{repeated:.3g} / {seconds:.3g} s = {repeated / seconds:.2f}"
    yield {
        "what": f"{what}, prompt repeated / shared",
        "result": f"{each}, together {together}; {describe_form(step, plain)}",
        "figures": figures_of(step, plain),
    }


def time_steps(step: StudentStep) -> TimedSteps:
    """Take some steps, after one to warm up."""
    step.warm_up()
    held, turns = bytes_in_use(step.device), list[dict[str, float]]()
    while goes_on([sum(turn.values()) for turn in turns]):
        turns.append(step.take())
    peak = peak_bytes(step.device) - held if step.device.type == "cuda" else None
    return TimedSteps({phase: [turn[phase] for turn in turns] for phase in _PHASES}, peak)


def figures_of(step: StudentStep, timed: TimedSteps) -> dict[str, Any]:
    """Return the figures of a row."""
    form = {"micro_batch": step.update.micro_batch_size, "recompute": step.update.recompute}
    return {**timed.phases, **form, **({} if timed.peak_bytes is None else {"peak_bytes": timed.peak_bytes})}


def describe_phases(seconds: dict[str, float]) -> str:
    """Return in words what the phases take, and all of them."""
    listed = ", ".join(f"{phase} {seconds[phase]:.3g}" for phase in _PHASES)
    return f"{listed}, together {sum(seconds.values()):.3g} s"


def describe_form(step: StudentStep, timed: TimedSteps) -> str:
    """Return in words the form of a step's update, and the memory of the step."""
    again = ", layers computed again" if step.update.recompute else ""
    peak = "" if timed.peak_bytes is None else f", at its peak {timed.peak_bytes / 2**30:.3g} GiB beyond what it holds"
    return f"micro-batch {step.update.micro_batch_size}{again}{peak}"


def compare_with_trl(bench: Bench, step: StudentStep, what: str, repeats: int) -> Row:
    """Return the row on whole steps of TRL's, in the largest batches that fit, and ours, or on why there is none."""
    rows: int | None = len(step.questions) * bench.cell.candidates
    found: Row = {}
    while rows is not None:
        found = try_trl(bench, ComparedStep(step.questions, step.take, rows, _BETA), what, repeats)
        if found["result"] != _OUT_OF_MEMORY:
            return describe_trl(found, rows)
        release_memory()
        rows = next((size for size in range(rows // 2, 0, -1) if rows % size == 0), None)
    return found


def describe_trl(row: Row, batch: int) -> Row:
    """Return a row with TRL's batch, and the peaks of both sides where they were read."""
    if "figures" not in row:
        return row
    figures, told = row["figures"] | {"trl_batch": batch}, f"; TRL's batch {batch}"
    if "trl_peak_bytes" in figures:
        theirs, ours = (statistics.median(figures[f"{side}_peak_bytes"]) / 2**30 for side in ("trl", "purld"))
        told += f"; at the peak {theirs:.3g} / {ours:.3g} GiB beyond what each holds"
    return row | {"result": row["result"] + told, "figures": figures}


def try_trl(bench: Bench, step: ComparedStep, what: str, repeats: int) -> Row:
    """Return a row on whole steps of TRL's and ours, or on why there is none."""
    try:
        seconds = steps_against_trl(bench, step, repeats)
    except Exception as error:  # any other version of TRL may raise anything
        why = f"left out, TRL does not run here: {type(error).__name__}: {str(error)[:200]}"
        return {"what": what, "result": _OUT_OF_MEMORY if is_out_of_memory(error) else why}
    theirs, ours = (statistics.median(seconds[side]) for side in ("trl", "purld"))
    result = f"{theirs:.3g} / {ours:.3g} s = {format_ratio(seconds['trl'], seconds['purld'])}"
    return {"what": what, "result": result, "figures": seconds}


# --- 4. and 5. one prompt: against plain forms and TRL ---------------------------------------------------------


def measure_step(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per phase, and one on whole steps of TRL's and ours, or on why there are none."""
    bench = make_bench(options)
    step_seconds = 0.0
    every, warm_up = phase_forms(bench), warm_up_forms(bench)
    for phase in ("score", "update", "sample"):  # what takes longest comes last
        both = time_both(every[phase], warm_up[phase], bench.device)
        shared = statistics.median(both["shared"])
        result = f"{_OUT_OF_MEMORY} / {shared:.3g} s"
        if both["plain"]:
            plain = statistics.median(both["plain"])
            result = f"{plain:.3g} / {shared:.3g} s = {format_ratio(both['plain'], both['shared'])}"
        if phase == "update":
            rate = update_rate(SHAPES[options.shape], bench.cell, shared, options.lora)
            result += f"; {rate / 1e12:.3g} TFLOP/s"
        step_seconds += shared
        yield {"what": f"{phase}, plain / shared", "result": result, "figures": both}
    repeats = _TURNS if step_seconds < _TURN_SECONDS / _TURNS else 1
    yield try_trl(bench, ComparedStep.of_one_prompt(bench), "step, TRL / purld", repeats)


def time_both(forms: Forms, warm_up: Forms, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of both forms of a phase, which take turns; none of the plain form if it does not fit.

    Args:
        forms: the work that is timed.
        warm_up: what each form does before its first turn.
        device: where they work.
    """
    warm_up["shared"]()
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    try:
        warm_up["plain"]()
        while goes_on(seconds["shared"]) and sum(seconds["plain"]) < _TURN_SECONDS:
            for form in ("plain", "shared"):
                seconds[form].append(time_call(forms[form], device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        seconds = {"plain": [], "shared": []}
    if not seconds["plain"]:
        release_memory()
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


# --- 6. several processes ------------------------------------------------------------------------------------


def measure_processes(options: argparse.Namespace) -> Iterator[Row]:
    """Take steps that the processes of a job share; in process 0 yield a row with the median seconds and the peak."""
    with ranks.together():
        job = Job(options)
        job.take_step(WARM_UP_TOKENS)
        bytes_in_use(job.device)  # resets the peak
        turns: list[tuple[float, float]] = []
        while ranks.on_first(lambda: goes_on([seconds for seconds, _ in turns])):
            turns.append(job.take_step())
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
        encoder = Encoder(make_tokenizer(SHAPES[options.shape].vocabulary), max_anchor_tokens=options.completion)
        path = options.folder / "student"
        ranks.on_first(lambda: write_student(options, encoder, path))
        lora, shard = (LORA if options.lora else None), ("fsdp" if options.divided else None)
        self._roles = load_roles(Student(model=str(path), lora=lora, shard=shard), path)
        self._policy = self._roles.policy
        self._optimizer = make_optimizer(self._policy)
        self._step = StudentStep(encoder, self._roles, self._optimizer, options)
        self.device = default_device()

    def take_step(self, drawn: int | None = None) -> tuple[float, float]:
        """Draw, score and update on this process's prompts; return the seconds, and those of summing.

        Args:
            drawn: see `StudentStep.add_gradient`.
        """
        ranks.barrier()
        started = time.perf_counter()
        questions = self._step.questions
        self._step.add_gradient(questions[ranks.my_share(len(questions))], drawn)
        summing = time.perf_counter()
        ranks.sum_gradients(self._policy.parameters())
        read_clock(self.device)
        summed = time.perf_counter() - summing
        take_step(self._policy, self._optimizer)
        read_clock(self.device)
        ranks.barrier()
        return time.perf_counter() - started, summed

    def peak_bytes(self) -> dict[str, int]:
        """Return as `peak_bytes` the most bytes since the peak was reset; on a CPU those of another step.

        Nothing for divided weights on a CPU, where torch does not see what gloo's threads free.
        """
        if self.device.type == "cuda":
            return {"peak_bytes": peak_bytes(self.device)}
        if self._options.divided:
            return {}
        in_step = peak_allocated(self.take_step)
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
    return GroupUpdate(bench.roles, micro_batch, bench.encoder.pad, torch.Tensor.backward, device_autocast)


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
    "prompts": measure_prompts,
    "step": measure_step,
    "memory": measure_memory,
    "processes": measure_processes,
}
WEIGHTS = {"groups": 2.0, "micro-batches": 2.0, "prompts": 5.0, "step": 5.0, "memory": 2.0, "processes": 3.0}
"""How long a command of each part takes, as its share of --minutes."""


if __name__ == "__main__":
    main()

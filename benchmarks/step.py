"""Time one GRPO-like Stage II step and its phases against TRL and against repeating the prompt K times.

    python benchmarks/step.py --quick            a slice of two minutes
    python benchmarks/step.py --output step.json the whole grid
    python benchmarks/step.py --model DIR        the shape of a model directory, with random weights
    python benchmarks/step.py --parts phases     without TRL, whose step needs 12 GiB for 0.1 billion weights
    python benchmarks/step.py --device cuda --dtype bfloat16 --shape 1.5b --lora

The model has random weights and the prompts are random words; the timings do not depend on them. TRL's GRPOTrainer and
purld get the same model, prompts, number and length of candidates, loss and optimizer. TRL's reward function scores the
K candidates and the anchor with a frozen copy as a competent user would write it: one padded batch of full texts, no
gradients, logits at the closing positions only. TRL computes logits for completions only, as it does on a GPU. Both
sides take turns in one process, after a warm-up of each that includes the self-check of prefix sharing, and compute in
the precision of purld's trainer: under autocast on a GPU. An adapter is purld's default one. Ratios are of medians.
Memory is what the update takes beyond weights, gradients and optimizer state, as torch allocates it, each form in a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from purld.config.schema import Lora, Student
from purld.model.encode import Encoder, pad_left
from purld.model.load import Roles, make_trainable
from purld.model.log_probs import RowGroup, make_prefixes, micro_batches
from purld.model.memory import DecoderShape
from purld.model.prefix import FullSequences, Prefixes
from purld.model.sample import Decoding, GenerateSampler
from purld.model.self_evaluation import SelfEvaluator
from purld.model.vision import EncodedPrompt, pixel_inputs
from purld.records import Prompt
from purld.training.checkpoints import device_arguments, device_autocast
from purld.training.rollout import AnchoredPrompt

_SPECIAL = ["[PAD]", "[UNK]", "<|turn|>", "<|end|>"]
_CHAT = "{% for m in messages %}<|turn|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}<|turn|> assistant "
_MICRO_BATCH = 8  # sequences per backward pass, on every side
WARM_UP_TOKENS = 8
LORA = Lora(r=16)


@dataclass(frozen=True)
class Shape:
    """The size of a decoder; `kv` heads of 64 serve `hidden` / 64 query heads."""

    hidden: int
    layers: int
    intermediate: int
    kv: int
    vocabulary: int
    config: Any = None  # that of a model directory, whose shape this is

    @classmethod
    def of_model(cls, folder: Path) -> Shape:
        """Return the shape of a model directory; its weights are not read."""
        config = AutoConfig.from_pretrained(folder).get_text_config()
        kv = DecoderShape.of(config).keys // 64
        return cls(
            config.hidden_size, config.num_hidden_layers, config.intermediate_size, kv, config.vocab_size, config
        )

    @property
    def body(self) -> int:
        """The number of weights that every token passes through, without the LM head."""
        return self.layers * self.hidden * (2 * self.hidden + 128 * self.kv + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """The number of weights of the LM head."""
        return self.hidden * self.vocabulary


SHAPES = {
    "toy": Shape(64, 2, 128, 1, 2_000),
    "small": Shape(512, 12, 1408, 2, 32_000),
    "quick": Shape(256, 4, 704, 1, 32_000),
    "135m": Shape(576, 30, 1536, 3, 49_152),
    "0.5b": Shape(896, 24, 4864, 2, 151_936),
    "1.5b": Shape(1536, 28, 8960, 2, 151_936),
    "3b": Shape(2048, 36, 11008, 2, 151_936),
    "7b": Shape(3584, 28, 18944, 4, 152_064),
}


@dataclass(frozen=True)
class Cell:
    """One point of the grid, in tokens and candidates."""

    prompt: int
    completion: int
    candidates: int


class Bench:
    """Everything that one cell's timings need.

    Args:
        encoder: the model's encoder.
        base: the model that every role starts from.
        prompt: the prompt that the candidates answer.
        cell: the sizes.
        lora: whether an adapter is trained instead of all weights.
    """

    def __init__(self, encoder: Encoder, base: Any, prompt: Prompt, cell: Cell, lora: bool) -> None:
        self.cell = cell
        self.device = next(base.parameters()).device
        self.encoder = encoder
        self.base = base
        self.frozen = copy.deepcopy(base).requires_grad_(False)
        self.lora = lora
        self.policy = self.trainable()
        self.roles = Roles(self.policy, None if lora else self.frozen)
        self.optimizer = make_optimizer(self.policy)
        self.sampler = GenerateSampler(encoder, Decoding(1.0, cell.completion))
        self.evaluator = SelfEvaluator(encoder, "expected", cell.candidates + 1)
        rng = random.Random(0)
        self.anchor = random_words(cell.completion, rng)
        self.prompt = prompt
        self.encoded_prompt = encoder.encode_prompt(prompt)
        self.question = AnchoredPrompt(prompt, self.anchor, self.encoded_prompt)
        self.completions = [encoder.encode_literal(random_words(cell.completion, rng)) for _ in range(cell.candidates)]
        self.texts = [encoder.decode_text(c) for c in self.completions]

    @classmethod
    def for_text(cls, shape: Shape, cell: Cell, options: argparse.Namespace) -> Bench:
        """Create a Llama of a shape and a prompt with the cell's number of tokens."""
        encoder = Encoder(make_tokenizer(shape.vocabulary), max_anchor_tokens=cell.completion)
        base = random_model(shape, encoder, torch.device(options.device), getattr(torch, options.dtype))
        # The chat template adds a few tokens.
        question = random_words(cell.prompt - len(encoder.encode_prompt(Prompt.from_text(""))), random.Random(1))
        return cls(encoder, base, Prompt.from_text(question), cell, options.lora)

    def trainable(self) -> Any:
        """Return a model to train that starts from the base weights."""
        model = copy.deepcopy(self.base)
        return make_trainable(Student(model="", lora=LORA), model) if self.lora else model

    def sample_shared(self, tokens: int | None = None) -> list[list[int]]:
        """Sample K candidates, prefilling the prompt once; of so many tokens, if not as long as the cell says."""
        sampler = self.sampler if tokens is None else GenerateSampler(self.encoder, Decoding(1.0, tokens))
        with device_autocast():
            (group,) = sampler(self.policy, [self.encoded_prompt], self.cell.candidates, seeds=[0])
        return [c.ids for c in group]

    @torch.no_grad()
    def sample_plain(self, tokens: int | None = None) -> None:
        """Sample K candidates, prefilling the prompt K times; see `sample_shared`."""
        ids, mask = pad_left([self.encoded_prompt.ids], self.encoder.pad, self.device)
        with device_autocast():
            self.policy.generate(
                input_ids=ids,
                attention_mask=mask,
                **pixel_inputs([self.encoded_prompt], ids),
                num_return_sequences=self.cell.candidates,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens or self.cell.completion,
            )

    def score_shared(self, texts: Sequence[str]) -> list[float | None]:
        """Score the candidates, computing instruction, prompt and anchor once."""
        with self.roles.frozen() as evaluator, device_autocast():
            return self.evaluator.score(evaluator, self.prompt, self.anchor, texts).candidates

    def score_plain(self, texts: Sequence[str]) -> list[float]:
        """Compute the same scores from full texts, as a reward function would."""
        (scores,) = self.score_full_texts([self.question], [texts])
        return scores

    @torch.no_grad()
    def score_full_texts(
        self, questions: Sequence[AnchoredPrompt], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Score several prompts' candidates, and each anchor against itself, in one padded batch of full texts.

        Args:
            questions: the prompts with their anchors.
            texts: each prompt's candidates.
        """
        rows: list[list[int]] = []
        prefixes: list[EncodedPrompt] = []
        opening = self.encoder.encode_literal("0.")
        for question, own in zip(questions, texts, strict=True):
            frame = self.encoder.evaluation_frame(question.prompt, question.anchor)
            ends = [self.encoder.encode_literal(text) + frame.suffix + opening for text in (question.anchor, *own)]
            rows += [frame.prefix.ids + end for end in ends]
            prefixes += [frame.prefix] * len(ends)
        ids, mask = pad_left(rows, self.encoder.pad, self.device)
        extra_inputs = pixel_inputs(prefixes, ids)
        with device_autocast():
            logits = self.frozen(input_ids=ids, attention_mask=mask, logits_to_keep=3, **extra_inputs).logits.float()
        scores = iter(self._expected_scores(logits))
        return [[next(scores) for _ in ("", *own)][1:] for own in texts]

    def _expected_scores(self, logits: Tensor) -> list[float]:
        """Return the scores that (B, 3, V) logits at the closing positions mean."""
        zero, one = self.encoder.encode_literal("0")[0], self.encoder.encode_literal("1")[0]
        digits = torch.tensor([self.encoder.encode_literal(str(d))[0] for d in range(10)], device=self.device)
        leading = logits[:, 0, [zero, one]].softmax(dim=-1)
        fraction = logits[:, 2, digits].softmax(dim=-1) @ (torch.arange(10.0, device=self.device) / 10)
        scores: list[float] = (leading[:, 1] + leading[:, 0] * fraction).tolist()
        return scores

    def update(self, prefix: Prefixes, completions: Sequence[Sequence[int]], advantages: Tensor) -> None:
        """Take one optimizer step of GRPO's clipped loss, per-sequence means, no KL term."""
        for rows in micro_batches(len(completions), _MICRO_BATCH):
            with device_autocast():
                log_probs, mask = prefix.token_log_probs(completions[rows])
            ratio = (log_probs - log_probs.detach()).exp()
            gain = advantages[rows].unsqueeze(1)
            clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            (-((clipped * mask).sum(dim=1) / mask.sum(dim=1)).sum() / len(completions)).backward()
        prefix.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_shared(self) -> None:
        """Update with a shared prefix."""
        self.update(self.shared_prefix(self.completions), self.completions, self.advantages())

    def update_plain(self) -> None:
        """Update on full sequences."""
        plain = FullSequences(self.policy, [self.encoded_prompt], self.encoder.pad)
        self.update(plain, self.completions, self.advantages())

    def step(self) -> None:
        """Sample, score, update."""
        completions = self.sample_shared()
        scores = self.score_shared([self.encoder.decode_text(c) for c in completions])
        rewards = torch.tensor([s or 0.0 for s in scores], device=self.device)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        self.update(self.shared_prefix(completions), completions, advantages)

    def shared_prefix(self, completions: Sequence[Sequence[int]]) -> Prefixes:
        """Return the prefix that all candidates of a group share."""
        with device_autocast():
            return make_prefixes(self.policy, [RowGroup(self.encoded_prompt, completions)], self.encoder.pad, cut=True)

    def advantages(self) -> Tensor:
        """Return fixed advantages of both signs."""
        return torch.linspace(-1.5, 1.5, self.cell.candidates, device=self.device)


def random_words(count: int, rng: random.Random) -> str:
    """Return random text of `count` tokens."""
    return " ".join(f"w{rng.randrange(1000)}" for _ in range(count))


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per word, so that texts have exact lengths."""
    tokens = [*_SPECIAL, *map(str, range(10)), ".", "user", "assistant", *(f"w{i}" for i in range(1000))]
    tokens += [f"x{i}" for i in range(vocabulary - len(tokens))]
    word_level = Tokenizer(models.WordLevel({w: i for i, w in enumerate(tokens)}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="[PAD]", unk_token="[UNK]", eos_token="<|end|>", chat_template=_CHAT
    )


def random_model(shape: Shape, encoder: Encoder, device: torch.device, dtype: torch.dtype) -> Any:
    """Create a model of this shape with random weights: a Llama, or what the shape's configuration says."""
    torch.manual_seed(0)
    special = {"pad_token_id": encoder.pad, "eos_token_id": encoder.end, "bos_token_id": None}
    if shape.config is not None:
        config = copy.deepcopy(shape.config)
        config.update(special)
        with device:
            return AutoModelForCausalLM.from_config(config).to(dtype).eval()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.kv,
        head_dim=64,
        max_position_embeddings=8192,
        **special,
    )
    with device:
        model: Any = LlamaForCausalLM(config)
        return model.to(dtype).eval()


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """Create the optimizer that TRL's trainer uses by default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)


def read_clock(device: torch.device) -> float:
    """Return seconds: the process's own CPU time on a CPU, wall time on a GPU.

    CPU time is not stretched by other processes on the machine.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def time_call(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes."""
    start = read_clock(device)
    work()
    return read_clock(device) - start


Forms = dict[str, Callable[[], Any]]
"""The work of a phase, `plain` and `shared`."""


def phase_forms(bench: Bench, tokens: int | None = None) -> dict[str, Forms]:
    """Return the work of each phase in both forms; so many tokens are sampled, if not as many as the cell says."""
    return {
        "sample": {"plain": partial(bench.sample_plain, tokens), "shared": partial(bench.sample_shared, tokens)},
        "score": {
            "plain": lambda: bench.score_plain(bench.texts),
            "shared": lambda: bench.score_shared(bench.texts),
        },
        "update": {"plain": bench.update_plain, "shared": bench.update_shared},
    }


def warm_up_forms(bench: Bench) -> dict[str, Forms]:
    """Return what each form of a phase does before it is timed, the self-check included: all but its later tokens."""
    return phase_forms(bench, WARM_UP_TOKENS)


def time_phases(bench: Bench, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each phase in both forms, which take turns."""
    forms = phase_forms(bench)
    for both in warm_up_forms(bench).values():
        for work in both.values():
            work()
    seconds: dict[str, dict[str, list[float]]] = {p: {"plain": [], "shared": []} for p in forms}
    for _ in range(repeats):
        for phase, both in forms.items():
            for form, work in both.items():
                seconds[phase][form].append(time_call(work, bench.device))
    return seconds


@dataclass(frozen=True)
class ComparedStep:
    """A step that TRL's trainer and ours take in turn.

    Attributes:
        questions: its prompts with their anchors.
        ours: takes our step.
        micro_batch: TRL's sequences per pass: in a backward pass exactly, in scoring about as many.
        beta: the weight of the KL to the frozen model in TRL's loss; 0 leaves that model's pass out.
    """

    questions: Sequence[AnchoredPrompt]
    ours: Callable[[], Any]
    micro_batch: int
    beta: float = 0.0

    @classmethod
    def of_one_prompt(cls, bench: Bench) -> ComparedStep:
        """Return the bench's own step."""
        sizes = [size for size in range(1, _MICRO_BATCH + 1) if bench.cell.candidates % size == 0]
        return cls([bench.question], bench.step, max(sizes))


def steps_against_trl(bench: Bench, step: ComparedStep, repeats: int) -> dict[str, list[float]]:
    """Return what whole steps of TRL's and ours take in turn, and the mean candidate length on TRL's side.

    Returns:
        `trl` and `purld` (seconds), `trl_completion_tokens`; on a GPU also `trl_peak_bytes` and `purld_peak_bytes`,
        beyond what is held between steps.

    Raises:
        ImportError: TRL is not installed.
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    turns, lengths = _TurnTaking(bench.device, step.ours), list[int]()

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
        if [p[0]["content"] for p in prompts[:: bench.cell.candidates]] != [q.prompt.question for q in step.questions]:
            raise ValueError("TRL scores the candidates in another order")
        texts = [c[0]["content"] for c in completions]
        lengths.extend(len(bench.encoder.encode_literal(t)) for t in texts)
        return list[float | None](score_for_trl(bench, step, texts))

    rows = [{"prompt": [{"role": "user", "content": q.prompt.question}]} for q in step.questions] * (repeats + 1)
    with tempfile.TemporaryDirectory() as folder, _reference_of(bench, step):
        trainer = GRPOTrainer(
            model=bench.trainable(),
            reward_funcs=reward,
            processing_class=bench.encoder.tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[turns],
            args=trl_settings(folder, bench, step, repeats + 1),
        )
        # Without Triton, TRL sends the prompt's positions through the LM head too, for compilers not used here.
        on_cpu = bench.device.type == "cpu"
        with mock.patch("trl.trainer.utils._use_triton", lambda _: True) if on_cpu else contextlib.nullcontext():
            trainer.train()
    return turns.figures | {"trl_completion_tokens": [statistics.mean(lengths)]}


class _TurnTaking(TrainerCallback):
    """Measures TRL's step, then takes and measures ours; the first of each is the warm-up."""

    def __init__(self, device: torch.device, ours: Callable[[], Any]) -> None:
        self._device = device
        self._ours = ours
        self.figures: dict[str, list[float]] = {"trl": [], "purld": []}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop it, and take our turn."""
        self._end("trl", state.global_step > 1)
        self._begin()
        self._ours()
        self._end("purld", state.global_step > 1)

    def _begin(self) -> None:
        if self._device.type == "cuda":
            self._held = bytes_in_use(self._device)
        self._start = read_clock(self._device)

    def _end(self, side: str, counts: bool) -> None:
        seconds = read_clock(self._device) - self._start
        if not counts:
            return
        self.figures[side].append(seconds)
        if self._device.type == "cuda":
            self.figures.setdefault(f"{side}_peak_bytes", []).append(peak_bytes(self._device) - self._held)


def score_for_trl(bench: Bench, step: ComparedStep, texts: Sequence[str]) -> list[float]:
    """Score a step's candidates, K of each prompt after those of the one before, in as large batches as fit."""
    count, together = bench.cell.candidates, max(1, step.micro_batch // bench.cell.candidates)
    groups = [texts[start : start + count] for start in range(0, len(texts), count)]
    scores: list[float] = []
    for part in micro_batches(len(groups), together):
        for own in bench.score_full_texts(step.questions[part], groups[part]):
            scores += own
    return scores


def _reference_of(bench: Bench, step: ComparedStep) -> contextlib.AbstractContextManager[Any]:
    """Let TRL take a copy of the frozen model where it would load one; with an adapter it needs none."""
    if bench.lora or not step.beta:
        return contextlib.nullcontext()
    load = "trl.trainer.grpo_trainer.create_model_from_path"
    return mock.patch(load, lambda *_, **__: copy.deepcopy(bench.frozen))


def trl_settings(folder: str, bench: Bench, step: ComparedStep, steps: int) -> Any:
    """Return the GRPOConfig with which GRPOTrainer takes the step."""
    from trl import GRPOConfig

    cell, on_cpu = bench.cell, bench.device.type == "cpu"
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=step.micro_batch,
        gradient_accumulation_steps=len(step.questions) * cell.candidates // step.micro_batch,
        num_generations=cell.candidates,
        max_completion_length=cell.completion,
        temperature=1.0,
        beta=step.beta,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=not on_cpu and device_arguments()["bf16"],
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        log_level="error",
    )


def peak_of_update(shape: Shape, cell: Cell, form: str, options: argparse.Namespace) -> int:
    """Return the bytes that one update takes at its peak beyond what the model and its optimizer hold anyway."""
    bench = Bench.for_text(shape, cell, options)
    few_completions = [c[:4] for c in bench.completions[:2]]
    prefix_prompt = EncodedPrompt(bench.encoded_prompt.ids[:16])
    with mock.patch.object(bench.optimizer, "zero_grad"):  # gradients stay in memory, so they count as held
        bench.update(
            make_prefixes(bench.policy, [RowGroup(prefix_prompt, few_completions)], bench.encoder.pad, cut=True),
            few_completions,
            bench.advantages()[:2],
        )
        update = {"plain": bench.update_plain, "shared": bench.update_shared}[form]
        if bench.device.type == "cpu":
            return peak_allocated(update)
        before = bytes_in_use(bench.device)
        update()
        return peak_bytes(bench.device) - before


def peak_allocated(work: Callable[[], Any]) -> int:
    """Return the most bytes that torch holds on the CPU at once of those that `work` allocates.

    The memory of the process says less: what was freed before is in it or not, as fragments allow.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)


def bytes_in_use(device: torch.device) -> int:
    """Return the bytes in use, and reset the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, on Linux
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes in use since `bytes_in_use`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_peaks(cell: Cell, options: argparse.Namespace) -> dict[str, int]:
    """Run `peak_of_update` for both forms, each in a fresh process."""
    peaks = {}
    model = getattr(options, "model", None)
    for form in ("plain", "shared"):
        command = [sys.executable, __file__, "--peak", form, "--shape", options.shape, "--device", options.device]
        command += [] if model is None else ["--model", str(model)]
        command += ["--dtype", options.dtype, "--completion", str(cell.completion), *["--lora"] * options.lora]
        command += ["--prompts", str(cell.prompt), "--candidates", str(cell.candidates)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[form] = int(result.stdout.split()[-1])
    return peaks


def update_rate(shape: Shape, cell: Cell, seconds: float, lora: bool) -> float:
    """Return the FLOP/s of the shared update's matrix products, without those of attention."""
    completion_tokens = cell.candidates * cell.completion
    passes = 4 if lora else 6  # frozen weights need no gradient
    body = passes * shape.body * (cell.prompt + completion_tokens)
    head = (passes + 2) * shape.head * completion_tokens  # logits are computed twice
    return (body + head) / seconds


def measure_cell(shape: Shape, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts of a cell that `options` name; the others are None."""
    row: dict[str, Any] = {"prompt": cell.prompt, "completion": cell.completion, "candidates": cell.candidates}
    row |= dict.fromkeys(PARTS)
    if "phases" in options.parts:
        row["phases"] = time_phases(Bench.for_text(shape, cell, options), options.repeats)
        shared = statistics.median(row["phases"]["update"]["shared"])
        row["update_flops_per_second"] = update_rate(shape, cell, shared, options.lora)
        row["update_completion_tokens_per_second"] = cell.candidates * cell.completion / shared
    if "step" in options.parts:
        bench = Bench.for_text(shape, cell, options)
        row["step"] = steps_against_trl(bench, ComparedStep.of_one_prompt(bench), options.repeats)
    if "peak_bytes" in options.parts:
        row["peak_bytes"] = measure_peaks(cell, options)
    return row


def format_ratio(slow: list[float], fast: list[float]) -> str:
    """Format the ratio of medians, with the range over paired turns."""
    pairs = sorted(s / f for s, f in zip(slow, fast))
    spread = f" ({pairs[0]:.1f}-{pairs[-1]:.1f})" if len(pairs) > 1 else ""
    return f"{statistics.median(slow) / statistics.median(fast):.2f}{spread}"


def format_row(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    cells = [f"{row['prompt']}/{row['completion']}/{row['candidates']}"]
    for phase in ("sample", "score", "update"):
        cells.append(format_times(row["phases"] and row["phases"][phase], "plain", "shared"))
    cells.append(format_times(row["step"], "trl", "purld"))
    if row["peak_bytes"]:
        plain, shared = (row["peak_bytes"][form] / 2**20 for form in ("plain", "shared"))
        cells.append(f"{plain:.0f} / {shared:.0f} MiB = {plain / shared:.2f}")
    else:
        cells.append("")
    return "| " + " | ".join(cells) + " |"


def format_times(times: dict[str, list[float]] | None, slow: str, fast: str) -> str:
    """Format the medians of two sides and their ratio; empty for a part that was not measured."""
    if times is None:
        return ""
    seconds = " / ".join(f"{statistics.median(times[side]):.3g}" for side in (slow, fast))
    return f"{seconds} s = {format_ratio(times[slow], times[fast])}"


PARTS = ("phases", "step", "peak_bytes")
HEADER = """| P/C/K | sample plain / shared | score plain / shared | update plain / shared | step TRL / purld | peak |
|---|---|---|---|---|---|"""


def write_report(
    rows: Iterable[dict[str, Any]],
    format_row: Callable[[dict[str, Any]], str],
    shape: Shape,
    options: argparse.Namespace,
) -> None:
    """Print each row as it is measured; write all rows as JSON if `options` name an output."""
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": read_versions(),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "shape": {name: value for name, value in vars(shape).items() if name != "config"},
        "rows": [],
    }
    for row in rows:
        report["rows"].append(row)
        print(format_row(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def read_versions() -> dict[str, str]:
    """Return the versions of the libraries that are compared; those that are installed."""
    found = {}
    for name in ("torch", "transformers", "trl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def grid_cells(options: argparse.Namespace) -> list[Cell]:
    """Return the grid, starting with the cell that the project's goals are about."""
    grid = [Cell(p, options.completion, k) for p in options.prompts for k in options.candidates]
    return sorted(grid, key=lambda c: (c.prompt, c.candidates) != (512, 8))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="One Stage II step, and its phases, against TRL and plain forms.")
    parser.add_argument("--quick", action="store_true", help="one cell of a smaller model")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--model", type=Path, help="a model directory, whose shape to take instead")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="step: against TRL's")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", choices=["plain", "shared"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shape, options.prompts, options.candidates, options.repeats = "quick", [512], [8], 2
    return options


def main() -> None:
    """Run the grid, print a table and write JSON."""
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    shape = SHAPES[options.shape] if options.model is None else Shape.of_model(options.model)
    if options.peak:
        (cell,) = grid_cells(options)
        print(peak_of_update(shape, cell, options.peak, options))
        return
    print(HEADER, flush=True)
    rows = (measure_cell(shape, cell, options) for cell in grid_cells(options))
    write_report(rows, format_row, shape, options)


if __name__ == "__main__":
    main()

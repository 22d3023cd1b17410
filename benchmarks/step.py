"""One Stage II step of the GRPO kind, and its phases, against TRL and against repeating the prompt K times.

    python benchmarks/step.py --quick            a slice of two minutes
    python benchmarks/step.py --output step.json the whole grid
    python benchmarks/step.py --device cuda --dtype bfloat16 --shape 1.5b --lora

The model has random weights, the prompts random words; what is timed does not depend on what they say. TRL's
GRPOTrainer and ours get the same model, prompts, number and length of candidates, loss and optimiser. Its reward
function scores the K candidates and the anchor with a frozen copy as a competent user would write it: one padded
batch of full texts, no gradients, logits at the closing positions only. TRL makes logits for completions only, as it
does on a GPU. Both sides run in one process, taking
turns, after a warm-up that also holds the self-check of sharing. Ratios are of medians. Memory is what the update
takes beyond weights, gradients and optimiser state, each form in a process of its own (a CPU's needs Linux).
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from purld.model.encode import Encoder, pad_left
from purld.model.load import Roles
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.prefix import FullSequences, Prefix
from purld.model.sample import Decoding, GenerateSampler
from purld.model.self_evaluation import SelfEvaluator
from purld.model.vision import EncodedPrompt, pixel_inputs
from purld.records import Prompt

_SPECIAL = ["[PAD]", "[UNK]", "<|turn|>", "<|end|>"]
_CHAT = "{% for m in messages %}<|turn|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}<|turn|> assistant "
_MICRO_BATCH = 8  # sequences per backward pass, on every side


@dataclass(frozen=True)
class Shape:
    """A decoder's size; `kv` heads of 64 serve `hidden` / 64 query heads."""

    hidden: int
    layers: int
    intermediate: int
    kv: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights that every token passes through, the head aside."""
        return self.layers * self.hidden * (2 * self.hidden + 128 * self.kv + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """Weights between hidden states and logits."""
        return self.hidden * self.vocabulary


SHAPES = {
    "small": Shape(512, 12, 1408, 2, 32_000),
    "quick": Shape(256, 4, 704, 1, 32_000),
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
        encoder: of the model.
        base: the model that every role starts from.
        prompt: what the candidates answer.
        cell: the sizes.
        lora: whether an adapter is trained in place of all weights.
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
        self.optimiser = adam(self.policy)
        self.sampler = GenerateSampler(encoder, Decoding(1.0, cell.completion))
        self.evaluator = SelfEvaluator(encoder, "expected", cell.candidates + 1)
        draw = random.Random(0)
        self.anchor = words(cell.completion, draw)
        self.prompt = prompt
        self.prompt_head = encoder.encode_prompt(prompt)
        self.completions = [encoder.encode_literal(words(cell.completion, draw)) for _ in range(cell.candidates)]
        self.texts = [encoder.decode_text(c) for c in self.completions]

    @classmethod
    def of_text(cls, shape: Shape, cell: Cell, options: argparse.Namespace) -> Bench:
        """A Llama of a shape, and a prompt of as many tokens as the cell says."""
        encoder = Encoder(tokenizer(shape.vocabulary), max_anchor_tokens=cell.completion)
        base = random_model(shape, encoder, torch.device(options.device), getattr(torch, options.dtype))
        # The template around a prompt has a few tokens of its own.
        question = words(cell.prompt - len(encoder.encode_prompt(Prompt.from_text(""))), random.Random(1))
        return cls(encoder, base, Prompt.from_text(question), cell, options.lora)

    def trainable(self) -> Any:
        """A model to train that starts from the same weights."""
        model = copy.deepcopy(self.base)
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")) if self.lora else model

    def sample_shared(self) -> list[list[int]]:
        """K candidates, the prompt prefilled once."""
        (group,) = self.sampler(self.policy, [self.prompt_head], self.cell.candidates, seed=0)
        return [c.ids for c in group]

    @torch.no_grad()
    def sample_plain(self) -> None:
        """K candidates, the prompt prefilled K times."""
        ids, mask = pad_left([self.prompt_head.ids], self.encoder.pad, self.device)
        self.policy.generate(
            input_ids=ids,
            attention_mask=mask,
            **pixel_inputs([self.prompt_head], ids),
            num_return_sequences=self.cell.candidates,
            do_sample=True,
            top_k=0,
            max_new_tokens=self.cell.completion,
        )

    def score_shared(self, texts: Sequence[str]) -> list[float | None]:
        """The candidates' scores, instruction, prompt and anchor computed once."""
        with self.roles.frozen() as evaluator:
            return self.evaluator.score(evaluator, self.prompt, self.anchor, texts).candidates

    @torch.no_grad()
    def score_plain(self, texts: Sequence[str]) -> list[float]:
        """The same scores from full texts, as a reward function would find them."""
        frame = self.encoder.evaluation_frame(self.prompt, self.anchor)
        opening = self.encoder.encode_literal("0.")
        rows = [
            frame.prefix.ids + self.encoder.encode_literal(t) + frame.suffix + opening for t in (self.anchor, *texts)
        ]
        ids, mask = pad_left(rows, self.encoder.pad, self.device)
        beside = pixel_inputs([frame.prefix] * len(rows), ids)
        logits = self.frozen(input_ids=ids, attention_mask=mask, logits_to_keep=3, **beside).logits.float()
        zero, one = self.encoder.encode_literal("0")[0], self.encoder.encode_literal("1")[0]
        digits = torch.tensor([self.encoder.encode_literal(str(d))[0] for d in range(10)], device=self.device)
        leading = logits[:, 0, [zero, one]].softmax(dim=-1)
        fraction = logits[:, 2, digits].softmax(dim=-1) @ (torch.arange(10.0, device=self.device) / 10)
        scores: list[float] = (leading[:, 1] + leading[:, 0] * fraction).tolist()
        return scores[1:]

    def update(self, prefix: Prefix, completions: Sequence[Sequence[int]], advantages: Tensor) -> None:
        """One optimiser step of GRPO's clipped loss, per-sequence means, no KL term."""
        for rows in micro_batches(len(completions), _MICRO_BATCH):
            log_probs, mask = prefix.token_log_probs(completions[rows])
            ratio = (log_probs - log_probs.detach()).exp()
            gain = advantages[rows].unsqueeze(1)
            clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            (-((clipped * mask).sum(dim=1) / mask.sum(dim=1)).sum() / len(completions)).backward()
        prefix.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def update_shared(self) -> None:
        """The update on the shared prompt."""
        self.update(self.shared_prefix(self.completions), self.completions, self.advantages())

    def update_plain(self) -> None:
        """The update on full sequences."""
        plain = FullSequences(self.policy, self.prompt_head, self.encoder.pad)
        self.update(plain, self.completions, self.advantages())

    def step(self) -> None:
        """Sample, score, update."""
        completions = self.sample_shared()
        scores = self.score_shared([self.encoder.decode_text(c) for c in completions])
        rewards = torch.tensor([s or 0.0 for s in scores], device=self.device)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        self.update(self.shared_prefix(completions), completions, advantages)

    def shared_prefix(self, completions: Sequence[Sequence[int]]) -> Prefix:
        """The prompt of a group, once."""
        return make_prefix(self.policy, self.prompt_head, completions, self.encoder.pad, cut=True)

    def advantages(self) -> Tensor:
        """Some advantages of both signs."""
        return torch.linspace(-1.5, 1.5, self.cell.candidates, device=self.device)


def words(count: int, draw: random.Random) -> str:
    """Random text of `count` tokens."""
    return " ".join(f"w{draw.randrange(1000)}" for _ in range(count))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, so that texts have the lengths they are meant to have."""
    words = [*_SPECIAL, *map(str, range(10)), ".", "user", "assistant", *(f"w{i}" for i in range(1000))]
    words += [f"x{i}" for i in range(vocabulary - len(words))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="<|end|>", chat_template=_CHAT
    )


def random_model(shape: Shape, encoder: Encoder, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.kv,
        head_dim=64,
        max_position_embeddings=8192,
        pad_token_id=encoder.pad,
        eos_token_id=encoder.end,
        bos_token_id=None,
    )
    with device:
        return LlamaForCausalLM(config).to(dtype).eval()


def adam(model: Any) -> torch.optim.Optimizer:
    """The optimiser that TRL's trainer uses by default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)


def clock(device: torch.device) -> float:
    """Seconds: of the process's own work on a CPU, which neighbours on the machine do not stretch; else of the wall."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes."""
    start = clock(device)
    work()
    return clock(device) - start


def phases(bench: Bench, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each phase in both forms, taking turns."""
    forms = {
        "sample": {"plain": bench.sample_plain, "shared": bench.sample_shared},
        "score": {
            "plain": lambda: bench.score_plain(bench.texts),
            "shared": lambda: bench.score_shared(bench.texts),
        },
        "update": {"plain": bench.update_plain, "shared": bench.update_shared},
    }
    for shared in (bench.sample_shared, forms["score"]["shared"], bench.update_shared):
        shared()  # warm-up; the self-check is in it
    found: dict[str, dict[str, list[float]]] = {p: {"plain": [], "shared": []} for p in forms}
    for _ in range(repeats):
        for phase, both in forms.items():
            for form, work in both.items():
                found[phase][form].append(timed(work, bench.device))
    return found


def steps_against_trl(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole steps, TRL's and ours taking turns, and candidates' mean length on TRL's side."""
    found: dict[str, list[float]] = {"trl": [], "purld": []}
    lengths: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        texts = [c[0]["content"] for c in completions]
        lengths.extend(len(bench.encoder.encode_literal(t)) for t in texts)
        return bench.score_plain(texts)

    class TakeTurns(TrainerCallback):
        """Times TRL's step, then runs and times ours; the first of each is the warm-up."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = clock(bench.device)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            theirs = clock(bench.device) - self.start
            ours = timed(bench.step, bench.device)
            if state.global_step > 1:
                found["trl"].append(theirs)
                found["purld"].append(ours)

    cell = bench.cell
    rows = [{"prompt": [{"role": "user", "content": bench.prompt.question}]}] * (repeats + 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=bench.trainable(),
            reward_funcs=reward,
            processing_class=bench.encoder.tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[TakeTurns()],
            args=trl_settings(folder, cell, repeats + 1, bench),
        )
        # Off Triton, TRL sends the prompt's positions through the head as well, for compilers that we do not use.
        with mock.patch("trl.trainer.utils._use_triton", lambda _: True):
            trainer.train()
    found["trl_completion_tokens"] = [statistics.mean(lengths)]
    return found


def trl_settings(folder: str, cell: Cell, steps: int, bench: Bench) -> GRPOConfig:
    """GRPOTrainer doing what `Bench.step` does."""
    micro = min(cell.candidates, _MICRO_BATCH)
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=cell.candidates // micro,
        num_generations=cell.candidates,
        max_completion_length=cell.completion,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=False,
        use_cpu=bench.device.type == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        log_level="error",
    )


def peak_of_update(shape: Shape, cell: Cell, form: str, options: argparse.Namespace) -> int:
    """Bytes that one update takes at its peak beyond what the model and its optimiser hold anyway."""
    bench = Bench.of_text(shape, cell, options)
    bench.optimiser.zero_grad = lambda: None  # type: ignore[method-assign]  # gradients stay, as part of what is held
    few = [c[:4] for c in bench.completions[:2]]
    head = EncodedPrompt(bench.prompt_head.ids[:16])
    bench.update(make_prefix(bench.policy, head, few, bench.encoder.pad, cut=True), few, bench.advantages()[:2])
    before = held(bench.device)
    {"plain": bench.update_plain, "shared": bench.update_shared}[form]()
    return peak(bench.device) - before


def held(device: torch.device) -> int:
    """Bytes in use; the peak is counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, on Linux
    return peak(device)


def peak(device: torch.device) -> int:
    """The most bytes in use since `held`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peaks(cell: Cell, options: argparse.Namespace) -> dict[str, int]:
    """`peak_of_update` of both forms, each in a fresh process."""
    found = {}
    for form in ("plain", "shared"):
        command = [sys.executable, __file__, "--peak", form, "--shape", options.shape, "--device", options.device]
        command += ["--dtype", options.dtype, "--completion", str(cell.completion), *["--lora"] * options.lora]
        command += ["--prompts", str(cell.prompt), "--candidates", str(cell.candidates)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[form] = int(result.stdout.split()[-1])
    return found


def update_rate(shape: Shape, cell: Cell, seconds: float, lora: bool) -> float:
    """Floating-point operations per second of the shared update's matrix products, attention's aside."""
    completion_tokens = cell.candidates * cell.completion
    passes = 4 if lora else 6  # frozen weights need no gradient of their own
    body = passes * shape.body * (cell.prompt + completion_tokens)
    head = (passes + 2) * shape.head * completion_tokens  # logits are made twice
    return (body + head) / seconds


def measure(shape: Shape, cell: Cell, options: argparse.Namespace, repeats: int, whole: bool) -> dict[str, Any]:
    """All figures of a cell."""
    bench = Bench.of_text(shape, cell, options)
    row: dict[str, Any] = {"prompt": cell.prompt, "completion": cell.completion, "candidates": cell.candidates}
    row["phases"] = phases(bench, repeats)
    shared = statistics.median(row["phases"]["update"]["shared"])
    row["update_flops_per_second"] = update_rate(shape, cell, shared, options.lora)
    row["update_completion_tokens_per_second"] = cell.candidates * cell.completion / shared
    row["step"] = steps_against_trl(bench, repeats) if whole else None
    del bench
    row["peak_bytes"] = peaks(cell, options) if whole else None
    return row


def ratio(slow: list[float], fast: list[float]) -> str:
    """Of medians, with the range over paired turns."""
    pairs = sorted(s / f for s, f in zip(slow, fast))
    spread = f" ({pairs[0]:.1f}-{pairs[-1]:.1f})" if len(pairs) > 1 else ""
    return f"{statistics.median(slow) / statistics.median(fast):.2f}{spread}"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{row['prompt']}/{row['completion']}/{row['candidates']}"]
    for phase in ("sample", "score", "update"):
        times = row["phases"][phase]
        seconds = " / ".join(f"{statistics.median(times[form]):.3g}" for form in ("plain", "shared"))
        cells.append(f"{seconds} s = {ratio(times['plain'], times['shared'])}")
    if row["step"]:
        times = row["step"]
        seconds = " / ".join(f"{statistics.median(times[side]):.3g}" for side in ("trl", "purld"))
        cells.append(f"{seconds} s = {ratio(times['trl'], times['purld'])}")
    if row["peak_bytes"]:
        plain, shared = (row["peak_bytes"][form] / 2**20 for form in ("plain", "shared"))
        cells.append(f"{plain:.0f} / {shared:.0f} MiB = {plain / shared:.2f}")
    return "| " + " | ".join(cells) + " |"


HEADER = """| P/C/K | sample plain / shared | score plain / shared | update plain / shared | step TRL / purld | peak |
|---|---|---|---|---|---|"""


def write_report(
    rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str], shape: Shape, options: argparse.Namespace
) -> None:
    """Print a line for each row as it is measured, and keep them all as JSON where `options` ask for it."""
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "shape": vars(shape),
        "rows": [],
    }
    for row in rows:
        report["rows"].append(row)
        print(line(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The grid, the cell that the aims are about first."""
    grid = [Cell(p, options.completion, k) for p in options.prompts for k in options.candidates]
    return sorted(grid, key=lambda c: (c.prompt, c.candidates) != (512, 8))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One Stage II step, and its phases, against TRL and plain forms.")
    parser.add_argument("--quick", action="store_true", help="one cell of a smaller model")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phases-only", action="store_true", help="leave out TRL and memory")
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
    """Run the grid; print a table, write JSON."""
    options = arguments()
    transformers.logging.set_verbosity_error()
    shape = SHAPES[options.shape]
    if options.peak:
        (cell,) = cells(options)
        print(peak_of_update(shape, cell, options.peak, options))
        return
    print(HEADER, flush=True)
    rows = (measure(shape, cell, options, options.repeats, not options.phases_only) for cell in cells(options))
    write_report(rows, line, shape, options)


if __name__ == "__main__":
    main()

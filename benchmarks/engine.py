"""Time draws of a vLLM server against transformers' `generate` on the same prompts, and compare their log-probs.

    python benchmarks/engine.py --model ./models/my-3b-instruct --url http://127.0.0.1:8000

Start the server as docs/engine.md says. Both sides draw in turns, after a warm-up; the ratio is of medians. Where both
run on the same CPU, the ratio of CPU seconds is printed too, with `--server-pid`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from purld.config.schema import Lora, Student
from purld.model.load import load_encoder, load_model
from purld.model.sample import Completion, Decoding, GenerateSampler
from purld.model.vision import EncodedPrompt
from purld.model.vllm_sampler import VllmSampler, log_prob_gap

Draw = Callable[[int], list[list[Completion]]]


def main() -> None:
    """Print both sides' times, their ratio, and the difference of log-probs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server-pid", type=int, action="append", default=[], help="a process to count CPU time of")
    options = parser.parse_args()
    engine = {"kind": "vllm", "base_url": options.url}
    student = Student(model=options.model, lora=Lora(), engine=engine)
    encoder, model = load_encoder(student), load_model(student, options.model)
    rng = random.Random(0)
    words = [rng.randrange(len(encoder.tokenizer) // 2) for _ in range(options.prompts * options.prompt_tokens)]
    prompts = [EncodedPrompt(words[i : i + options.prompt_tokens]) for i in range(0, len(words), options.prompt_tokens)]
    decoding = Decoding(1.0, options.tokens)
    samplers = {
        "generate": GenerateSampler(encoder, decoding),
        "vllm": VllmSampler(student.engine, student.model, encoder, decoding, Path("engine")),
    }
    drawn: dict[str, list[tuple[float, float, int]]] = {name: [] for name in samplers}
    gaps = []
    for repeat in range(options.repeats + 1):
        for name, sampler in samplers.items():
            started, used = time.monotonic(), cpu_seconds(options.server_pid)
            groups = sampler(model, prompts, options.candidates, [repeat] * len(prompts))
            wall, cpu = time.monotonic() - started, cpu_seconds(options.server_pid) - used
            if repeat:
                drawn[name].append((wall, cpu, sum(len(c.ids) for group in groups for c in group)))
            if name == "vllm":
                gaps.append(log_prob_gap(model, prompts[0], groups[0], encoder.pad))
    print(f"{options.prompts} prompts of {options.prompt_tokens} tokens, {options.candidates} candidates of at most "
          f"{options.tokens}; medians of {options.repeats}")  # fmt: skip
    for name, rows in drawn.items():
        rates = [statistics.median(tokens / row[unit] for *row, tokens in rows) for unit in (0, 1)]
        print(f"{name:>8}: {rates[0]:8.1f} tokens per second, {rates[1]:8.1f} per CPU second")
    print(f"log-probs differ by {statistics.mean(gaps):.2e} nats per token on average")


def cpu_seconds(others: list[int]) -> float:
    """Return the CPU seconds that this process and the others have used (Linux)."""
    own = time.process_time()
    for pid in others:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own


if __name__ == "__main__":
    main()

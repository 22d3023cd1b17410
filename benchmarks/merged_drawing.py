"""Count and time what merging a student's adapters saves of a decode step.

    python benchmarks/merged_drawing.py DIR              the model directory of a student
    python benchmarks/merged_drawing.py DIR --rows 64    for 64 sequences

On a GPU a decode step takes as long as starting its operations takes, so their number says what to expect there. Views
are left out of it: they start nothing on a device.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from step import LORA
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from purld.config.schema import Student
from purld.model.load import make_trainable
from purld.model.merged_layers import merged_layers

_PROMPT, _STEPS = 20, 8
_VIEWS = {
    "alias", "as_strided", "chunk", "contiguous", "detach", "dropout", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "linear", "matmul", "narrow", "permute", "reshape", "resolve_conj", "resolve_neg",
    "scaled_dot_product_attention", "select", "slice", "split", "t", "to", "transpose", "unflatten", "unsqueeze",
    "view", "_to_copy", "_unsafe_view",
}  # fmt: skip


def main() -> None:
    """Print the operations and the seconds of a decode step, with adapters beside the weights and merged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--rows", type=int, default=8, help="sequences that decode together")
    options = parser.parse_args()
    policy: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    policy = make_trainable(Student(model="", lora=LORA), policy)
    time_steps(policy, options.rows)  # warms up
    print(f"beside: {count_operations(policy)} operations, {time_steps(policy, options.rows):.4f} s a step")
    started = time.process_time()
    with merged_layers(policy):
        merging = time.process_time() - started
        seconds = time_steps(policy, options.rows)
        print(f"merged: {count_operations(policy)} operations, {seconds:.4f} s a step; merging took {merging:.2f} s")


@torch.no_grad()
def time_steps(policy: Any, rows: int) -> float:
    """Return the mean processor seconds of a decode step of `rows` sequences."""
    cache, token = _prefill(policy, rows)
    started = time.process_time()
    for _ in range(_STEPS):
        policy(token, past_key_values=cache, use_cache=True)
    return (time.process_time() - started) / _STEPS


@torch.no_grad()
def count_operations(policy: Any) -> int:
    """Return how many operations that compute or copy something a decode step starts."""
    cache, token = _prefill(policy, 1)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        policy(token, past_key_values=cache, use_cache=True)
    names = ((event.key.removeprefix("aten::"), event) for event in found.key_averages() if "aten::" in event.key)
    return sum(event.count for name, event in names if name not in _VIEWS)


def _prefill(policy: Any, rows: int) -> tuple[Any, torch.Tensor]:
    tokens = torch.ones(rows, _PROMPT, dtype=torch.long)
    return policy(tokens, use_cache=True).past_key_values, tokens[:, :1]


if __name__ == "__main__":
    main()

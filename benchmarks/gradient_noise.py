"""Measure how many groups an update of Stage II needs before its direction is more signal than noise.

    python benchmarks/gradient_noise.py RUN... --groups 120 --out noise.json
    python benchmarks/gradient_noise.py --table noise.json

RUN is a run with an adapter whose Stage II has begun. Its recorded groups of the first steps are measured again with
the weights that Stage II starts from, so they need not have been drawn by exactly these. Of every group with right and
wrong candidates (scores 1 and 0, as `agreement` gives them) it takes the gradient of the mean log-prob of the right
ones less that of the wrong ones. LDL-GRPO, GRPO and REINFORCE are weighted sums of these directions: with m of K
candidates right, their weights are 1 - m/K, the root of m/K (1 - m/K), and m/K (1 - m/K).

The signal is the squared length of the expected gradient, estimated by products of different prompts' gradients, with
a jackknife over prompts; the noise is the mean squared length of one group's. Their ratio is the number of groups at
which they are equal in an update (the simple noise scale of McCandlish et al., 2018).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purld.config.load import load_config
from purld.config.methods import GroupSettings
from purld.config.schema import Config
from purld.model.load import load_encoder, load_model, make_trainable
from purld.model.log_probs import token_log_probs
from purld.records import Prompt
from purld.runs.files import read_rows, write_json
from purld.runs.run_dir import RunDir
from purld.tasks.registry import load_data

Weight = Callable[[np.ndarray], np.ndarray]

WEIGHTS: Mapping[str, Weight] = {
    "LDL-GRPO, every group alike": lambda share: 1 - share,
    "GRPO, by the standard deviation": lambda share: np.sqrt(share * (1 - share)),
    "REINFORCE, and LDL-GRPO by positives": lambda share: share * (1 - share),
}
"""What a group counts, by the share of its candidates that are right."""


@dataclass(frozen=True)
class Estimate:
    """A squared signal with its standard error, the noise of one group, and the groups at which they are equal."""

    signal: float
    error: float
    noise: float

    @property
    def groups(self) -> float | None:
        """The number of groups at which an update is as much signal as noise; None where the signal is not positive."""
        return self.noise / self.signal if self.signal > 0 else None

    @property
    def least_groups(self) -> float | None:
        """The same at the upper end of the signal's interval of 95%."""
        greatest = self.signal + 1.96 * self.error
        return self.noise / greatest if greatest > 0 else None


def noise_scale(products: np.ndarray, prompts: Sequence[str], weights: np.ndarray) -> Estimate:
    """Estimate the signal and the noise of weighted gradients.

    Args:
        products: (N, N) inner products of the groups' gradients.
        prompts: (N,) the prompt of every group; groups of one prompt are not independent.
        weights: (N,) what each group counts.

    Raises:
        ValueError: there are fewer than three prompts.
    """
    names, own = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 3:
        raise ValueError("a noise scale needs groups of three prompts or more")
    weighted = products * np.outer(weights, weights)
    different = own[:, None] != own[None, :]
    by_prompt = np.zeros((len(names), len(names)))  # sums over the pairs of two prompts' groups
    np.add.at(by_prompt, (own[:, None], own[None, :]), np.where(different, weighted, 0.0))
    pairs = np.zeros_like(by_prompt)
    np.add.at(pairs, (own[:, None], own[None, :]), different.astype(float))
    left_out = (by_prompt.sum() - 2 * by_prompt.sum(axis=1)) / (pairs.sum() - 2 * pairs.sum(axis=1))
    error = math.sqrt((len(names) - 1) * float(np.var(left_out)))
    return Estimate(float(by_prompt.sum() / pairs.sum()), error, float(np.diag(weighted).mean()))


# --- gradients -----------------------------------------------------------------------------------------------


def mixed_groups(runs: Sequence[RunDir], last_step: int) -> list[dict[str, Any]]:
    """Return the recorded groups of the first steps that hold right and wrong candidates, the earliest first."""
    rows = [row for run in runs for row in read_rows(run.groups) if row["step"] <= last_step]
    return [row for row in sorted(rows, key=lambda row: row["step"]) if set(row["scores"]) == {0.0, 1.0}]


class StageTwoStart:
    """The student that Stage II starts from, with the new adapter that it trains."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self._encoder = load_encoder(config.student)
        self._model = make_trainable(config.student, load_model(config.student, run.sft), config.seed)
        self.trained = [weights for weights in self._model.parameters() if weights.requires_grad]
        assert isinstance(config.align, GroupSettings)
        self._limit = config.align.max_new_tokens
        self.prompts = {prompt.id: prompt for prompt in load_data(config.data)[0].prompts}

    def contrast(self, row: Mapping[str, Any]) -> Tensor:
        """Return mean log p(right) - mean log p(wrong) of a recorded group, (), in nats."""
        ids = [
            self._encoder.encode_drawn_answer(text, length < self._limit)
            for text, length in zip(row["candidates"], row["lengths"], strict=True)
        ]
        prompt: Prompt = self.prompts[row["prompt_id"]]
        log_probs, mask = token_log_probs(self._model, self._encoder.encode_prompt(prompt), ids, self._encoder.pad)
        scores = torch.tensor(row["scores"])
        signs = scores / scores.sum() - (1 - scores) / (1 - scores).sum()
        return signs @ (log_probs * mask).sum(dim=1)

    def gradient(self, row: Mapping[str, Any]) -> Tensor:
        """Return the contrast's gradient in what Stage II trains, (parameters,), in half precision."""
        gradients = torch.autograd.grad(self.contrast(row), self.trained)
        return torch.cat([gradient.flatten() for gradient in gradients]).half()


def measure(runs: Sequence[RunDir], config: Config, groups: int, last_step: int) -> dict[str, Any]:
    """Return the groups' prompts and shares of right candidates, and the (N, N) products of their gradients."""
    start, began = StageTwoStart(config, runs[0]), time.monotonic()
    rows = mixed_groups(runs, last_step)[:groups]
    gradients = []
    for number, row in enumerate(rows, 1):
        gradients.append(start.gradient(row))
        if number % 10 == 0:
            print(f"{number} of {len(rows)} groups, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    stacked = torch.stack(gradients)
    products = [(stacked.float() @ gradient.float()).tolist() for gradient in stacked]
    shares = [sum(row["scores"]) / len(row["scores"]) for row in rows]
    return {"prompts": [row["prompt_id"] for row in rows], "shares": shares, "products": products}


def table(measured: Mapping[str, Any]) -> str:
    """Return the estimates as a Markdown table."""
    shares, products = np.asarray(measured["shares"]), np.asarray(measured["products"])
    lines = ["| a group counts | signal² | noise² of a group | groups at which they are equal |", "|---|---|---|---|"]
    for name, weight in WEIGHTS.items():
        found = noise_scale(products, measured["prompts"], weight(shares))
        interval = f"{found.signal:.3g} ± {1.96 * found.error:.2g}"
        lines.append(f"| {name} | {interval} | {found.noise:.3g} | {_groups_in_words(found)} |")
    return "\n".join(lines)


def _groups_in_words(found: Estimate) -> str:
    if found.least_groups is None:
        return "no signal"
    estimate = "not found" if found.groups is None else f"{found.groups:.0f}"
    return f"{estimate}; at least {found.least_groups:.0f}"


def main() -> None:
    """Measure, or make the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="runs that share Stage I")
    parser.add_argument("--groups", type=int, default=120, help="groups with right and wrong candidates")
    parser.add_argument("--last-step", type=int, default=20, help="the last step whose groups are used")
    parser.add_argument("--out", type=Path, help="where to keep what was measured")
    parser.add_argument("--table", type=Path, help="make the table of what was kept here")
    options = parser.parse_args()
    if options.table:
        measured = json.loads(options.table.read_text(encoding="utf-8"))
    elif options.runs and options.out:
        runs = [RunDir(path) for path in options.runs]
        config = load_config(runs[0].config)
        if config.student.lora is None or not isinstance(config.align, GroupSettings):
            parser.error("needs a run with groups and an adapter: many gradients of all weights do not fit")
        measured = measure(runs, config, options.groups, options.last_step)
        write_json(options.out, measured)
    else:
        parser.error("name runs and --out, or --table")
    print(table(measured))


if __name__ == "__main__":
    main()

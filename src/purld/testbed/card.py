"""What the tiny student can do, measured: its accuracy and whether it can tell its right answers from its wrong ones.

All figures are on held-out problems; intervals are 95% (Wilson for shares, bootstrap over problems for the AUC).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from purld import templates
from purld.testbed.tokenizer import render
from purld.testbed.world import Problem, Task, generate, is_right, teacher_answer

# The longest right answer has about 45 tokens.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Figures:
    """The figures of one task. Intervals are (low, high); margins are mean score minus the anchor's score."""

    problems: int
    samples_per_problem: int
    greedy: float
    greedy_ci: tuple[float, float]
    sampled: float
    sampled_ci: tuple[float, float]
    pass_at_k: float
    pass_at_k_ci: tuple[float, float]
    auc: float
    auc_ci: tuple[float, float]
    anchor_score: float
    margin_right: float
    margin_wrong: float


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, n: int, k: int, seed: int
) -> Figures:
    """Figures on `n` held-out problems with `k` sampled answers each. Changes torch's random state."""
    problems = generate(task, "heldout", n, seed)
    torch.manual_seed(seed)
    questions = [p.question for p in problems]
    greedy = [is_right(p, a) for p, a in zip(problems, answer(model, tokenizer, questions, greedy=True))]
    repeated = [p for p in problems for _ in range(k)]
    samples = answer(model, tokenizer, [p.question for p in repeated])
    right = np.array([is_right(p, a) for p, a in zip(repeated, samples)]).reshape(n, k)
    anchors = [teacher_answer(p) for p in repeated]
    scores = score(model, tokenizer, repeated, anchors, samples).reshape(n, k)
    anchor_score = score(model, tokenizer, problems, anchors[::k], anchors[::k]).mean().item()
    return Figures(
        problems=n,
        samples_per_problem=k,
        greedy=float(np.mean(greedy)),
        greedy_ci=wilson(sum(greedy), n),
        sampled=float(right.mean()),
        sampled_ci=_clustered(right.mean(1)),
        pass_at_k=float(right.any(1).mean()),
        pass_at_k_ci=wilson(int(right.any(1).sum()), n),
        auc=auc(scores[right], scores[~right]),
        auc_ci=_auc_interval(scores, right, seed),
        anchor_score=anchor_score,
        margin_right=_mean(scores[right]) - anchor_score,
        margin_wrong=_mean(scores[~right]) - anchor_score,
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    greedy: bool = False,
    batch: int = 256,
) -> list[str]:
    """One answer to each question, sampled at temperature 1 or greedy."""
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        prompts = [render(tokenizer, q) for q in questions[start : start + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True)
        tokens = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers += tokenizer.batch_decode(tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    anchors: Sequence[str],
    candidates: Sequence[str],
    batch: int = 256,
) -> np.ndarray:
    """The expected score of each candidate, shape (n,).

    One forward pass with "0." put after the prompt: p("1") + p("0") times the expectation of the next digit / 10, with
    the first two renormalised over "0" and "1" and the digits over themselves.
    """
    digits = tokenizer.convert_tokens_to_ids([str(d) for d in range(10)])
    scores = []
    for start in range(0, len(problems), batch):
        part = slice(start, start + batch)
        prompts = [
            render(tokenizer, templates.self_evaluation(p.question, a, c)) + "0."
            for p, a, c in zip(problems[part], anchors[part], candidates[part])
        ]
        logits = model(**tokenizer(prompts, return_tensors="pt", padding=True), logits_to_keep=3).logits
        p0, p1 = logits[:, 0, digits[:2]].softmax(-1).T
        fraction = logits[:, 2, digits].softmax(-1) @ torch.arange(10.0) / 10
        scores.append((p1 + p0 * fraction).numpy())
    return np.concatenate(scores)


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """The chance that a right answer scores above a wrong one, ties half; nan if either is missing."""
    if not len(right) or not len(wrong):
        return math.nan
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, "left") + np.searchsorted(ordered, right, "right")
    return float(below.mean() / 2 / len(wrong))


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share."""
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _clustered(shares: np.ndarray) -> tuple[float, float]:
    half = 1.96 * float(shares.std(ddof=1)) / math.sqrt(len(shares))
    return float(shares.mean()) - half, float(shares.mean()) + half


def _auc_interval(scores: np.ndarray, right: np.ndarray, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    resamples = rng.integers(0, len(scores), (200, len(scores)))
    draws = np.array([auc(scores[rows][right[rows]], scores[rows][~right[rows]]) for rows in resamples])
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def to_json(figures: Figures) -> dict[str, Any]:
    """Figures rounded for reading; what could not be measured is absent."""
    rounded = {
        key: [round(v, 4) for v in value] if isinstance(value, tuple) else round(value, 4)
        for key, value in asdict(figures).items()
    }
    return {key: value for key, value in rounded.items() if not np.isnan(value).any()}

"""Measure a tiny student: its accuracy, and whether it can tell its right answers from its wrong ones.

Sampler, self-evaluation and statistics are those of a run. All figures are on held-out problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from purld.evaluation.accuracy import accuracy_with_interval
from purld.evaluation.score_quality import CheckedGroup, score_quality
from purld.model.encode import Encoder
from purld.model.sample import Decoding, generate_completions
from purld.model.self_evaluation import GroupScores, SelfEvaluator
from purld.records import Prompt
from purld.testbed.world import world
from purld.testbed.world.world import Task, is_right, teacher_answer

# The longest right answer has about 45 tokens.
MAX_NEW_TOKENS = 64
MAX_ANCHOR_TOKENS = 128
_PROMPTS_AT_A_TIME = 256


@dataclass(frozen=True)
class Figures:
    """The figures of one task. Intervals are 95%, (low, high); margins are mean score minus the anchor's score.

    `auc` is over all pairs of a right and a wrong answer, `auc_within` over the pairs of one problem.
    """

    problems: int
    samples_per_problem: int
    greedy: float
    greedy_ci: tuple[float, float]
    sampled: float
    sampled_ci: tuple[float, float]
    pass_at_k: float
    pass_at_k_ci: tuple[float, float]
    auc: float | None
    auc_within: float | None
    auc_within_ci: tuple[float, float] | None
    anchor_score: float
    margin_right: float
    margin_wrong: float


def measure_student(model: PreTrainedModel, encoder: Encoder, task: Task, n: int, k: int, seed: int) -> Figures:
    """Measure `n` held-out problems with `k` sampled answers each. Changes torch's random state."""
    problems = world.generate_problems(task, "heldout", n, seed)
    torch.manual_seed(seed)
    prompts = [world.to_prompt(p) for p in problems]
    samples = sample_answers(model, encoder, prompts, k)
    right = np.array([[is_right(p, text) for text in texts] for p, texts in zip(problems, samples)])
    greedy_right = [
        is_right(p, text) for p, (text,) in zip(problems, sample_answers(model, encoder, prompts, greedy=True))
    ]
    evaluator = SelfEvaluator(encoder, "expected", batch_size=k + 1)
    scored_groups = [
        evaluator.score(model, prompt, teacher_answer(p), texts) for p, prompt, texts in zip(problems, prompts, samples)
    ]
    return _compute_figures(np.array(greedy_right), right, scored_groups, seed)


def _compute_figures(
    greedy_right: np.ndarray, right: np.ndarray, scored_groups: Sequence[GroupScores], seed: int
) -> Figures:
    """Compute the figures from the correctness of greedy (n,) and sampled (n, k) answers and the samples' scores."""
    scores = np.array([group.candidates for group in scored_groups], dtype=float)
    anchor_scores = np.array([[group.anchor] for group in scored_groups], dtype=float)
    groups = [CheckedGroup(str(i), 0, s.tolist(), r.tolist()) for i, (s, r) in enumerate(zip(scores, right))]
    quality = score_quality(groups, seed)
    greedy, greedy_ci = accuracy_with_interval(greedy_right)
    sampled, sampled_ci = accuracy_with_interval(right)
    passed, passed_ci = accuracy_with_interval(right.any(axis=1))
    return Figures(
        right.shape[0],
        right.shape[1],
        greedy,
        greedy_ci,
        sampled,
        sampled_ci,
        passed,
        passed_ci,
        quality.auc,
        quality.auc_within,
        quality.auc_within_ci,
        float(anchor_scores.mean()),
        _mean_or_nan((scores - anchor_scores)[right]),
        _mean_or_nan((scores - anchor_scores)[~right]),
    )


def sample_answers(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Prompt], count: int = 1, *, greedy: bool = False
) -> list[list[str]]:
    """Return `count` answers to each prompt, sampled at temperature 1 or greedy, from torch's random state."""
    seeds = torch.randint(2**62, (len(prompts),)).tolist()
    decoding = Decoding(temperature=0.0 if greedy else 1.0, max_new_tokens=MAX_NEW_TOKENS)
    answers: list[list[str]] = []
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        rows = slice(start, start + _PROMPTS_AT_A_TIME)
        encoded_prompts = [encoder.encode_prompt(prompt) for prompt in prompts[rows]]
        for completions in generate_completions(model, encoder, encoded_prompts, count, decoding, seeds=seeds[rows]):
            answers.append([encoder.decode_text(c.ids) for c in completions])
    return answers


def figures_to_json(figures: Figures) -> dict[str, Any]:
    """Round figures for reading, without those that could not be measured."""
    measured = {key: value for key, value in asdict(figures).items() if value is not None and not np.isnan(value).any()}
    return {
        key: [round(v, 4) for v in value] if isinstance(value, tuple) else round(value, 4)
        for key, value in measured.items()
    }


def _mean_or_nan(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")

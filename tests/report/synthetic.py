"""Write a synthetic run directory with everything a finished run has, and some hostile text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from purld.records import Generation, GroupRecord, Prompt, Verdict
from purld.runs.files import append_rows, atomic_write, read_rows, write_json, write_rows
from purld.runs.run_dir import RunDir
from purld.runs.thumbnails import prompt_fields

HOSTILE = "<script>window.injected = true; alert(1)</script></script><!-- <img src=x onerror='window.injected=true'>"
REVERSED = "transfer \u202egnirts desrever\u202c to \u2066isolated\u2069 \x1b[31mred\x07 soft\u00adhyphen \ud83d lone"

WORDS = "the dose is taken daily with water so that total rises to milligrams note kidney function and check"

CONFIG = """\
student: {model: ./models/clinic-1b-instruct, lora: {r: 16}}
data: {prompts: prompts.jsonl, check: exact}
teacher: {kind: openai, base_url: https://teacher.example/v1, model: gpt-4o, max_cost: 25.0}
evaluate: {judge: {kind: openai, base_url: https://judge.example/v1, model: our-judge}, opponent: {kind: teacher}}
align: {method: ldl_grpo, score: in_context, q: ratio, candidates: 8, prompts_per_step: 8, steps: 120,
  gamma: 5.0, tau: 1.2}
seed: 0
"""

REVISITED = 5  # largest number of groups measured again
Build = Callable[..., RunDir]


def synthetic_run(
    path: Path, held_out: int = 30, groups: int = 40, words: int = 40, seed: int = 0, logged: bool = True
) -> RunDir:
    """Write a finished run: `held_out` prompts answered by three models and an opponent, and `groups` of Stage II.

    Without what training `logged` its page has no figures, which is most of what a page takes to write.
    """
    run, rng = RunDir(path), random.Random(seed)
    with atomic_write(run.config) as handle:
        handle.write(CONFIG)
    write_json(run.results, results())
    if logged:
        append_rows(run.metrics, metrics(rng))
    prompts = [(f"{i:016x}", question(rng, i)) for i in range(held_out + groups)]
    write_rows(run.anchors, [{"prompt_id": i, "text": prose(rng, words)} for i, _ in prompts[held_out:]])
    write_rows(run.groups, [group(rng, i, q, words, n + 1) for n, (i, q) in enumerate(prompts[held_out:])])
    write_rows(run.revisited, [revisited(row) for row in read_rows(run.groups)[:REVISITED]])
    for model, skill in (("base", 0.35), ("sft", 0.6), ("ldl_grpo", 0.75)):
        rows = [answer(rng, i, q, words, skill) for i, q in prompts[:held_out]]
        write_rows(run.generations(model), rows)
        write_rows(run.generations(f"{model}.greedy"), [answer(rng, i, q, words, skill) for i, q in prompts[:held_out]])
        write_rows(run.verdicts(model), [v for i, _ in prompts[:held_out] for v in verdicts(rng, i, skill - 0.2)])
    write_rows(run.opponent, [{"prompt_id": i, "text": prose(rng, words)} for i, _ in prompts[:held_out]])
    return run


def picture_run(run: RunDir, prompts: dict[str, Prompt]) -> None:
    """Replace the prompts of the run's rows by prompts with images, matched by id."""
    for path in (run.groups, *run.groups.parent.glob("*.jsonl")):
        rows = [row | prompt_fields(prompts[row["prompt_id"]], path) if row["prompt_id"] in prompts else row
                for row in read_rows(path)]  # fmt: skip
        write_rows(path, rows)


def results() -> dict[str, Any]:
    def model(accuracy: float, greedy: float, rate: float, tokens: float, unfinished: int) -> dict[str, Any]:
        return {
            "n": 300, "mean_tokens": tokens, "unfinished": unfinished, "judged": 298, "unjudged": 4, "flip_rate": 0.114,
            "accuracy": accuracy, "accuracy_ci": [accuracy - 0.041, accuracy + 0.038],
            "greedy_accuracy": greedy, "greedy_accuracy_ci": [greedy - 0.039, greedy + 0.034],
            "win_rate": rate, "win_rate_ci": [rate - 0.05, rate + 0.052],
            "lc_win_rate": rate + 0.013, "lc_win_rate_ci": [rate - 0.043, rate + 0.07],
        }  # fmt: skip

    return {
        "method": "ldl_grpo",
        "seed": 0,
        "teacher": {
            "prompts": 1200,
            "answered": 1193,
            "calls": 1201,
            "input_tokens": 184_220,
            "output_tokens": 402_113,
            "cost": 4.4816,
        },
        "models": {
            "base": model(0.412, 0.463, 0.181, 61.2, 9),
            "sft": model(0.683, 0.857, 0.342, 48.7, 2),
            "ldl_grpo": model(0.745, 0.880, 0.401, 47.9, 1),
        },
        "difference": {
            "ldl_grpo - sft": {
                "accuracy": 0.062,
                "accuracy_ci": [0.031, 0.095],
                "greedy_accuracy": 0.023,
                "greedy_accuracy_ci": [-0.007, 0.053],
            },
            "sft - base": {"accuracy": 0.271, "accuracy_ci": [0.22, 0.32]},
        },
        "seconds": {"anchors": 312.4, "sft": 840.0, "align": 5412.7, "evaluate": 411.0},
    }


def metrics(rng: random.Random) -> list[dict[str, Any]]:
    def noisy(value: float, size: float = 0.05) -> float:
        return value + rng.gauss(0, size)

    sft = [{"stage": "sft", "step": s, "loss": noisy(0.7 + 1.9 * math.exp(-s / 18), 0.08), "learning_rate": 1e-5,
            "grad_norm": noisy(1.0), "epoch": s / 75} for s in range(1, 76)]  # fmt: skip
    sft += [{"stage": "sft", "step": s, "eval_loss": 0.75 + 1.8 * math.exp(-s / 18)} for s in (25, 50, 75)]
    align = []
    for step in range(1, 121):
        done = 1 - math.exp(-step / 45)
        align.append(
            {
                "stage": "align", "step": step, "objective": noisy(0.62 - 0.3 * done), "ldl": noisy(0.61 - 0.31 * done),
                "kl": max(0.0, noisy(0.9 * done, 0.08)), "entropy_labels": noisy(1.71 + 0.1 * done, 0.03),
                "entropy_policy": noisy(1.55 + 0.2 * done, 0.06), "length": noisy(49 - 1.5 * done, 2),
                "score": noisy(0.55 + 0.17 * done, 0.04), "anchor_score": noisy(0.93, 0.01),
                "margin": noisy(-0.38 + 0.17 * done, 0.04), "length_correlation": noisy(-0.12, 0.12),
                "grad_norm": abs(noisy(0.8, 0.2)), "learning_rate": 1e-6, "truncated": rng.randint(0, 2),
                "unscored": 0, "seconds": 40.1, "gain": noisy(0.15 * done, 0.03),
            }
        )  # fmt: skip
    return sft + align


def question(rng: random.Random, i: int) -> str:
    doses = rng.randint(2, 9), rng.randint(3, 40)
    return (
        f"Case {i}: a patient takes {doses[0]} tablets of {doses[1]} mg a day for {rng.randint(3, 14)} days. "
        "How many milligrams is that in all, and what should the note to the ward say?"
    )


def prose(rng: random.Random, words: int) -> str:
    text = " ".join(rng.choice(WORDS.split()) for _ in range(max(4, int(rng.gauss(words, words / 5)))))
    return text.capitalize() + "."


def group(rng: random.Random, prompt_id: str, prompt: str, words: int, step: int) -> dict[str, Any]:
    scores: list[float | None] = [min(1.0, max(0.0, rng.gauss(0.6, 0.25))) for _ in range(8)]
    if step % 7 == 0:
        scores[3] = None
    margins = [None if s is None else s - 0.93 for s in scores]
    weights = [0.0 if m is None else math.exp(2 * m) for m in margins]
    policy = [0.0 if m is None else rng.random() for m in margins]
    row = GroupRecord(
        step=step,
        prompt_id=prompt_id,
        anchor=prose(rng, words),
        candidates=[prose(rng, words) for _ in range(8)],
        lengths=[rng.randint(20, 80) for _ in range(8)],
        scores=scores,
        anchor_score=0.93,
        margins=margins,
        confidences=[None if m is None else 1 / (1 + math.exp(-5 * m)) for m in margins],
        labels=[w / sum(weights) for w in weights],
        policy_before=[p / sum(policy) for p in policy],
        label_divergence=0.3 + 0.01 * step,
    )
    return asdict(row) | {"prompt": prompt}


def revisited(row: dict[str, Any]) -> dict[str, Any]:
    """Return the group measured under a policy half-way to D."""
    after = [None if s is None else (d + q) / 2 for s, d, q in zip(row["scores"], row["labels"], row["policy_before"])]
    divergence = row["label_divergence"] / 3
    return {key: row[key] for key in ("step", "prompt_id")} | {"policy_after": after, "label_divergence": divergence}


def answer(rng: random.Random, prompt_id: str, prompt: str, words: int, skill: float) -> dict[str, Any]:
    row = Generation(prompt_id, 0, prose(rng, words), tokens=rng.randint(20, 70), finished=rng.random() < 0.97)
    return asdict(row) | {"prompt": prompt, "correct": rng.random() < skill}


def verdicts(rng: random.Random, prompt_id: str, skill: float) -> list[dict[str, Any]]:
    wins = rng.random() < skill
    flips = rng.random() < 0.1
    rows = [
        Verdict(prompt_id, 0, "win" if wins else "loss", "A" if wins else "B", True),
        Verdict(prompt_id, 0, "win" if wins != flips else "loss", "B" if wins != flips else "A", False),
    ]
    if rng.random() < 0.04:
        rows = [Verdict(prompt_id, 0, "unjudged", "I cannot decide between these.", a) for a in (True, False)]
    return [asdict(row) for row in rows]

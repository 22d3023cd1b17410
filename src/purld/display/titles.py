"""Name models and metrics for people, the same on the terminal and on the page."""

from __future__ import annotations

MODEL_TITLES = {
    "base": "Base",
    "sft": "SFT",
    "sft_sft": "SFT→SFT",
    "ldl_grpo": "LDL-GRPO",
    "anchorrank_dpo": "AnchorRank-DPO",
    "anchor_grpo": "Anchor-GRPO",
    "self_distillation": "Self-distillation",
    "self_ppo": "Self-PPO",
    "singlepair_dpo": "SinglePair-DPO",
    "teacher_judge_grpo": "Teacher-judge GRPO",
    "opponent": "Opponent",
}

STAGE_TITLES = {
    "anchors": "Anchors: one teacher answer per prompt",
    "sft": "Stage I: SFT on the anchors",
    "probe": "Probe: can the student evaluate itself?",
    "align": "Stage II: alignment",
    "evaluate": "Evaluation on held-out prompts",
    "report": "Report",
}
"""The stages of a run, in their order."""

METRIC_TITLES = {
    "accuracy": "accuracy",
    "greedy_accuracy": "greedy accuracy",
    "win_rate": "win rate",
    "lc_win_rate": "LC win rate",
}
"""The metrics of results.json that models are compared by, in display order."""

ANSWER_TITLES = {
    "mean_tokens": "tokens per answer",
    "unfinished": "cut off",
    "distinct_2": "distinct word pairs",
    "unique_answers": "different samples",
}
"""What is shown of the answers where they were neither checked nor judged."""


def model_title(model: str) -> str:
    """Return the title of a model, or its name if it has none."""
    return MODEL_TITLES.get(model, model)

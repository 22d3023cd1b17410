"""How people are told of models and metrics: on the terminal and on the page the same."""

from __future__ import annotations

MODELS = {
    "base": "Base",
    "sft": "SFT",
    "sft_sft": "SFT→SFT",
    "ldl_grpo": "LDL-GRPO",
    "anchorrank_dpo": "AnchorRank-DPO",
    "anchor_grpo": "Anchor-GRPO",
    "self_ppo": "Self-PPO",
    "singlepair_dpo": "SinglePair-DPO",
    "teacher_judge_grpo": "Teacher-judge GRPO",
    "opponent": "Opponent",
}

METRIC_TITLES = {
    "accuracy": "accuracy",
    "greedy_accuracy": "greedy accuracy",
    "win_rate": "win rate",
    "lc_win_rate": "LC win rate",
}
"""The metrics of results.json that models are compared by, in the order in which they are shown."""


def model_title(model: str) -> str:
    """How the name of a model is written."""
    return MODELS.get(model, model)

"""Test the mean label divergence before and after against values computed by hand."""

from __future__ import annotations

from purld.evaluation.diagnostics import mean_label_divergence


def test_by_hand() -> None:
    """(0.4 + 0.2) / 2 and (0.1 + 0.3) / 2; one of two came closer. Groups measured once are left out."""
    groups = [
        {"step": 1, "prompt_id": "p", "label_divergence": 0.4},
        {"step": 1, "prompt_id": "q", "label_divergence": 0.2},
        {"step": 2, "prompt_id": "p", "label_divergence": 9.0},
    ]
    again = [{"step": 1, "prompt_id": p, "label_divergence": d} for p, d in (("p", 0.1), ("q", 0.3))]
    assert mean_label_divergence(groups, again) == {"groups": 2, "before": 0.3, "after": 0.2, "closer": 1}


def test_a_method_without_q_has_none() -> None:
    assert mean_label_divergence([{"step": 1, "prompt_id": "p"}], []) == {}

"""The section about cost: who scored the candidates of Stage II, as the run's own files tell."""

import pytest

from purld.report.cost import cost_section
from purld.report.run_data import RunData

GROUPS = {"candidates": 4, "prompts_per_step": 2}


@pytest.mark.parametrize(
    ("settings", "logged", "words"),
    [
        (GROUPS | {"score": "in_context"}, {"score": 0.5}, "scored 24 candidates without the teacher"),
        (GROUPS | {"score": "in_context", "updates_per_rollout": 3}, {"score": 0.5}, "scored 8 candidates without"),
        (GROUPS | {"score": "in_context"}, {"score": 0.5, "drawn": 4.0}, "scored 12 candidates without the teacher"),
        (GROUPS, {"score": 0.5}, "The teacher scored every candidate"),
        (GROUPS, {}, ""),  # self-distillation
        ({"prompts_per_step": 2}, {"score": 0.5}, ""),  # one candidate each
    ],
)
def test_who_scored_is_told(settings, logged, words):
    metrics = [{"stage": "align", "step": step} | logged for step in (1, 2, 3)]
    empty = {key: {} for key in ("results", "anchors", "answers", "greedy", "verdicts", "images")}
    run = RunData("a", "", config={"align": settings}, metrics=metrics, groups=[], **empty)
    shown = cost_section([run]).body
    assert words in shown and ("scored" in shown) == bool(words)

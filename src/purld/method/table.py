"""The methods by name: what each takes as its signal and how it moves the policy.

`purld methods` prints this table, and the pipeline asks it whether a method has a second stage.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    signal: str
    objective: str
    teacher_calls: str
    second_stage: bool = True


METHODS = {
    method.name: method
    for method in (
        Method(
            "ldl_grpo",
            signal="anchor-conditioned self-evaluation, as a PU label distribution (Eq. 2)",
            objective="KL(D || q) + beta KL(p || p_sft) (Eq. 4)",
            teacher_calls="N",
        ),
        Method(
            "sft",
            signal="the teacher's answers (Eq. 1)",
            objective="maximum likelihood",
            teacher_calls="N",
            second_stage=False,
        ),
    )
}

"""Count the tokens that Stage II's scores send through the student, from a run's own prompts and anchors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from purld.config.clients import AnswerFile
from purld.config.methods import SamplingSettings, SelfScoringSettings, StageTwoSettings
from purld.config.schema import Config
from purld.methods.table import METHODS
from purld.model.encode import Encoder
from purld.model.log_probs import CPU_ROWS, BatchSize
from purld.pipeline.context import anchors_in_file, examples_of_pool
from purld.pipeline.plan_sheet import Plan
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.stage_two_split import split_of_run
from purld.pipeline.validation import FEWEST_PROMPTS, validation_measure
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.training.best_step import validated_steps
from purld.training.scoring import find_scorer
from purld.training.scoring_tokens import CountTokens, GroupSize, anchored_reference_tokens
from purld.training.validation import GOLD, validation_rows


def plan_scoring(plan: Plan, config: Config, encoder: Encoder, pools: PromptPools, run: RunDir) -> None:
    """Add the tokens of Stage II's scores, or of the passes that take their place, if the student computes any."""
    align = config.align
    if not isinstance(align, StageTwoSettings):
        return
    steps, comparisons = _steps_work(config), _comparisons_work(config)
    reads_anchors = any(work is not None and work.anchored for work in (steps, comparisons))
    anchors = _known_anchors(config, pools, run) if reads_anchors else None
    split = split_of_run(config, pools, run)
    found = _count(steps, encoder, split.training, anchors)
    compared = _count(comparisons, encoder, split.steps, anchors)
    of_steps = tokens_of_stage(found, align) if found else 0
    of_comparisons = sum(compared) * len(validated_steps(align)) if len(compared) >= FEWEST_PROMPTS else 0
    counted = [work for work, tokens in ((steps, of_steps), (comparisons, of_comparisons)) if work and tokens]
    if not counted:
        return
    whole = of_steps + of_comparisons
    part = f", {of_comparisons:,} of them to compare steps" if len(counted) > 1 else ""
    anchored = anchors is None and any(work.anchored for work in counted)
    unknown = " and anchors of student.max_anchor_tokens" if anchored else ""
    plan.add_lines(
        "Training",
        f"{counted[0].title}: at most {whole:,} tokens through the student in all{part}, "
        f"{math.ceil(whole / align.steps):,} a step on average, with candidates of align.max_new_tokens{unknown}",
    )


def tokens_of_stage(counts: Sequence[int], align: StageTwoSettings) -> int:
    """Return an upper bound on the tokens of all groups that Stage II draws, whatever their order.

    Args:
        counts: the tokens of each prompt's group.
        align: the method's settings.
    """
    largest = sorted(counts, reverse=True)
    passes, groups, rest = align.passes_over(len(counts))
    return passes * sum(largest[:groups]) + sum(largest[:rest])


@dataclass(frozen=True)
class _Work:
    """What the student computes for one group, and how its tokens are counted.

    Attributes:
        title: what it is, for the plan.
        count: counts the tokens of a group.
        batch_size: rows per forward pass.
        candidates: candidates of a group.
        length: tokens of a candidate at most.
        anchored: whether the anchor is read.
    """

    title: str
    count: CountTokens
    batch_size: BatchSize
    candidates: int
    length: int
    anchored: bool


def _count(
    work: _Work | None, encoder: Encoder, prompts: Sequence[Prompt], anchors: Mapping[str, str] | None
) -> list[int]:
    """Return the tokens of each prompt's group; a prompt without an anchor has none where anchors are known."""
    if work is None:
        return []
    known = anchors if work.anchored else None
    return [
        work.count(
            encoder,
            GroupSize(p, None if known is None else known[p.id], work.candidates, work.length, work.anchored),
            CPU_ROWS if work.batch_size == "auto" else work.batch_size,
        )
        for p in prompts
        if known is None or p.id in known
    ]


def _steps_work(config: Config) -> _Work | None:
    """Return what the student computes for the signal of the steps; None if nothing."""
    align = config.align
    row = METHODS[align.method].stage_two
    if not isinstance(align, SamplingSettings) or row is None:
        return None
    group = (align.drawn, align.max_new_tokens, row.scorer == "anchored" or row.anchored_reference)
    if row.anchored_reference:
        return _Work("p_sft with the anchor in its context", anchored_reference_tokens, align.micro_batch_size, *group)
    if isinstance(align, SelfScoringSettings) and (count := find_scorer(align.score).count_tokens) is not None:
        return _Work(f"scoring by {align.score}", count, align.score_batch_size, *group)
    return None


def _comparisons_work(config: Config) -> _Work | None:
    """Return what the student computes to compare steps on validation prompts; None if nothing."""
    align = config.align
    if not isinstance(align, StageTwoSettings) or align.validation_steps is None:
        return None
    measure = validation_measure(config)
    count = None if measure == GOLD else find_scorer(measure).count_tokens
    length = align.max_new_tokens if isinstance(align, SamplingSettings) else config.evaluate.max_new_tokens
    return count and _Work(f"comparing steps by {measure}", count, validation_rows(align), 1, length, anchored=True)


def _known_anchors(config: Config, pools: PromptPools, run: RunDir) -> Mapping[str, str] | None:
    """Return the anchors of the training prompts by prompt id; None if they are not there yet."""
    if "anchors" in run.finished_stages():
        return {prompt.id: anchor.text for prompt, anchor in examples_of_pool(run, pools.train)}
    if isinstance(config.teacher, AnswerFile):
        return anchors_in_file(config.teacher, pools.train, config.anchors)
    return None

"""Count the tokens that Stage II's scores send through the student, from a run's own prompts and anchors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from purld.config.clients import AnswerFile
from purld.config.methods import SamplingSettings, SelfScoringSettings
from purld.config.schema import Config
from purld.methods.table import METHODS
from purld.model.encode import Encoder
from purld.pipeline.context import anchors_in_file, examples_of_pool
from purld.pipeline.plan_sheet import Plan
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.self_comparison import stage_two_prompts
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.training.scoring import find_scorer
from purld.training.scoring_tokens import CountTokens, GroupSize, anchored_reference_tokens


def plan_scoring(plan: Plan, config: Config, encoder: Encoder, pools: PromptPools, run: RunDir) -> None:
    """Add the tokens of Stage II's scores, or of the passes that take their place, if the student computes any."""
    align = config.align
    if not isinstance(align, SamplingSettings) or (found := _counted_work(align)) is None:
        return
    title, count, batch_size = found
    row = METHODS[config.align.method].stage_two
    anchored = row is not None and (row.scorer == "anchored" or row.anchored_reference)
    pool = stage_two_prompts(config, pools)
    anchors = _known_anchors(config, pool, run) if anchored else None
    prompts = [p for p in pool if anchors is None or p.id in anchors]
    if not prompts:
        return
    sizes = [
        GroupSize(p, None if anchors is None else anchors[p.id], align.drawn, align.max_new_tokens, anchored)
        for p in prompts
    ]
    whole = tokens_of_stage([count(encoder, size, batch_size) for size in sizes], align)
    unknown = " and anchors of student.max_anchor_tokens" if anchored and anchors is None else ""
    plan.add_lines(
        "Training",
        f"{title}: at most {whole:,} tokens through the student in all, {math.ceil(whole / align.steps):,} a step on "
        f"average, with candidates of align.max_new_tokens{unknown}",
    )


def tokens_of_stage(counts: Sequence[int], align: SamplingSettings) -> int:
    """Return an upper bound on the tokens of all groups that Stage II draws, whatever their order.

    Args:
        counts: the tokens of each prompt's group.
        align: the method's settings.
    """
    largest = sorted(counts, reverse=True)
    batch = min(align.prompts_per_step, len(counts))
    # With several updates on the same candidates, an epoch leaves its incomplete batch out.
    whole_batches = len(counts) // batch
    batches = whole_batches if align.updates > 1 else math.ceil(len(counts) / batch)
    epochs, rest = divmod(math.ceil(align.steps / align.updates), batches)
    return epochs * sum(largest[: batches * batch]) + sum(largest[: rest * batch])


def _counted_work(align: SamplingSettings) -> tuple[str, CountTokens, int] | None:
    """Return what the student computes for the signal, how to count it, and its batch size; None if nothing."""
    row = METHODS[getattr(align, "method", "")].stage_two
    if row is not None and row.anchored_reference:
        return "p_sft with the anchor in its context", anchored_reference_tokens, align.micro_batch_size
    if isinstance(align, SelfScoringSettings) and (count := find_scorer(align.score).count_tokens) is not None:
        return f"scoring by {align.score}", count, align.score_batch_size
    return None


def _known_anchors(config: Config, pool: list[Prompt], run: RunDir) -> Mapping[str, str] | None:
    """Return the anchors of Stage II's prompts by prompt id; None if they are not there yet."""
    if "anchors" in run.finished_stages():
        return {prompt.id: anchor.text for prompt, anchor in examples_of_pool(run, pool)}
    if isinstance(config.teacher, AnswerFile):
        return anchors_in_file(config.teacher, pool, config.anchors)
    return None

"""Plan a run before it starts: prompts, requests and their cost, training steps, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from purld.config.methods import LdlGrpo, StageTwoSettings
from purld.config.schema import Config
from purld.model.encode import Encoder
from purld.pipeline.chosen_score import describe_score, with_chosen_score
from purld.pipeline.pipeline import STAGES
from purld.pipeline.plan_machine import plan_machine
from purld.pipeline.plan_requests import plan_requests
from purld.pipeline.plan_scoring import plan_scoring
from purld.pipeline.plan_sheet import Plan
from purld.pipeline.preflight import check_before_spending, check_judging, check_ledger
from purld.pipeline.prompt_pools import PromptPools, load_prompt_pools
from purld.pipeline.self_comparison import describe_comparison
from purld.pipeline.stage_two_split import StageTwoSplit, longest_prompt, split_of_run
from purld.pipeline.validation import describe_validation
from purld.runs.run_dir import RunDir
from purld.tasks.checks import find_check, missing_gold
from purld.training.sft import in_validation_part

_BINS = 6
_SHOWN, _SHOWN_CHARACTERS = 3, 600  # prompts as the student reads them


def make_plan(config: Config, run: RunDir) -> Plan:
    """Check the configuration against the files that it names, and return the plan of the run.

    Raises:
        UserError: a file, a row, the model directory or a length is wrong.
    """
    plan = Plan()
    run.check_place()
    given, config = config, with_chosen_score(config)
    encoder, sizes = check_before_spending(config, run)
    pools = load_prompt_pools(config, encoder, lambda line: plan.add_lines("Prompts", line))
    check_judging(config, pools, run)
    check_ledger(config, run)
    _plan_prompts(plan, pools)
    _plan_rendered_prompts(plan, pools, encoder)
    _plan_check(plan, config, pools)
    _plan_measures(plan, config, pools, run)
    plan_requests(plan, config, encoder, pools, run)
    _plan_training(plan, config, pools, split_of_run(config, pools, run))
    if score := describe_score(given, config):
        plan.add_lines("Training", score)
    plan_scoring(plan, config, encoder, pools, run)
    plan_machine(plan, config, sizes, run.path, longest_prompt(config, pools, run))
    _plan_remaining_stages(plan, run)
    return plan


def _plan_prompts(plan: Plan, pools: PromptPools) -> None:
    lengths = sorted(pools.tokens.values())
    plan.add_lines("Prompts", *pools.formats)
    plan.add_lines(
        "Prompts",
        f"{pools.rows} rows, {pools.duplicates} of them duplicates",
        f"{len(pools.train)} for training, {len(pools.held_out)} held out",
        f"tokens per prompt: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}",
        *_histogram(lengths),
    )


def _plan_rendered_prompts(plan: Plan, pools: PromptPools, encoder: Encoder) -> None:
    """Add the first prompts as the student reads them, with the special tokens of its chat template."""
    for prompt in pools.train[:_SHOWN]:
        ids = encoder.encode_prompt(prompt).ids
        # An image is one placeholder many times over.
        shown = [token for i, token in enumerate(ids) if token not in encoder.placeholders or ids[i - 1] != token]
        text = str(encoder.tokenizer.decode(shown, skip_special_tokens=False))
        if len(text) > _SHOWN_CHARACTERS:
            text = f"{text[: _SHOWN_CHARACTERS * 2 // 3]} […] {text[-_SHOWN_CHARACTERS // 3 :]}"
        plan.add_lines(f"Prompt as the student reads it ({prompt.location or prompt.id})", *text.splitlines())


def _histogram(lengths: Sequence[int]) -> list[str]:
    """Return a histogram of prompt lengths, one line per bar."""
    width = max(1, math.ceil((lengths[-1] + 1) / _BINS))
    counts = [sum(i * width <= n < (i + 1) * width for n in lengths) for i in range(_BINS)]
    scale = max(counts)
    return [
        f"{i * width:>6}-{(i + 1) * width - 1:<6} {'█' * math.ceil(30 * count / scale)} {count}"
        for i, count in enumerate(counts)
        if count
    ]


def _plan_check(plan: Plan, config: Config, pools: PromptPools) -> None:
    """Add whether accuracy can be reported: it needs a check, and gold for the held-out prompts."""
    if find_check(config.data) is None:
        plan.add_lines("Prompts", "no check of answers against gold: no accuracy will be reported")
    elif missing := missing_gold(config.data, pools.held_out):
        plan.add_lines("Prompts", missing)
        plan.problems.append(missing)


def _plan_measures(plan: Plan, config: Config, pools: PromptPools, run: RunDir) -> None:
    """Add what will be measured on the held-out prompts, and what will not."""
    if measures := describe_comparison(config, pools, run):
        plan.add_lines("Evaluation", *measures)
        return
    evaluate, prompts = config.evaluate, f"{len(pools.held_out):,} held-out prompts"
    checked, drawn = find_check(config.data) is not None, "greedy"
    if evaluate.temperature:
        drawn = f"sampled ({evaluate.samples} for each prompt) and greedy"
    plan.add_lines(
        "Evaluation",
        f"accuracy on {prompts}, of answers {drawn}, by data.check: {config.data.check}"
        if checked
        else "no accuracy: answers are not checked against gold (data.check)",
        f"win rates on {prompts} against evaluate.opponent, by evaluate.judge"
        if evaluate.judge
        else "no win rates: there is no judge (evaluate.judge and evaluate.opponent)",
    )


def _plan_training(plan: Plan, config: Config, pools: PromptPools, split: StageTwoSplit) -> None:
    sft, align = config.sft, config.align
    validation = sum(in_validation_part(p, sft.validation_fraction) for p in pools.sft)
    steps = math.ceil(math.ceil((len(pools.sft) - validation) / sft.batch_size) * sft.epochs)
    plan.add_lines(
        "Training",
        f"Stage I: {steps} steps of {sft.batch_size} anchors (epochs: {sft.epochs:g}), {validation} for validation",
        f"  {config.describe_rate('sft')}",
    )
    if isinstance(align, StageTwoSettings):
        plan.add_lines(
            "Training",
            _describe_stage_two(align, len(split.training)),
            f"  {config.describe_rate('align')}",
        )
    if kept := describe_validation(config, split.steps):
        plan.add_lines("Training", kept)
    if config.set_aside:
        plan.add_lines("Training", config.set_aside)
    if config.data.sft_fraction is not None:
        plan.add_lines("Training", f"{len(pools.sft)} prompts for Stage I, {len(pools.align)} others for Stage II")


def _describe_stage_two(align: StageTwoSettings, prompts: int) -> str:
    per_step, total = f"{align.prompts_per_step} prompts", ""
    if align.drawn:
        per_step += f" × {align.drawn} candidates" if align.drawn > 1 else ", one candidate each"
        total = f"{align.groups_drawn(prompts) * align.drawn:,} in all, "
    passes = align.groups_drawn(prompts) / max(1, prompts)
    repeated = f", {align.updates} on the same candidates" if align.updates > 1 else ""
    method = getattr(align, "method", "") + (f" with q={align.q}" if isinstance(align, LdlGrpo) else "")
    return (
        f"Stage II: {align.steps} steps of {per_step}{repeated} ({total}{passes:.1f} passes over the prompts), {method}"
    )


def _plan_remaining_stages(plan: Plan, run: RunDir) -> None:
    done = [stage for stage in STAGES if stage in run.finished_stages()]
    plan.add_lines(
        "Run", f"{Path(run.path)}: " + (f"finished so far: {', '.join(done)}" if done else "nothing done yet")
    )

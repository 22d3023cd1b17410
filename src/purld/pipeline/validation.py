"""Choose the prompts that Stage II's steps are compared on, and how their answers are measured.

They are of Stage I's validation part, which Stage II then leaves out as well. Where models are to be compared by
p_sft's own score on that part too, each gets a half: a model chosen on prompts looks better on these than it is.
"""

from __future__ import annotations

from purld.config.methods import SelfScoringSettings, StageTwoSettings
from purld.config.schema import Config
from purld.errors import UserError
from purld.methods.table import METHODS
from purld.pipeline.context import RunContext, examples_of_pool
from purld.pipeline.prompt_pools import PromptPools
from purld.records import Prompt, content_hash
from purld.tasks.checks import find_check, find_comparison, gold_check, reads_results
from purld.training.sft import in_validation_part
from purld.training.validation import GOLD, ValidationSet

FEWEST_PROMPTS = 2
_MOST_PROMPTS = 128  # a validation then costs a small part of the steps between two of them


def validation_part(config: Config, pools: PromptPools) -> list[Prompt]:
    """Return the prompts that Stage I validates on; none if they are too few, or if no other prompts are left."""
    part = [p for p in pools.sft if in_validation_part(p, config.sft.validation_fraction)]
    left = {p.id for p in pools.align} - {p.id for p in part}
    return part if FEWEST_PROMPTS <= len(part) < len(pools.sft) and left else []


def split_validation_part(config: Config, pools: PromptPools, compares: bool) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts that Stage II's steps are compared on, and those that models are compared on.

    Args:
        config: the configuration.
        pools: the prompts of the run.
        compares: whether models are compared on the part; they then get the larger half, or all of it if it is small.
    """
    part = validation_part(config, pools)
    validates = isinstance(config.align, StageTwoSettings) and config.align.validation_steps is not None
    room = len(part) // 2 if compares else len(part)
    if not validates or room < FEWEST_PROMPTS:
        return [], part if compares else []
    by_hash = sorted(part, key=lambda p: content_hash(["kept step", p.id]))
    ids = {p.id for p in by_hash[: min(room, _MOST_PROMPTS)]}
    others = [p for p in part if p.id not in ids]
    return [p for p in part if p.id in ids], others if compares else []


def check_validation(config: Config) -> None:
    """Check that answers can be measured as `align.validate_by` asks.

    Raises:
        UserError: they cannot, or `align.patience` counts validations and there are none.
    """
    align = config.align
    if not isinstance(align, StageTwoSettings):
        return
    if align.validate_every is None and align.patience is not None:
        raise UserError("align.patience counts validations, and align.validate_every is null; set it, or no patience.")
    if align.validate_by == GOLD and find_check(config.data) is None:
        raise UserError("align.validate_by=gold checks answers, which needs data.check and references.")
    if align.validate_by == "agreement" and find_comparison(config.data) is None:
        raise UserError(
            "align.validate_by=agreement compares results with the anchor's, which needs data.check=math, choice or "
            "exact; set it, or take align.validate_by=score."
        )


def validation_measure(config: Config) -> str:
    """Return how answers are measured: `gold`, or the name of a scorer."""
    align = config.align
    by = getattr(align, "validate_by", "auto")
    if by == "auto":
        by = "agreement" if reads_results(config.data) else "score"
    if by != "score":
        return str(by)
    row = METHODS[align.method].stage_two
    anchored = row is not None and row.scorer == "anchored" and isinstance(align, SelfScoringSettings)
    return str(getattr(align, "score", "")) if anchored else "in_context"


def make_validation_set(context: RunContext, prompts: list[Prompt], answer_tokens: int) -> ValidationSet | None:
    """Return the validation set of a run, or None if it has none or too few prompts can be measured.

    Args:
        context: the run.
        prompts: the prompts that steps are compared on.
        answer_tokens: the longest answer, for a method that draws none itself.
    """
    data, measure = context.config.data, validation_measure(context.config)
    check = find_check(data) if measure == GOLD else find_comparison(data)
    found = ValidationSet(examples_of_pool(context.run, prompts), measure, check, answer_tokens).measurable()
    if len(found.examples) >= FEWEST_PROMPTS:
        return found
    if prompts:
        context.reporter.say(
            f"Only {len(found.examples)} of {len(prompts)} validation prompts can be measured by {measure}, so the "
            "last step is kept."
        )
    return None


def describe_validation(config: Config, prompts: list[Prompt]) -> str | None:
    """Describe for the plan how the step that is kept is chosen; None for a method without Stage II."""
    align = config.align
    if not isinstance(align, StageTwoSettings):
        return None
    if align.validation_steps is None:
        return "  the last step is kept"
    if not prompts:
        return "  the last step is kept: no prompts of Stage I's validation part can be spared to compare steps on"
    measure = validation_measure(config)
    if measure == GOLD:
        check = find_check(config.data)
        prompts = [p for p in prompts if check is not None and gold_check(check, p) is not None]
    ends = "" if align.patience is None else f", and ends after {align.patience} validations without a better one"
    return (
        f"  keeps the best step by {measure} of greedy answers to {len(prompts)} validation prompts, left out of "
        f"training, every {align.validation_steps} steps{ends}"
    )

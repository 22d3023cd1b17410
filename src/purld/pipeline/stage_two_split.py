"""Split a run's prompts into those that Stage II trains on and those that it keeps out, once for the whole stage.

What is kept out depends on how the run will be measured, and a judge may come or go until the evaluation begins. So the
manifest records the split when Stage II begins, and from then on the stage and the evaluation follow the record.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from purld.config.clients import AnswerFile
from purld.config.schema import Config
from purld.pipeline.context import anchors_in_file
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.validation import FEWEST_PROMPTS, split_validation_part
from purld.records import Prompt
from purld.runs.files import read_intact_rows
from purld.runs.run_dir import RunDir
from purld.tasks.checks import find_check

_RECORD = "kept_out"  # its key among the facts of a stage that has begun


@dataclass(frozen=True)
class StageTwoSplit:
    """The prompts of Stage II, and those that it leaves out.

    Attributes:
        training: the prompts that it trains on.
        steps: the prompts that its steps are compared on; none if the last step is kept.
        models: the prompts that are kept out to compare models on; none if they are measured in another way.
        answer_tokens: the longest answer to a prompt of `steps`, for a method that draws none itself.
    """

    training: list[Prompt]
    steps: list[Prompt]
    models: list[Prompt]
    answer_tokens: int

    def to_facts(self) -> dict[str, Any]:
        """Return what the manifest records of the split when Stage II begins."""
        ids = {"steps": [p.id for p in self.steps], "models": [p.id for p in self.models]}
        return {_RECORD: ids | {"answer_tokens": self.answer_tokens}}


def lacks_measure(config: Config) -> bool:
    """Return whether a run has neither gold to check answers nor a judge."""
    return find_check(config.data) is None and config.evaluate.judge is None


def answers_in_file(config: Config, pools: PromptPools) -> dict[str, str]:
    """Return the held-out answers of a teacher that is a file, by prompt id."""
    if not isinstance(config.teacher, AnswerFile):
        return {}
    return anchors_in_file(config.teacher, pools.held_out, config.anchors)


def plan_split(config: Config, pools: PromptPools) -> StageTwoSplit:
    """Return the split of a Stage II that begins now."""
    compares = lacks_measure(config) and len(answers_in_file(config, pools)) < FEWEST_PROMPTS
    steps, models = split_validation_part(config, pools, compares)
    return _split(pools, _ids(steps), _ids(models), config.evaluate.max_new_tokens)


def split_stage_two(config: Config, pools: PromptPools, begun: Mapping[str, Any]) -> StageTwoSplit:
    """Return the split that Stage II began with, or else the one that it will begin with.

    Args:
        config: the configuration as it is now.
        pools: the prompts of the run.
        begun: what the manifest holds of Stage II's beginning; see `RunDir.begin_facts`.
    """
    if (kept := begun.get(_RECORD)) is None:
        return plan_split(config, pools)
    return _split(pools, kept["steps"], kept["models"], kept["answer_tokens"])


def split_of_run(config: Config, pools: PromptPools, run: RunDir) -> StageTwoSplit:
    """Return the split that Stage II of a run began with, or else the one that it will begin with."""
    return split_stage_two(config, pools, run.begin_facts("align"))


def longest_prompt(config: Config, pools: PromptPools, run: RunDir) -> int:
    """Return the tokens of Stage II's longest prompt; 0 if it has none."""
    return max((pools.tokens[p.id] for p in split_of_run(config, pools, run).training), default=0)


def lacks_record(run: RunDir) -> bool:
    """Return whether an older version, which recorded no split, began Stage II of a run."""
    return "align" in run.begun_stages() and _RECORD not in run.begin_facts("align")


def split_of_older_run(config: Config, pools: PromptPools, run: RunDir) -> StageTwoSplit:
    """Return the split of a Stage II that an older version began; no prompt that it drew groups of is kept out.

    Args:
        config: the configuration that the run was last continued with.
        pools: the prompts of the run.
        run: the run directory.
    """
    planned = plan_split(config, pools)
    if not planned.steps and not planned.models:
        return planned
    trained = {row["prompt_id"] for row in read_intact_rows(run.groups)}
    steps, models = (_ids(part) - trained for part in (planned.steps, planned.models))
    return _split(pools, steps, models, planned.answer_tokens)


def _split(pools: PromptPools, steps: Collection[str], models: Collection[str], answer_tokens: int) -> StageTwoSplit:
    steps, models = set(steps), set(models)  # as lists from the manifest they would be searched for every prompt
    kept = steps | models
    return StageTwoSplit(
        [p for p in pools.align if p.id not in kept],
        [p for p in pools.sft if p.id in steps],
        [p for p in pools.sft if p.id in models],
        answer_tokens,
    )


def _ids(prompts: Collection[Prompt]) -> set[str]:
    return {prompt.id for prompt in prompts}

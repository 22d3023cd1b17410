"""Compare a run's models where there is neither gold nor a judge: by the frozen p_sft's own scores, given anchors.

The score is the student's opinion of itself, and Stage II may have been trained on it; results.json, the terminal and
the report call it so and show the probe's verdict beside it. The anchors are the teacher's answers to held-out prompts
where the run has them. Where it has none, Stage I's validation part is kept out of Stage II as well and serves instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from purld import ranks
from purld.clients.anchors import apply_thinking_policy
from purld.clients.base import reply_from_ledger
from purld.clients.folder import FolderLedgers
from purld.clients.requests import build_requests
from purld.config.clients import OpenAIEndpoint
from purld.config.methods import LdlGrpo, SelfScoringSettings
from purld.config.schema import Config
from purld.evaluation.intervals import mean_interval
from purld.evaluation.summary import with_interval
from purld.model.load import Roles, load_model
from purld.pipeline.context import RunContext, examples_of_pool
from purld.pipeline.probe import takes_probe
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.stage_two_split import answers_in_file, lacks_measure, plan_split, split_of_run
from purld.pipeline.validation import FEWEST_PROMPTS
from purld.records import Anchor, Generation, Prompt
from purld.runs.run_dir import RunDir
from purld.training.checkpoints import device_autocast
from purld.training.scoring import GroupToScore, ScorerContext, find_scorer

_MOST_PROMPTS = 256  # scoring more would take longer and narrow the interval little


@dataclass(frozen=True)
class AnchoredSlice:
    """The prompts that models are compared on, with their anchors.

    Attributes:
        prompts: prompts that no stage trained on.
        anchors: the teacher's answers by prompt id, whole or cut.
        held_out: whether they are the run's held-out prompts, which the models have answered anyway.
    """

    prompts: Sequence[Prompt]
    anchors: Mapping[str, Anchor]
    held_out: bool

    @property
    def source(self) -> str:
        """Describe where the anchors come from."""
        return "held-out prompts" if self.held_out else "prompts of Stage I's validation part, kept out of Stage II"


def describe_comparison(config: Config, pools: PromptPools, run: RunDir) -> list[str]:
    """Describe for the plan what will be measured without gold and without a judge."""
    if not lacks_measure(config):
        return []
    in_file, validation = len(answers_in_file(config, pools)), len(split_of_run(config, pools, run).models)
    if in_file >= FEWEST_PROMPTS:
        anchors = f"{in_file:,} held-out prompts, given the teacher's answers in {getattr(config.teacher, 'path', '')}"
    elif validation:
        anchors = f"{validation:,} prompts of Stage I's validation part, given their anchors; Stage II leaves them out"
    else:
        return ["no gold, no judge and no anchor to spare: only diversity and length of the answers will be measured"]
    return [
        "answers are neither checked against gold nor judged: no accuracy and no win rate will be measured",
        f"  models are compared by p_sft's own score on {anchors}",
        "  set evaluate.judge and evaluate.opponent, or data.check and references, for a verdict from outside",
    ]


def find_slice(context: RunContext) -> AnchoredSlice | None:
    """Return the prompts and anchors to compare a run's models on; None if it needs none or has too few."""
    config, pools, run = context.config, context.pools, context.run
    if not lacks_measure(config):
        return None
    known = answers_in_file(config, pools) or _bought_anchors(config, pools, run)
    if len(known) >= FEWEST_PROMPTS:
        anchors = {prompt_id: Anchor(prompt_id, text) for prompt_id, text in known.items()}
        return AnchoredSlice([p for p in pools.held_out if p.id in anchors][:_MOST_PROMPTS], anchors, True)
    examples = examples_of_pool(run, split_of_run(config, pools, run).models[:_MOST_PROMPTS])
    if len(examples) < FEWEST_PROMPTS:
        return None
    return AnchoredSlice([p for p, _ in examples], {p.id: a for p, a in examples}, False)


def why_not_compared(context: RunContext) -> list[str]:
    """Say why there is no slice in a run that would keep one out of a Stage II that begins now; nothing in others."""
    config, pools, run = context.config, context.pools, context.run
    if not lacks_measure(config) or len(split_of_run(config, pools, run).models) >= FEWEST_PROMPTS:
        return []
    if len(plan_split(config, pools).models) < FEWEST_PROMPTS:
        return []
    return [
        "models are not compared by p_sft's own score: something else was to measure them when Stage II began, so it "
        "was trained on the prompts that would serve, or its step was chosen by them."
    ]


def compare_by_own_score(
    context: RunContext, chosen: AnchoredSlice, answers: Mapping[str, Mapping[str, Generation]]
) -> dict[str, Any]:
    """Score one answer of every model to every prompt of a slice by p_sft, and compare neighbouring models.

    Answers are scored as they were drawn: whole, and with an end of turn only if they have one.

    Args:
        context: the run.
        chosen: the prompts and anchors.
        answers: by model, from the base on, one answer by prompt id.

    Returns:
        `scorer`, `anchors`, `n`, the mean `score` by model, and by pair how often the later model's answer scores
        higher (`preferred`, ties counting half) with its 95% interval.
    """
    config = context.config
    settings = config.align
    if not takes_probe(settings) or not isinstance(settings, SelfScoringSettings):
        settings = LdlGrpo(score="in_context")
    model = load_model(config.student, context.run.sft)
    entry = find_scorer(settings.score)
    scorer = entry.make(ScorerContext(context.encoder, Roles(model, model), settings, True, device_autocast))
    groups = []
    for prompt in chosen.prompts:
        drawn = [of_model[prompt.id] for of_model in answers.values()]
        ids = [context.encoder.encode_drawn_answer(answer.text, answer.finished) for answer in drawn]
        anchor, texts = chosen.anchors[prompt.id], [answer.text for answer in drawn]
        groups.append(GroupToScore(prompt, anchor.text, texts, ids, anchor_cut=anchor.cut))
    mine, rows = groups[ranks.my_share(len(groups))], []
    with context.reporter.progress("prompts scored by p_sft") as progress:
        for index, group in enumerate(mine):
            rows += [scores.candidates for scores in scorer([group])]
            progress(index + 1, len(mine), "")
    rows = ranks.gather_rows(rows)
    scored = [[float(s) for s in row if s is not None] for row in rows if None not in row]
    if not scored:
        return {}
    names, columns = list(answers), np.array(scored).T
    means = {name: round(float(column.mean()), 6) for name, column in zip(names, columns, strict=True)}
    preferred: dict[str, Any] = {}
    for (before, old), (after, new) in pairwise(zip(names, columns, strict=True)):
        wins = (np.sign(new - old) + 1) / 2
        share, interval = float(wins.mean()), mean_interval(wins, config.seed)
        preferred[f"{after} - {before}"] = with_interval("preferred", share, interval)
    return {"scorer": settings.score, "anchors": chosen.source, "n": len(scored), "score": means, "pairs": preferred}


def _bought_anchors(config: Config, pools: PromptPools, run: RunDir) -> dict[str, str]:
    """Return the held-out answers of an endpoint that this run's ledger or a sibling's holds already."""
    if not isinstance(config.teacher, OpenAIEndpoint):
        return {}
    anchors = {}
    with FolderLedgers(run.ledger, with_own=True) as known:
        for prompt, request in zip(pools.held_out, build_requests(config.teacher, pools.held_out), strict=True):
            reply = reply_from_ledger(known, request.key)
            if reply is None:
                continue
            reply = apply_thinking_policy(reply, config.anchors)
            if reply.state == "answered" and reply.text:
                anchors[prompt.id] = reply.text
    return anchors

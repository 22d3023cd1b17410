"""Check before anything is paid for: the student's context and scoring, local models, the teacher's cap."""

from __future__ import annotations

from purld.config.clients import LocalModel, OpenAIEndpoint, TeacherAnchors
from purld.config.methods import SelfScoringSettings, TeacherJudgeGrpo
from purld.config.schema import Config
from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.load import check_model_directory, context_length
from purld.pipeline.prompt_pools import PromptPools
from purld.tasks.checks import find_check
from purld.training.scoring import find_scorer

# A generous allowance for the words of the self-evaluation and chat templates.
_TEMPLATE_TOKENS = 256


def check_context(config: Config) -> None:
    """Check that the longest self-evaluation fits the student's context.

    Raises:
        UserError: it does not; the message names the keys to lower.
    """
    context = context_length(config.student.model)
    lengths = config.student.max_prompt_tokens + config.student.max_anchor_tokens + _TEMPLATE_TOKENS
    lengths += max(getattr(config.align, "max_new_tokens", 0), config.evaluate.max_new_tokens)
    if context is not None and lengths > context:
        raise UserError(
            f"student.max_prompt_tokens, student.max_anchor_tokens and max_new_tokens add up to {lengths} tokens "
            f"with the self-evaluation template, more than the {context} that {config.student.model} reads; "
            "lower one of them."
        )


def check_scoring(config: Config, encoder: Encoder) -> None:
    """Check that the student can score as `align.score` asks.

    Raises:
        UserError: its tokenizer does not spell numbers as `expected` needs, or the run has no check of answers, which
            `agreement` needs.
    """
    if isinstance(config.align, SelfScoringSettings):
        check = find_scorer(config.align.score).check
        if check is not None:
            check(encoder, find_check(config.data))


def check_local_models(config: Config) -> None:
    """Check that the models of a local teacher or judge are on this machine.

    Raises:
        UserError: one is neither a model directory nor in the local cache.
    """
    for key, client in (("teacher.model", config.teacher), ("evaluate.judge.model", config.evaluate.judge)):
        if isinstance(client, LocalModel):
            check_model_directory(client.model, key)


def check_judging(config: Config, pools: PromptPools) -> None:
    """Check that the teacher's cap on calls covers a stage in which it judges every candidate.

    Raises:
        UserError: it does not. The cost in tokens is not known before candidates are drawn.
    """
    if not isinstance(config.align, TeacherJudgeGrpo) or not isinstance(config.teacher, OpenAIEndpoint):
        return
    anchors = len(pools.train)
    if isinstance(config.evaluate.opponent, TeacherAnchors):
        anchors += len(pools.held_out)
    calls, cap = config.align.candidates_in_all, config.teacher.max_calls
    if cap is not None and calls + anchors > cap:
        raise UserError(
            f"align.method {config.align.method} asks the teacher {anchors:,} prompts and about {calls:,} candidates, "
            f"and teacher.max_calls is {cap:,}; raise it, or lower align.steps, align.prompts_per_step or "
            "align.candidates."
        )

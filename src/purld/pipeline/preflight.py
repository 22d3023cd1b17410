"""Check before anything is paid for: the student's context and scoring, local models, the teacher's cap, the ledger."""

from __future__ import annotations

from purld.clients.ledger import LedgerView, check_not_lost, describe_lost_calls, is_blank
from purld.config.clients import AnswerFile, LocalModel, OpenAIEndpoint, TeacherAnchors
from purld.config.methods import LdlGrpo, SelfScoringSettings, StageTwoSettings, TeacherJudgeGrpo
from purld.config.schema import Config
from purld.errors import UserError
from purld.model.directory import check_model_directory
from purld.model.encode import Encoder
from purld.model.engine_check import check_engine
from purld.model.load import context_length, load_encoder
from purld.model.student_check import StudentSizes, check_stored_weights, check_student
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.stage_two_split import split_of_run
from purld.pipeline.validation import check_validation
from purld.runs.files import nearest_folder, read_rows
from purld.runs.run_dir import RunDir
from purld.tasks.checks import find_comparison, reads_results
from purld.training.scoring import find_scorer

# A generous allowance for the words of the self-evaluation and chat templates.
TEMPLATE_TOKENS = 256


def check_before_spending(config: Config, run: RunDir) -> tuple[Encoder, StudentSizes]:
    """Check whatever can be known before the prompts are read, and return the student's encoder and sizes.

    `purld check` and every command that runs a stage call this first. Every weight is read only while Stage I is still
    to come; later commands have a trained model to load instead.

    Raises:
        UserError: the student cannot be loaded, read its prompts, score or be trained as configured, or a local
            model is not there.
    """
    encoder = load_encoder(config.student)
    may_change = "sft" not in run.begun_stages()
    check_local_models(config)
    check_context(config)
    check_scoring(config, encoder, run)
    check_validation(config)
    sizes = check_student(config.student, encoder, may_change)
    if "sft" not in run.finished_stages():
        check_stored_weights(config.student)
    check_rollout_engine(config, encoder, run)
    return encoder, sizes


def check_rollout_engine(config: Config, encoder: Encoder, run: RunDir) -> None:
    """Check the server that draws from the student, if that is not this process and there is still something to draw.

    Raises:
        UserError: see `check_engine`.
    """
    finished = run.finished_stages()
    if "evaluate" in finished:
        return
    drawn = max(getattr(config.align, "max_new_tokens", 0), config.evaluate.max_new_tokens)
    check_engine(
        config.student,
        encoder,
        nearest_folder(run.path),
        longest=config.student.max_prompt_tokens + drawn,
        stages=2 if isinstance(config.align, StageTwoSettings) else 1,
        compare_weights="sft" not in finished,
    )


def check_context(config: Config) -> None:
    """Check that the longest self-evaluation fits the student's context.

    Raises:
        UserError: it does not; the message names the keys to lower.
    """
    context = context_length(config.student.model)
    lengths = config.student.max_prompt_tokens + config.student.max_anchor_tokens + TEMPLATE_TOKENS
    lengths += _longest_scored(config)
    if context is not None and lengths > context:
        raise UserError(
            "student.max_prompt_tokens, student.max_anchor_tokens and the longest answer that is scored, a candidate "
            f"of max_new_tokens or the anchor itself, add up to {lengths} tokens with the self-evaluation template, "
            f"more than the {context} that {config.student.model} reads; lower one of them."
        )


def _longest_scored(config: Config) -> int:
    """Return the most tokens of an answer that stands behind the anchor: of a candidate, or of the anchor's own score.

    Results that can be compared need no such score, unless the configuration names one.
    """
    align = config.align
    drawn = max(getattr(align, "max_new_tokens", 0), config.evaluate.max_new_tokens)
    named = getattr(align, "score", "auto") not in ("auto", "agreement") or getattr(align, "validate_by", "") == "score"
    return drawn if reads_results(config.data) and not named else max(drawn, config.student.max_anchor_tokens)


def check_scoring(config: Config, encoder: Encoder, run: RunDir) -> None:
    """Check that the student can score as `align.score` asks, and that the method can learn from such scores.

    A run that is in Stage II keeps the groups that it began with, because their keys can no longer change.

    Raises:
        UserError: its tokenizer does not spell numbers as `expected` needs, the run has no check of answers, which
            `agreement` needs, or groups would be weighed by positives that such scores do not have, or hold an anchor
            that such scores put far above all candidates.
    """
    if not isinstance(config.align, SelfScoringSettings):
        return
    scorer = find_scorer(config.align.score)
    if scorer.check is not None:
        scorer.check(encoder, find_comparison(config.data))
    if not scorer.has_own_unit or "align" in run.begun_stages():
        return
    if isinstance(config.align, LdlGrpo) and config.align.group_weight == "positives":
        raise UserError(
            "align.group_weight=positives weighs a group by its candidates that score as the anchor does, and with "
            f"align.score={config.align.score} the anchor's own score lies far above all of them, so that no group "
            "would count; set align.group_weight=equal, or align.score=agreement or expected."
        )
    if config.align.anchor_joins:
        raise UserError(
            "align.anchor_in_group gives the anchor the label of its own score, and with "
            f"align.score={config.align.score} that can be the whole of D, far above all candidates; leave it out, or "
            "set align.score=agreement or expected."
        )


def check_local_models(config: Config) -> None:
    """Check that the models of a local teacher or judge are on this machine.

    Raises:
        UserError: one is neither a model directory nor in the local cache.
    """
    for key, client in (("teacher.model", config.teacher), ("evaluate.judge.model", config.evaluate.judge)):
        if isinstance(client, LocalModel):
            check_model_directory(client.model, key)


def check_judging(config: Config, pools: PromptPools, run: RunDir) -> None:
    """Check that the teacher's cap on calls covers a stage in which it judges every candidate.

    Raises:
        UserError: it does not. The cost in tokens is not known before candidates are drawn.
    """
    if not isinstance(config.align, TeacherJudgeGrpo) or not isinstance(config.teacher, OpenAIEndpoint):
        return
    anchors = len(pools.train)
    if isinstance(config.evaluate.opponent, TeacherAnchors):
        anchors += len(pools.held_out)
    calls = config.align.groups_drawn(len(split_of_run(config, pools, run).training)) * config.align.drawn
    cap = config.teacher.max_calls
    if cap is not None and calls + anchors > cap:
        raise UserError(
            f"align.method {config.align.method} asks the teacher {anchors:,} prompts and about {calls:,} candidates, "
            f"and teacher.max_calls is {cap:,}; raise it, or lower align.steps, align.prompts_per_step or "
            "align.candidates."
        )


def check_ledger(config: Config, run: RunDir) -> None:
    """Check that the calls which a run has made are in its ledger: by the ledger's own mark, and by what it collected.

    Raises:
        UserError: the ledger is missing, empty, damaged or older; the message says what to do.
    """
    check_not_lost(run.ledger)
    recorded = 0
    if not is_blank(run.ledger):
        with LedgerView(run.ledger) as view:
            recorded = int(view.totals("teacher")["calls"])
    made = _teacher_calls(config, run)
    if recorded < made:
        raise UserError(describe_lost_calls(run.ledger, recorded, made))


def _teacher_calls(config: Config, run: RunDir) -> int:
    """Return how many calls to the teacher the run's other files speak of, at least."""
    facts = run.finished_stages().get("anchors")
    if facts is not None:  # the calls for shared anchors are in the ledger of the run that bought them
        return 0 if "shared_from" in facts else int(facts["teacher"]["calls"])
    return 0 if isinstance(config.teacher, AnswerFile) or not is_blank(run.ledger) else len(read_rows(run.anchors))

"""The stages of a run, each a function that returns the facts for the manifest.

Stages talk to each other through the run directory alone, so each can be run again by itself. `pipeline` decides which
of them run; `evaluate` holds the evaluation stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from purld import ranks
from purld.clients.base import Client
from purld.clients.open import open_client
from purld.config.clients import TeacherAnchors
from purld.config.methods import StageTwoSettings, TeacherJudgeGrpo
from purld.pipeline.context import RunContext, examples_of_pool, open_ledger
from purld.pipeline.evaluate import SPEND_KEYS
from purld.pipeline.probe import begun_scale, weak_signal_warnings
from purld.pipeline.stage_two_split import split_stage_two
from purld.pipeline.teacher_answers import ask_for_anchors, buy_opponent, submit_together
from purld.pipeline.validation import make_validation_set
from purld.runs.files import write_rows
from purld.runs.shortfalls import as_facts, describe_shortfalls
from purld.tasks.checks import find_comparison
from purld.training.context import Progress, StageContext


def run_anchors(context: RunContext) -> dict[str, Any]:
    """Ask the teacher once for each prompt, and for each held-out one if it is the opponent."""
    config, run = context.config, context.run
    with open_ledger(run, context.reporter) as ledger:
        submit_together(context, ledger)
        anchors, shortfalls = ask_for_anchors(context, ledger)
        if isinstance(config.evaluate.opponent, TeacherAnchors):
            shortfalls += buy_opponent(context, ledger)
        booked = ledger.totals("teacher")
    write_rows(run.anchors, [anchor.to_row() for anchor in anchors])
    for sentence in describe_shortfalls(run, "anchors", shortfalls):
        context.reporter.warn(sentence)
    totals = {"prompts": len(context.pools.train), "answered": len(anchors)}
    spent = {key: booked[key] for key in SPEND_KEYS}
    return {"pool": context.pools.fingerprint, "teacher": totals | spent} | as_facts(shortfalls)


def run_sft(context: RunContext) -> dict[str, Any]:
    """Fine-tune the student on the anchors (Stage I)."""
    from purld.training.sft import fine_tune

    config, reporter = context.config, context.reporter
    with reporter.progress("steps") as progress:
        facts = fine_tune(
            _training_context(context, progress), config.sft, examples_of_pool(context.run, context.pools.sft)
        )
    reporter.say(
        f"Trained on {facts.trained_on} anchors, validated on {facts.validated_on}; "
        f"kept the model of step {facts.best_step} of {facts.steps}."
    )
    for warning in facts.warnings:
        reporter.warn(warning)
    if facts.anchors_cut:
        limit = config.student.max_anchor_tokens
        reporter.say(f"{facts.anchors_cut} anchors were cut at {limit} tokens (student.max_anchor_tokens).")
    return asdict(facts)


def run_align(context: RunContext) -> dict[str, Any]:
    """Align p_sft by the configuration's method (Stage II)."""
    from purld.training.align import align

    config, reporter = context.config, context.reporter
    assert isinstance(config.align, StageTwoSettings)
    if config.set_aside:
        reporter.say(config.set_aside)
    probe, begun = ranks.on_first(
        lambda: (context.run.finished_stages().get("probe"), context.run.begin_facts("align"))
    )
    scale, split = begun_scale(config.align, probe, begun), split_stage_two(config, context.pools, begun)
    with _judging_teacher(context) as teacher, reporter.progress("steps") as progress:
        training = _training_context(context, progress)
        examples = examples_of_pool(context.run, split.training)
        validation = make_validation_set(context, split.steps, split.answer_tokens)
        facts = align(training, config.align, examples, teacher, margin_scale=scale, validation=validation)
    drawn = f", {facts.candidates} candidates drawn" if facts.candidates else ""
    reporter.say(f"{facts.steps} steps over {facts.prompts} prompts{drawn}.")
    if facts.gain is not None:
        reporter.say(facts.gain.describe())
    if facts.validation is not None:
        reporter.say(facts.validation.describe())
    if facts.thinking:
        reporter.say(f"{facts.thinking} candidates have thinking before their answer; only answers were scored.")
    warnings = [*weak_signal_warnings(probe), *facts.warnings]
    for warning in warnings:
        reporter.warn(warning)
    return asdict(facts) | {"warnings": warnings, "margin_scale": scale}


def _training_context(context: RunContext, progress: Progress) -> StageContext:
    config = context.config
    return StageContext(
        config.student,
        context.encoder,
        context.run,
        config.seed,
        progress,
        config.report_to,
        find_comparison(config.data),
    )


@contextlib.contextmanager
def _judging_teacher(context: RunContext) -> Iterator[Client | None]:
    """Open the teacher as scorer of candidates, in rank 0, for the method that pays for it; None for the others."""
    settings, teacher = context.config.align, context.config.teacher
    if not isinstance(settings, TeacherJudgeGrpo) or not ranks.is_first():
        yield None
        return
    with open_ledger(context.run, context.reporter) as ledger:
        # One call at a time: a step of training cannot wait for a batch.
        short = teacher.model_copy(update={"max_tokens_per_answer": settings.max_tokens_per_score, "batch": False})
        yield open_client(short, ledger, "scorer", context.resend_unknown)


def run_report(context: RunContext) -> dict[str, Any]:
    """Write the run's report."""
    from purld.report.page import write_report

    write_report([context.run], context.run.report)
    return {}

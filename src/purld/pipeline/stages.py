"""What each stage of a run does; each returns the facts that the manifest keeps of it.

Stages speak to each other through the run directory alone, so each can be run again alone. When they run, and in
which order, is `purld.pipeline.pipeline`'s business.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purld.clients.anchors import CollectedAnchors, collect_anchors
from purld.clients.base import Client, ReplyState
from purld.clients.ledger import Ledger, LedgerView, Role
from purld.clients.open import open_client
from purld.config.methods import StageTwoSettings, TeacherJudgeGrpo
from purld.config.schema import Config, OpenAIEndpoint, Teacher, TeacherAnchors
from purld.display.progress import Reporter
from purld.evaluation.answers import answer_prompts
from purld.evaluation.diagnostics import mean_label_divergence
from purld.evaluation.score_quality import accuracy_by_step, check_groups, quality_as_results, score_quality
from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.evaluation.verdicts import collect_verdicts
from purld.methods.table import METHODS
from purld.model.encode import Encoder
from purld.model.load import load_model
from purld.model.sample import Decoding
from purld.pipeline.prompt_pools import PromptPools
from purld.records import Anchor, Generation, Prompt
from purld.runs.files import read_rows, write_json, write_rows
from purld.runs.run_dir import RunDir
from purld.tasks.checks import Check
from purld.templates import JUDGE_VERSION, RATING_VERSION, SELF_EVALUATION_VERSION

_SPENT = ("calls", "input_tokens", "output_tokens", "cost")  # what results.json says of the teacher's bill


@dataclass(frozen=True)
class StageContext:
    """What a stage works with.

    Attributes:
        config: the validated configuration.
        run: where everything is kept.
        reporter: told what happens.
        encoder: the student's tokenizer with the run's conventions.
        check: says whether an answer is right; None if no accuracy is to be reported.
        pools: the prompts.
        resend_unknown: ask again what may have been billed without an answer arriving.
    """

    config: Config
    run: RunDir
    reporter: Reporter
    encoder: Encoder
    check: Check | None
    pools: PromptPools
    resend_unknown: bool


def run_anchors(job: StageContext) -> dict[str, Any]:
    """The teacher's one answer to each prompt, and to the held-out ones where it is the opponent."""
    config, run = job.config, job.run
    with Ledger(run.ledger, run.ledgers_beside()) as ledger:
        collection = _ask_teacher(job, ledger, "teacher", job.pools.train, "answers")
        if isinstance(config.evaluate.opponent, TeacherAnchors):
            opponent = _ask_teacher(job, ledger, "opponent", job.pools.held_out, "held-out prompts answered")
            write_rows(run.opponent, map(asdict, opponent.anchors))
        booked = ledger.totals("teacher")
        for path in ledger.passed_over:
            job.reporter.warn(f"{path}: cannot be read, so what it holds may have been bought again.")
    write_rows(run.anchors, map(asdict, collection.anchors))
    totals = {"prompts": len(job.pools.train), "answered": len(collection.anchors)}
    spent = {key: booked[key] for key in _SPENT}
    return {"pool": job.pools.fingerprint, "teacher": totals | spent}


def _ask_teacher(job: StageContext, ledger: Ledger, role: Role, prompts: list[Prompt], what: str) -> CollectedAnchors:
    teacher = job.config.teacher
    client = open_client(teacher, ledger, role, job.resend_unknown)
    with job.reporter.progress(what) as progress:

        def on_progress(counts: Counter[ReplyState]) -> None:
            progress(counts.total(), len(prompts), _standing(counts, ledger, role, teacher))

        collection = collect_anchors(prompts, client, job.config.anchors, on_progress)
    job.reporter.say(f"{what.capitalize()}: {collection.summary()}.")
    return collection


def _standing(counts: Counter[ReplyState], ledger: Ledger, role: Role, teacher: Teacher) -> str:
    """How a collection stands: each state by its count, calls in flight, and what was spent."""
    words = [f"{n:,} {state}" for state, n in counts.items() if n]
    if isinstance(teacher, OpenAIEndpoint):
        spent = ledger.settled(role)
        priced = teacher.input_price or teacher.output_price
        words.append(f"{ledger.under_way(role)} in flight")
        words.append(f"{spent.cost:,.4f} spent" if priced else f"{spent.tokens:,} tokens spent")
    return ", ".join(words)


def run_sft(job: StageContext) -> dict[str, Any]:
    """Stage I on the anchors."""
    from purld.training.sft import fine_tune

    config, run, reporter = job.config, job.run, job.reporter
    with reporter.progress("steps") as progress:
        facts = fine_tune(
            config.student,
            config.sft,
            _examples(run, job.pools.sft),
            job.encoder,
            run,
            config.seed,
            progress,
            config.report_to,
        )
    reporter.say(
        f"Trained on {facts.trained_on} anchors, validated on {facts.validated_on}; "
        f"kept the model of step {facts.best_step} of {facts.steps}."
    )
    if facts.anchors_cut:
        limit = config.student.max_anchor_tokens
        reporter.say(f"{facts.anchors_cut} anchors were cut at {limit} tokens (student.max_anchor_tokens).")
    return asdict(facts)


def run_align(job: StageContext) -> dict[str, Any]:
    """Stage II by the configuration's method."""
    from purld.training.align import align

    config, run, reporter = job.config, job.run, job.reporter
    assert isinstance(config.align, StageTwoSettings)
    if config.set_aside:
        reporter.say(config.set_aside)
    with _judging_teacher(job) as teacher, reporter.progress("steps") as progress:
        facts = align(
            config.student,
            config.align,
            _examples(run, job.pools.align),
            job.encoder,
            run,
            config.seed,
            progress,
            config.report_to,
            teacher,
        )
    drawn = f", {facts.candidates} candidates drawn" if facts.candidates else ""
    reporter.say(f"{facts.steps} steps over {facts.prompts} prompts{drawn}.")
    for warning in facts.warnings:
        reporter.warn(warning)
    return asdict(facts)


@contextlib.contextmanager
def _judging_teacher(job: StageContext) -> Iterator[Client | None]:
    """The teacher as the judge of candidates, for the one method that pays for it."""
    settings, teacher = job.config.align, job.config.teacher
    if not isinstance(settings, TeacherJudgeGrpo):
        yield None
        return
    with Ledger(job.run.ledger) as ledger:
        short = teacher.model_copy(update={"max_tokens_per_answer": settings.max_tokens_per_score})
        yield open_client(short, ledger, "scorer", job.resend_unknown)


def _examples(run: RunDir, pool: list[Prompt]) -> list[tuple[Prompt, Anchor]]:
    """The prompts of a stage that have an anchor, in the pool's order."""
    anchors = {row["prompt_id"]: Anchor(row["prompt_id"], row["text"]) for row in read_rows(run.anchors)}
    return [(p, anchors[p.id]) for p in pool if p.id in anchors]


def run_evaluate(job: StageContext) -> dict[str, Any]:
    """Held-out answers of every model of the run, checked and judged, and results.json."""
    config, run = job.config, job.run
    places: dict[str, str | Path] = {"base": config.student.model, "sft": run.sft}
    if METHODS[config.align.method].stage_two is not None:
        places[config.align.method] = run.align
    opponents = _opponents(job)
    models = {name: _answers(job, name, place) for name, place in places.items()}
    if config.evaluate.judge is not None:
        models = _judged(job, models, opponents)
    finished, groups = run.finished(), read_rows(run.groups)
    results = {
        "method": config.align.method,
        "seed": config.seed,
        "teacher": _teacher_spend(job),
        "models": {name: model_metrics(m, opponents, config.seed) for name, m in models.items()},
        "difference": _compared(models, opponents, config.seed),
        **_stage_two_checked(job, groups),
        "label_divergence": mean_label_divergence(groups, read_rows(run.revisited)),
        "seconds": {stage: facts["seconds"] for stage, facts in finished.items()},
        "templates": {
            "self_evaluation": SELF_EVALUATION_VERSION,
            "rating": RATING_VERSION,
            "judge": JUDGE_VERSION,
        },
    }
    write_json(run.results, {key: value for key, value in results.items() if value != {}})
    return {}


def _teacher_spend(job: StageContext) -> dict[str, Any]:
    """What training took of the teacher: the anchors, and the scores of candidates where it gave them."""
    spend: dict[str, Any] = job.run.finished()["anchors"]["teacher"]
    if not isinstance(job.config.align, TeacherJudgeGrpo):
        return spend
    with LedgerView(job.run.ledger) as ledger:
        scores = ledger.totals("scorer")
    return spend | {key: spend[key] + scores[key] for key in _SPENT}


def _stage_two_checked(job: StageContext, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stage II's candidates against gold: how many were right at each step, and how well scores agree with it."""
    if job.check is None:
        return {}
    groups = check_groups(rows, job.pools.align, job.check)
    found: dict[str, Any] = {"training_accuracy": accuracy_by_step(groups)} if groups else {}
    if any(score is not None for group in groups for score in group.scores):
        found["score_quality"] = quality_as_results(score_quality(groups, job.config.seed))
    return found


def _compared(models: dict[str, EvaluatedModel], opponents: dict[str, str], seed: int) -> dict[str, Any]:
    """The aligned model against p_sft, and p_sft against the base."""
    names = list(models)[::-1]
    pairs = {f"{a} - {b}": model_difference(models[a], models[b], opponents, seed) for a, b in pairwise(names)}
    return {pair: found for pair, found in pairs.items() if found}


def _answers(job: StageContext, name: str, place: str | Path) -> EvaluatedModel:
    """One model's answers: drawn as configured, and greedy ones beside them where gold can check both."""
    config, run = job.config, job.run
    settings, check = config.evaluate, job.check
    model: list[Any] = []

    def load() -> Any:
        if not model:
            model.append(load_model(config.student, place))
        return model[0]

    def drawn(decoding: Decoding, samples: int, path: Path) -> list[Generation]:
        with job.reporter.progress(f"{name}: prompts answered") as progress:
            return answer_prompts(
                load,
                job.pools.held_out,
                job.encoder,
                decoding,
                samples,
                settings.batch_size,
                config.seed,
                path,
                check,
                progress,
            )

    decoding = Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)
    path, greedy_path = run.generations(name), run.generations(f"{name}.greedy")
    generations = drawn(decoding, settings.samples, path)
    if check is None:
        return EvaluatedModel(generations)
    correct = _correct(path, settings.samples)
    if settings.temperature == 0:  # they are greedy already, and several of a prompt are one
        return EvaluatedModel(generations, correct, correct[:, :1])
    drawn(Decoding(0.0, settings.max_new_tokens), 1, greedy_path)
    return EvaluatedModel(generations, correct, _correct(greedy_path, 1))


def _correct(path: Path, samples: int) -> NDArray[np.bool_]:
    """(prompts, samples) whether each answer is right."""
    return np.array([row["correct"] for row in read_rows(path)], dtype=bool).reshape(-1, samples)


def _opponents(job: StageContext) -> dict[str, str]:
    """The opponent's answers to the held-out prompts, by prompt id."""
    opponent = job.config.evaluate.opponent
    if opponent is None:
        return {}
    if not isinstance(opponent, TeacherAnchors):
        with Ledger(job.run.ledger) as ledger:
            replies = open_client(opponent, ledger, "opponent").ask(job.pools.held_out)
        found = [(p.id, r.text) for p, r in zip(job.pools.held_out, replies) if r.text is not None]
        write_rows(job.run.opponent, ({"prompt_id": i, "text": text} for i, text in found))
    return {row["prompt_id"]: row["text"] for row in read_rows(job.run.opponent)}


def _judged(
    job: StageContext, models: dict[str, EvaluatedModel], opponents: dict[str, str]
) -> dict[str, EvaluatedModel]:
    """The models with a judge's verdicts on their first sample of each prompt."""
    run = job.run
    first = {name: [g for g in model.generations if g.sample == 0] for name, model in models.items()}
    with Ledger(run.ledger, run.ledgers_beside()) as ledger:
        verdicts = collect_verdicts(
            job.config.evaluate,
            job.pools.held_out,
            first,
            opponents,
            ledger,
            run.to_judge,
            job.reporter.progress,
            job.resend_unknown,
        )
    for name, found in verdicts.items():
        write_rows(run.verdicts(name), map(asdict, found))
    return {name: replace(model, verdicts=verdicts[name]) for name, model in models.items()}


def run_report(job: StageContext) -> dict[str, Any]:
    """The run's page."""
    from purld.report.page import write_report

    write_report([job.run], job.run.report)
    return {}

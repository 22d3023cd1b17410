"""The evaluation stage: answers of every model of a run, checked and judged, and results.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from purld import ranks
from purld.clients.answer_file import AnswerFileClient
from purld.clients.ledger import LedgerView
from purld.config.clients import AnswerFile, TeacherAnchors
from purld.config.methods import TeacherJudgeGrpo
from purld.errors import UserError
from purld.evaluation.answers import answer_prompts
from purld.evaluation.diagnostics import mean_label_divergence
from purld.evaluation.doubts import result_doubts
from purld.evaluation.recorded import read_recorded_answers
from purld.evaluation.score_quality import accuracy_by_step, check_groups, quality_as_results, score_quality
from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.evaluation.verdicts import collect_verdicts
from purld.model.load import load_model
from purld.model.sample import Decoding
from purld.model.samplers import make_sampler
from purld.pipeline.context import RunContext, open_ledger
from purld.pipeline.self_comparison import compare_by_own_score, find_slice, why_not_compared
from purld.pipeline.teacher_answers import complete_opponent, read_opponent, write_opponent
from purld.records import Anchor, Generation, Prompt
from purld.runs.files import read_rows, write_json, write_rows
from purld.runs.open import final_model
from purld.runs.results import training_warnings
from purld.runs.shortfalls import CapShortfall, as_facts, describe_shortfalls, find_shortfalls
from purld.templates import IN_CONTEXT_VERSION, JUDGE_VERSION, RATING_VERSION, SELF_EVALUATION_VERSION
from purld.thinking import split_thinking

SPEND_KEYS = ("calls", "input_tokens", "output_tokens", "cost")  # of the teacher's bill, in results.json


def run_evaluate(context: RunContext) -> dict[str, Any]:
    """Answer the held-out prompts with every model of the run, check and judge the answers, write results.json.

    The ranks of a job share the drawing and the scoring; rank 0 does the rest.
    """
    config, run = context.config, context.run
    final = final_model(config.align.method)
    folders: dict[str, str | Path] = {"base": config.student.model, "sft": run.sft, final.name: final.folder(run)}
    opponents, shortfalls = ranks.on_first(lambda: _opponent_answers(context))
    models = {name: _model_answers(context, name, folder) for name, folder in folders.items()}
    compared = _self_comparison(context, folders, models)
    return ranks.on_first(lambda: _write_results(context, models, opponents, compared, shortfalls))


def _write_results(
    context: RunContext,
    models: dict[str, EvaluatedModel],
    opponents: dict[str, str],
    compared: dict[str, Any],
    shortfalls: list[CapShortfall],
) -> dict[str, Any]:
    """Judge the answers, if the configuration says so, write results.json, and return the facts of the stage."""
    config, run = context.config, context.run
    if config.evaluate.judge is not None:
        models = _add_verdicts(context, models, opponents)
        shortfalls = [*shortfalls, *_unasked_questions(config.evaluate.judge, models)]
    finished, groups = run.finished_stages(), read_rows(run.groups)
    seconds = {stage: facts["seconds"] for stage, facts in finished.items() if stage != "report"}
    results = {
        "method": config.align.method,
        "seed": config.seed,
        "teacher": _teacher_spend(context),
        "models": {name: model_metrics(m, opponents, config.seed) for name, m in models.items()},
        "difference": _model_differences(models, opponents, config.seed),
        "validation": finished.get("align", {}).get("validation") or {},  # which step was kept, and why
        **_candidates_against_gold(context, groups),
        "self_comparison": compared,
        "probe": _probe_results(finished.get("probe")),
        "label_divergence": mean_label_divergence(groups, read_rows(run.revisited)),
        "seconds": seconds | {"evaluate": round(run.seconds_spent("evaluate"), 3)},  # all but writing this file
        "templates": {
            "self_evaluation": SELF_EVALUATION_VERSION,
            "rating": RATING_VERSION,
            "judge": JUDGE_VERSION,
            "in_context": IN_CONTEXT_VERSION,
        },
    }
    greedy = context.check is not None or config.evaluate.temperature == 0
    kind = "greedy answers" if greedy else "drawn answers"
    doubts = [
        *describe_shortfalls(run, "evaluate", shortfalls),
        *result_doubts(results, _shown_answers(context, models), kind, config.evaluate),
        *([] if compared else why_not_compared(context)),
    ]
    for doubt in doubts:
        context.reporter.warn(doubt)
    results["warnings"] = [*training_warnings(finished), *doubts]
    write_json(run.results, {key: value for key, value in results.items() if value not in ({}, [])})
    return as_facts(shortfalls)


def _self_comparison(
    context: RunContext, folders: dict[str, str | Path], models: dict[str, EvaluatedModel]
) -> dict[str, Any]:
    """Compare the models by p_sft's own scores, in a run that has neither gold nor a judge."""
    chosen = ranks.on_first(lambda: find_slice(context))
    if chosen is None:
        return {}
    if chosen.held_out:
        drawn = {name: model.generations for name, model in models.items()}
    else:
        settings = context.config.evaluate
        decoding = Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)
        drawn = {
            name: _draw_answers(
                context, name, _loader(context, folder), chosen.prompts, decoding, 1, f"{name}.validation"
            )
            for name, folder in folders.items()
        }
    first = {name: {g.prompt_id: g for g in rows if g.sample == 0} for name, rows in drawn.items()}
    return compare_by_own_score(context, chosen, first)


def _probe_results(probe: dict[str, Any] | None) -> dict[str, Any]:
    """Return what results.json keeps of the probe; all of it, with the time it took, is in probe.json."""
    if probe is None:
        return {}
    scorers = [{key: value for key, value in row.items() if key != "seconds_per_group"} for row in probe["scorers"]]
    return {"prompts": probe["prompts"], "chosen": probe["chosen"], "verdict": probe["verdict"], "scorers": scorers}


def _shown_answers(context: RunContext, models: Iterable[str]) -> dict[str, list[str]]:
    """Return by model its greedy answers, or the drawn ones where no greedy ones were asked for."""
    recorded = {name: read_recorded_answers(context.run, name) for name in models}
    return {name: [row["text"] for row in (answers.greedy or answers.drawn)] for name, answers in recorded.items()}


def _teacher_spend(context: RunContext) -> dict[str, Any]:
    """Return what training cost at the teacher: the anchors, and the scores of candidates if it gave them."""
    spend: dict[str, Any] = context.run.finished_stages()["anchors"]["teacher"]
    if not isinstance(context.config.align, TeacherJudgeGrpo):
        return spend
    with LedgerView(context.run.ledger) as ledger:
        scores = ledger.totals("scorer")
    return spend | {key: spend[key] + scores[key] for key in SPEND_KEYS}


def _candidates_against_gold(context: RunContext, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare Stage II's candidates with gold: the share of right ones at each step, and how well scores agree."""
    if context.check is None:
        return {}
    groups = check_groups(rows, context.pools.align, context.check)
    measured: dict[str, Any] = {"training_accuracy": accuracy_by_step(groups)} if groups else {}
    if any(score is not None for group in groups for score in group.scores):
        measured["score_quality"] = quality_as_results(score_quality(groups, context.config.seed))
    return measured


def _model_differences(models: dict[str, EvaluatedModel], opponents: dict[str, str], seed: int) -> dict[str, Any]:
    """Compare the aligned model with p_sft, and p_sft with the base."""
    names = list(models)[::-1]
    pairs = {f"{a} - {b}": model_difference(models[a], models[b], opponents, seed) for a, b in pairwise(names)}
    return {pair: difference for pair, difference in pairs.items() if difference}


def _model_answers(context: RunContext, name: str, folder: str | Path) -> EvaluatedModel:
    """Draw one model's answers as configured, and greedy ones as well if there is gold to check them."""
    settings, held_out = context.config.evaluate, context.pools.held_out
    load = _loader(context, folder)
    decoding = Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)
    _draw_answers(context, name, load, held_out, decoding, settings.samples, name)
    if context.check is not None and settings.temperature > 0:  # else the drawn answers are greedy already
        greedy = Decoding(0.0, settings.max_new_tokens)
        _draw_answers(context, name, load, held_out, greedy, 1, f"{name}.greedy")
    return read_recorded_answers(context.run, name).to_evaluated_model()


def _loader(context: RunContext, folder: str | Path) -> Callable[[], Any]:
    """Return a function that loads a model when it is first called."""
    return lru_cache(maxsize=1)(partial(load_model, context.config.student, folder))


def _draw_answers(
    context: RunContext,
    name: str,
    load: Callable[[], Any],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    samples: int,
    file: str,
) -> list[Generation]:
    """Draw one model's answers to prompts, or read those that are on disk, in the generations file of that name."""
    config = context.config
    with context.reporter.progress(f"{name}: prompts answered") as progress:
        return answer_prompts(
            load,
            prompts,
            context.encoder,
            make_sampler(config.student, context.encoder, context.run.engine_files, decoding),
            samples,
            config.evaluate.batch_size,
            config.seed,
            context.run.generations(file),
            context.check,
            progress,
        )


def _opponent_answers(context: RunContext) -> tuple[dict[str, str], list[CapShortfall]]:
    """Return the opponent's answers to the held-out prompts, by prompt id, and what caps left unasked."""
    opponent, shortfalls = context.config.evaluate.opponent, list[CapShortfall]()
    if opponent is None:
        return {}, shortfalls
    if isinstance(opponent, TeacherAnchors):
        with open_ledger(context.run, context.reporter) as ledger:
            shortfalls = complete_opponent(context, ledger)
    else:
        write_opponent(context, _answers_in_file(opponent, context.pools.held_out))
    return read_opponent(context.run), shortfalls


def _answers_in_file(file: AnswerFile, prompts: Sequence[Prompt]) -> list[Anchor]:
    """Return the opponent's answers in a file.

    Raises:
        UserError: the file cannot be read, or answers none of the prompts.
    """
    replies = AnswerFileClient(file).ask(prompts)
    answers = [
        Anchor(prompt.id, split_thinking(reply.text).answer)
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.text is not None
    ]
    if not answers:
        raise UserError(
            f"{file.path}: answers none of the {len(prompts)} held-out prompts ({replies[0].detail}), so there is "
            "nothing for the judge to compare with; give another evaluate.opponent."
        )
    return answers


def _add_verdicts(
    context: RunContext, models: dict[str, EvaluatedModel], opponents: dict[str, str]
) -> dict[str, EvaluatedModel]:
    """Add a judge's verdicts on each model's first sample of each prompt."""
    run = context.run
    first = {name: [g for g in model.generations if g.sample == 0] for name, model in models.items()}
    with open_ledger(run, context.reporter) as ledger:
        verdicts = collect_verdicts(
            context.config.evaluate,
            context.pools.held_out,
            first,
            opponents,
            ledger,
            run.to_judge,
            context.reporter.progress,
            context.resend_unknown,
        )
    for name, rows in verdicts.items():
        write_rows(run.verdicts(name), map(asdict, rows))
    return {name: replace(model, verdicts=verdicts[name]) for name, model in models.items()}


def _unasked_questions(judge: object, models: Mapping[str, EvaluatedModel]) -> list[CapShortfall]:
    """Return which caps left questions to the judge unasked."""
    questions = [verdict for model in models.values() for verdict in model.verdicts if verdict.asked]
    return find_shortfalls("judge", Counter(verdict.reason for verdict in questions), judge, len(questions))

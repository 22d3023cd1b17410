"""The stages in order: what is done, what is left, and what each hands to the next.

Stages speak to each other through the run directory alone, so each can be run again alone. A stage that the
manifest calls finished is skipped; a configuration that contradicts what a run has already done is refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from purld.blackbox.clients import Client, ReplyState, open_client
from purld.blackbox.collect import Collection, collect_anchors
from purld.blackbox.ledger import PURSES, Ledger, LedgerView, Role
from purld.checks import find_check, missing_gold
from purld.config import Config, OpenAIEndpoint, StageTwo, Teacher, TeacherAnchors, TeacherJudgeGrpo, load_config
from purld.console import Reporter
from purld.errors import UserError
from purld.evaluation.evaluate import answer_prompts
from purld.evaluation.scores import accuracy_by_step, as_results, checked_groups, score_quality
from purld.evaluation.summary import Evaluated, difference, model_metrics
from purld.evaluation.verdicts import collect_verdicts
from purld.method.table import METHODS
from purld.pools import Pools, load_pools
from purld.records import Anchor, Generation, Prompt
from purld.rundir import RunDir, atomic_write, read_rows, stopwatch, write_json, write_rows
from purld.student.encode import Encoder
from purld.student.load import context_length, load_model, load_tokenizer, save_model
from purld.student.sample import Decoding
from purld.templates import JUDGE_VERSION, RATING_VERSION, SELF_EVALUATION_VERSION
from purld.training.trackers import check_trackers, tracked

STAGES = ("anchors", "sft", "align", "evaluate", "report")

_TITLES = {
    "anchors": "Anchors: one teacher answer per prompt",
    "sft": "Stage I: SFT on the anchors",
    "align": "Stage II: alignment",
    "evaluate": "Evaluation on held-out prompts",
    "report": "Report",
}
# The first stage that each section of the configuration touches.
_FIRST_STAGE = {
    "student": "anchors",
    "data": "anchors",
    "teacher": "anchors",
    "anchors": "anchors",
    "seed": "anchors",
    "sft": "sft",
    "align": "align",
    "evaluate": "evaluate",
}
# How a model is reached and what it may cost can change at any time: no answer depends on it.
TRANSPORT = frozenset(
    {
        "base_url",
        "api_key_env",
        "api_key_file",
        "max_calls",
        "max_tokens",
        "max_cost",
        "input_price",
        "output_price",
        "concurrency",
        "timeout",
        "retries",
        "requests_per_minute",
        "tokens_per_minute",
    }
)
# Words of the self-evaluation and chat templates around question, anchor and candidate, generously.
_TEMPLATE_TOKENS = 256


class Pipeline:
    """One run: a configuration, the directory it lives in, and whom to tell.

    Args:
        config: the validated configuration.
        run: the run's directory; created when the first stage starts.
        reporter: told what happens.
        resend_unknown: ask again what may have been billed without an answer arriving.

    Raises:
        UserError: the student's tokenizer, a tracker or a library for the check is missing, or the lengths do not
            fit its context.
    """

    def __init__(self, config: Config, run: RunDir, reporter: Reporter, resend_unknown: bool = False) -> None:
        self.config = config
        self.run = run
        self.reporter = reporter
        self.resend_unknown = resend_unknown
        self.encoder = Encoder(load_tokenizer(config.student), config.student.max_anchor_tokens)
        self.check = find_check(config.data)
        check_trackers(config.report_to)
        check_context(config)

    def execute(self, stages: Sequence[str] = STAGES) -> None:
        """Run the given stages in order, skipping what is finished.

        Raises:
            UserError: the input, the configuration or an earlier stage does not allow it.
        """
        pools = load_pools(self.config, self.encoder, self.reporter.say)
        check_judging(self.config, pools)
        if missing := missing_gold(self.config.data, pools.held_out):
            raise UserError(missing)
        with self.run.lock():
            self._adopt_config()
            self._check_pools(pools)
            for stage in stages:
                self._execute(stage, pools)

    def _execute(self, stage: str, pools: Pools) -> None:
        if not self._takes_part(stage):
            return
        if stage in self.run.finished() and not self._again(stage):
            self.reporter.say(f"{_TITLES[stage]}: done before.")
            return
        for earlier in STAGES[: STAGES.index(stage)]:
            if self._takes_part(earlier) and earlier not in self.run.finished():
                raise UserError(f"{self.run.path}: stage {earlier} is not finished; run `purld {earlier}` first.")
        self.run.begin(stage)
        self.reporter.headline(_TITLES[stage])
        with stopwatch() as seconds, tracked(self.config.report_to, self.run, stage):
            facts = _RUNNERS[stage](self, pools)
        self.run.finish(stage, seconds[0], **facts)

    def _again(self, stage: str) -> bool:
        """Whether a finished stage runs again: a report always, anchors to resend what was lost, until trained on."""
        return stage == "report" or (stage == "anchors" and self.resend_unknown and "sft" not in self.run.begun())

    def _takes_part(self, stage: str) -> bool:
        return stage != "align" or METHODS[self.config.align.method].stage_two is not None

    def _adopt_config(self) -> None:
        """Write config.yaml, or see that it agrees with the one this run began with."""
        new = self.config.model_dump(mode="json")
        if self.run.config.exists():
            old = yaml.safe_load(self.run.config.read_text(encoding="utf-8"))
            begun = self.run.begun()
            for key, before, after in _differences(old, new):
                section, *_, leaf = key.split(".")
                if section != "report_to" and _FIRST_STAGE[section] in begun and leaf not in TRANSPORT:
                    raise UserError(
                        f"{self.run.path} holds a run with {key}: {before}, and now it is {after}; "
                        "give this one another --run-dir."
                    )
        with atomic_write(self.run.config) as handle:
            yaml.safe_dump(new, handle, sort_keys=False)

    def _check_pools(self, pools: Pools) -> None:
        done = self.run.finished().get("anchors")
        if done and done["pool"] != pools.fingerprint:
            raise UserError(
                f"{self.run.path}: the prompts of {self.config.data.source} have changed since this run's anchors "
                "were collected; give the new ones another --run-dir."
            )


def check_context(config: Config) -> None:
    """See that the longest self-evaluation fits the student's context.

    Raises:
        UserError: it does not; names the keys to lower.
    """
    context = context_length(config.student)
    lengths = config.student.max_prompt_tokens + config.student.max_anchor_tokens + _TEMPLATE_TOKENS
    lengths += max(getattr(config.align, "max_new_tokens", 0), config.evaluate.max_new_tokens)
    if context is not None and lengths > context:
        raise UserError(
            f"student.max_prompt_tokens, student.max_anchor_tokens and max_new_tokens add up to {lengths} tokens "
            f"with the self-evaluation template, more than the {context} that {config.student.model} reads; "
            "lower one of them."
        )


def check_judging(config: Config, pools: Pools) -> None:
    """See that the teacher's cap on calls covers a stage in which it judges every candidate.

    Raises:
        UserError: it does not; what tokens will cost is not known before they are drawn.
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


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The keys, as dotted paths, in which two configurations differ, with both values."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(prefix, old, new)]
    keys = [*old, *(key for key in new if key not in old)]
    return [
        found
        for key in keys
        for found in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    ]


# --- the stages -------------------------------------------------------------------------------------------


def _collect(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    """The teacher's one answer to each prompt, and to the held-out ones where it is the opponent."""
    config, run = pipeline.config, pipeline.run
    with Ledger(run.ledger, run.ledgers_beside()) as ledger:
        collection = _ask_teacher(pipeline, ledger, "teacher", pools.train, "answers")
        if isinstance(config.evaluate.opponent, TeacherAnchors):
            opponent = _ask_teacher(pipeline, ledger, "opponent", pools.held_out, "held-out prompts answered")
            write_rows(run.opponent, map(asdict, opponent.anchors))
        booked = ledger.totals("teacher")
        for path in ledger.passed_over:
            pipeline.reporter.warn(f"{path}: cannot be read, so what it holds may have been bought again.")
    write_rows(run.anchors, map(asdict, collection.anchors))
    totals = {"prompts": len(pools.train), "answered": len(collection.anchors)}
    spent = {key: booked[key] for key in ("calls", "input_tokens", "output_tokens", "cost")}
    return {"pool": pools.fingerprint, "teacher": totals | spent}


def _ask_teacher(pipeline: Pipeline, ledger: Ledger, role: Role, prompts: list[Prompt], what: str) -> Collection:
    teacher = pipeline.config.teacher
    client = open_client(teacher, ledger, role, pipeline.resend_unknown)
    with pipeline.reporter.progress(what) as progress:

        def on_progress(counts: Counter[ReplyState]) -> None:
            progress(counts.total(), len(prompts), _standing(counts, ledger, role, teacher))

        collection = collect_anchors(prompts, client, pipeline.config.anchors, on_progress)
    pipeline.reporter.say(f"{what.capitalize()}: {collection.summary()}.")
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


def _sft(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    from purld.training.sft import fine_tune

    config, run, reporter = pipeline.config, pipeline.run, pipeline.reporter
    with reporter.progress("steps") as progress:
        facts = fine_tune(
            config.student,
            config.sft,
            _examples(run, pools.sft),
            pipeline.encoder,
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


def _align(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    from purld.training.align import align

    config, run, reporter = pipeline.config, pipeline.run, pipeline.reporter
    assert isinstance(config.align, StageTwo)
    with _judging_teacher(pipeline) as teacher, reporter.progress("steps") as progress:
        facts = align(
            config.student,
            config.align,
            _examples(run, pools.align),
            pipeline.encoder,
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
def _judging_teacher(pipeline: Pipeline) -> Iterator[Client | None]:
    """The teacher as the judge of candidates, for the one method that pays for it."""
    settings, teacher = pipeline.config.align, pipeline.config.teacher
    if not isinstance(settings, TeacherJudgeGrpo):
        yield None
        return
    with Ledger(pipeline.run.ledger) as ledger:
        short = teacher.model_copy(update={"max_tokens_per_answer": settings.max_tokens_per_score})
        yield open_client(short, ledger, "scorer", pipeline.resend_unknown)


def _examples(run: RunDir, pool: list[Prompt]) -> list[tuple[Prompt, Anchor]]:
    """The prompts of a stage that have an anchor, in the pool's order."""
    anchors = {row["prompt_id"]: Anchor(row["prompt_id"], row["text"]) for row in read_rows(run.anchors)}
    return [(p, anchors[p.id]) for p in pool if p.id in anchors]


def _evaluate(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    config, run = pipeline.config, pipeline.run
    places: dict[str, str | Path] = {"base": config.student.model, "sft": run.sft}
    if METHODS[config.align.method].stage_two is not None:
        places[config.align.method] = run.align
    opponents = _opponents(pipeline, pools)
    models = {name: _answers(pipeline, pools, name, place) for name, place in places.items()}
    if config.evaluate.judge is not None:
        models = _judged(pipeline, pools, models, opponents)
    finished = run.finished()
    results = {
        "method": config.align.method,
        "seed": config.seed,
        "teacher": _teacher_spend(pipeline),
        "models": {name: model_metrics(m, opponents, config.seed) for name, m in models.items()},
        "difference": _compared(models, opponents, config.seed),
        **_stage_two_checked(pipeline, pools),
        "seconds": {stage: facts["seconds"] for stage, facts in finished.items()},
        "templates": {
            "self_evaluation": SELF_EVALUATION_VERSION,
            "rating": RATING_VERSION,
            "judge": JUDGE_VERSION,
        },
    }
    write_json(run.results, {key: value for key, value in results.items() if value != {}})
    return {}


def _teacher_spend(pipeline: Pipeline) -> dict[str, Any]:
    """What training took of the teacher: the anchors, and the scores of candidates where it gave them."""
    spend: dict[str, Any] = pipeline.run.finished()["anchors"]["teacher"]
    if not isinstance(pipeline.config.align, TeacherJudgeGrpo):
        return spend
    with LedgerView(pipeline.run.ledger) as ledger:
        scores = ledger.totals("scorer")
    return spend | {key: spend[key] + scores[key] for key in ("calls", "input_tokens", "output_tokens", "cost")}


def _stage_two_checked(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    """Stage II's candidates against gold: how many were right at each step, and how well scores agree with it."""
    if pipeline.check is None:
        return {}
    groups = checked_groups(read_rows(pipeline.run.groups), pools.align, pipeline.check)
    found: dict[str, Any] = {"training_accuracy": accuracy_by_step(groups)} if groups else {}
    if any(score is not None for group in groups for score in group.scores):
        found["score_quality"] = as_results(score_quality(groups, pipeline.config.seed))
    return found


def _compared(models: dict[str, Evaluated], opponents: dict[str, str], seed: int) -> dict[str, Any]:
    """The aligned model against p_sft, and p_sft against the base."""
    names = list(models)[::-1]
    pairs = {f"{a} - {b}": difference(models[a], models[b], opponents, seed) for a, b in pairwise(names)}
    return {pair: found for pair, found in pairs.items() if found}


def _answers(pipeline: Pipeline, pools: Pools, name: str, place: str | Path) -> Evaluated:
    """One model's answers: drawn as configured, and greedy ones beside them where gold can check both."""
    config, run = pipeline.config, pipeline.run
    settings, check = config.evaluate, pipeline.check
    model: list[Any] = []

    def load() -> Any:
        if not model:
            model.append(load_model(config.student, place))
        return model[0]

    def drawn(decoding: Decoding, samples: int, path: Path) -> list[Generation]:
        with pipeline.reporter.progress(f"{name}: prompts answered") as progress:
            return answer_prompts(
                load,
                pools.held_out,
                pipeline.encoder,
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
        return Evaluated(generations)
    if settings.temperature > 0:
        drawn(Decoding(0.0, settings.max_new_tokens), 1, greedy_path)
    else:
        greedy_path = path
    return Evaluated(generations, _correct(path, settings.samples), _correct(greedy_path, 1))


def _correct(path: Path, samples: int) -> Any:
    return np.array([row["correct"] for row in read_rows(path)], dtype=bool).reshape(-1, samples)


def _opponents(pipeline: Pipeline, pools: Pools) -> dict[str, str]:
    """The opponent's answers to the held-out prompts, by prompt id."""
    opponent = pipeline.config.evaluate.opponent
    if opponent is None:
        return {}
    if not isinstance(opponent, TeacherAnchors):
        with Ledger(pipeline.run.ledger) as ledger:
            replies = open_client(opponent, ledger, "opponent").ask(pools.held_out)
        found = [(p.id, r.text) for p, r in zip(pools.held_out, replies) if r.text is not None]
        write_rows(pipeline.run.opponent, ({"prompt_id": i, "text": text} for i, text in found))
    return {row["prompt_id"]: row["text"] for row in read_rows(pipeline.run.opponent)}


def _judged(
    pipeline: Pipeline, pools: Pools, models: dict[str, Evaluated], opponents: dict[str, str]
) -> dict[str, Evaluated]:
    """The models with a judge's verdicts on their first sample of each prompt."""
    run = pipeline.run
    first = {name: [g for g in model.generations if g.sample == 0] for name, model in models.items()}
    with Ledger(run.ledger, run.ledgers_beside()) as ledger:
        verdicts = collect_verdicts(
            pipeline.config.evaluate,
            pools.held_out,
            first,
            opponents,
            ledger,
            run.to_judge,
            pipeline.reporter.progress,
            pipeline.resend_unknown,
        )
    for name, found in verdicts.items():
        write_rows(run.verdicts(name), map(asdict, found))
    return {name: replace(model, verdicts=verdicts[name]) for name, model in models.items()}


def _report(pipeline: Pipeline, pools: Pools) -> dict[str, Any]:
    from purld.report.page import write_report

    write_report([pipeline.run], pipeline.run.report)
    return {}


_RUNNERS: dict[str, Callable[[Pipeline, Pools], dict[str, Any]]] = {
    "anchors": _collect,
    "sft": _sft,
    "align": _align,
    "evaluate": _evaluate,
    "report": _report,
}


# --- a finished run -----------------------------------------------------------------------------------------


def export_model(run_path: Path, out: Path | None, stage: str) -> Path:
    """Write the model of `align` or `sft` as one directory that any server loads, adapters merged.

    Raises:
        UserError: `run_path` holds no run, or the stage is not finished.
    """
    run, config = open_run(run_path)
    if stage not in ("sft", "align"):
        raise UserError(f"--stage {stage}: it can be align or sft.")
    if stage not in run.finished():
        raise UserError(f"{run_path}: stage {stage} is not finished, so there is no model of it to export.")
    source = run.sft if stage == "sft" else run.align
    target = out or run.path / "export"
    save_model(load_model(config.student, source), load_tokenizer(config.student), target)
    return target


def report_runs(run_paths: Sequence[Path], out: Path | None) -> Path:
    """Write one page about the given runs: to `out`, or beside a single run, or here.

    Raises:
        UserError: a path is no run directory, or a file of a run is damaged.
    """
    from purld.report.page import write_report

    runs = [open_run(path)[0] for path in run_paths]
    target = out or (runs[0].report if len(runs) == 1 else Path(runs[0].report.name))
    write_report(runs, target)
    return target


def ledger_totals(run_path: Path, export_to: Path | None) -> list[dict[str, Any]]:
    """What each role has cost, one row a role; with `export_to`, every request and answer as JSONL.

    A run that is under way is only looked at.

    Raises:
        UserError: `run_path` holds no ledger.
    """
    run, _ = open_run(run_path)
    if not run.ledger.exists():
        raise UserError(f"{run_path}: there is no ledger; nothing was asked of a model over a network.")
    with LedgerView(run.ledger) as ledger:
        if export_to:
            ledger.export(export_to)
        totals = [{"role": role} | ledger.totals(role) for role in PURSES]
    return [row for row in totals if row["role"] != "scorer" or row["prompts"]]


def open_run(run_path: Path) -> tuple[RunDir, Config]:
    """A run that exists, and its configuration.

    Raises:
        UserError: `run_path` is no run directory.
    """
    run = RunDir(run_path)
    if not run.config.exists():
        raise UserError(f"{run_path}: is not a run directory; it holds no config.yaml.")
    return run, load_config(run.config)

"""Two finished runs against each other: their final models' answers to the same held-out prompts.

The question is always "is A better than B", so everything is paired by prompt: answers against gold, verdicts
against a common opponent, and, if asked for, the two models' answers against each other before a judge. Nothing
is drawn again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from purld.clients.ledger import Ledger
from purld.config.schema import TRANSPORT, Config
from purld.display.progress import Reporter
from purld.display.results import signed_difference
from purld.display.titles import METRIC_TITLES, model_title
from purld.errors import UserError
from purld.evaluation.summary import EvaluatedModel, model_difference, model_metrics
from purld.evaluation.verdicts import collect_verdicts
from purld.methods.table import METHODS
from purld.model.load import load_encoder
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.records import Generation, Prompt, Verdict
from purld.report.headline import compared_models
from purld.runs.files import read_rows
from purld.runs.open import open_run
from purld.runs.run_dir import RunDir

_DRAWING = ("samples", "temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class ComparedModel:
    """One run's final model and its answers, in the order of its held-out prompts."""

    run: RunDir
    config: Config
    model: str
    answers: EvaluatedModel

    @property
    def name(self) -> str:
        """What the comparison calls it."""
        return f"{self.run.path.resolve().name} ({model_title(self.model)})"

    @property
    def prompt_ids(self) -> list[str]:
        """The held-out prompts."""
        return list(dict.fromkeys(g.prompt_id for g in self.answers.generations))


@dataclass(frozen=True)
class Comparison:
    """A minus B.

    Attributes:
        a, b: the names of both sides.
        n: prompts.
        metrics: each side's own numbers, named as in results.json.
        difference: A's numbers minus B's, paired, named likewise.
        head_to_head: A's win rates against B's answers; empty if no judge was asked.
        notes: what keeps the two from being compared, or clouds it, a sentence each.
    """

    a: str
    b: str
    n: int
    metrics: tuple[dict[str, Any], dict[str, Any]]
    difference: dict[str, Any]
    head_to_head: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_runs(path_a: Path, path_b: Path, judge: bool, reporter: Reporter) -> Comparison:
    """Compare the final models of two runs.

    Args:
        path_a, path_b: run directories.
        judge: ask A's judge about A's answers against B's; the calls go to A's ledger, under its caps.
        reporter: told what happens.

    Raises:
        UserError: a run is missing or not evaluated, the held-out prompts differ, or A has no judge to ask.
    """
    a, b = _side(path_a), _side(path_b)
    b = _aligned(a, b)
    opponents, notes = _common_opponent(a, b)
    if not opponents:
        a, b = (replace(side, answers=replace(side.answers, verdicts=())) for side in (a, b))
    seed = a.config.seed
    return Comparison(
        a=a.name,
        b=b.name,
        n=len(a.prompt_ids),
        metrics=(model_metrics(a.answers, opponents, seed), model_metrics(b.answers, opponents, seed)),
        difference=model_difference(a.answers, b.answers, opponents, seed),
        head_to_head=_head_to_head(a, b, reporter) if judge else {},
        notes=(*_drawn_differently(a, b), *notes),
    )


def print_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print a comparison as a table and the sentences that belong to it."""
    console = console or Console(highlight=False)
    console.print(f"A: {found.a}\nB: {found.b}\n{found.n} held-out prompts, with 95% intervals.\n", markup=False)
    table = Table("", "A", "B", "A minus B", "p", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for key, label in METRIC_TITLES.items():
        if key in found.difference:
            p_value = found.difference.get(f"{key}_p")
            table.add_row(
                label,
                *(f"{metrics[key]:.3f}" for metrics in found.metrics),
                signed_difference(found.difference, key),
                "" if p_value is None else f"{p_value:.3g}",
            )
    if table.row_count:
        console.print(table)
        console.print()
    for line in [*_conclusions(found), *found.notes]:
        console.print(line, soft_wrap=True, markup=False)


def _conclusions(found: Comparison) -> list[str]:
    sentence = compared_models(("A", "B"), found.metrics, found.difference)
    lines = [] if sentence is None else [sentence.text]
    if "accuracy_p" in found.difference or "greedy_accuracy_p" in found.difference:
        lines.append("p is McNemar's, exact and two-sided.")
    met = found.head_to_head
    if "win_rate" in met:
        low, high = met["win_rate_ci"]
        lc_low, lc_high = met["lc_win_rate_ci"]
        flips = f", {met['flip_rate']:.0%} of the pairs changed with the order" if "flip_rate" in met else ""
        lines.append(
            f"Head to head A wins {met['win_rate']:.3f} [{low:.3f}, {high:.3f}], length-controlled "
            f"{met['lc_win_rate']:.3f} [{lc_low:.3f}, {lc_high:.3f}]; {met['unjudged']} verdicts unjudged{flips}."
        )
    elif met:
        lines.append(f"Head to head the judge gave no verdict ({met['unjudged']} unjudged).")
    if not found.difference and not met:
        lines.append("Nothing that both runs measured can be compared; --judge asks A's judge about the answers.")
    return lines


def _side(path: Path) -> ComparedModel:
    run, config = open_run(path)
    if "evaluate" not in run.finished():
        raise UserError(f"{path}: stage evaluate is not finished; run `purld evaluate` first.")
    model = config.align.method if METHODS[config.align.method].stage_two else "sft"
    return ComparedModel(run, config, model, read_evaluated(run, model))


def read_evaluated(run: RunDir, model: str) -> EvaluatedModel:
    """One model's answers as its run left them on disk, prompt by prompt.

    Raises:
        UserError: a file is damaged.
    """
    rows, greedy = read_rows(run.generations(model)), read_rows(run.generations(f"{model}.greedy"))
    names = [f.name for f in fields(Generation)]
    generations = [Generation(**{name: row[name] for name in names}) for row in rows]
    single = len({g.prompt_id for g in generations}) == len(generations)
    return EvaluatedModel(
        generations,
        _correct(rows),
        _correct(greedy or (rows if single else [])),
        [Verdict(**row) for row in read_rows(run.verdicts(model))],
    )


def _correct(rows: Sequence[dict[str, Any]]) -> Any:
    """(prompts, samples) whether each answer is right; None if that was not checked."""
    if not rows or any("correct" not in row for row in rows):
        return None
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row["correct"])
    return np.array(list(by_prompt.values()), dtype=bool)


def _aligned(a: ComparedModel, b: ComparedModel) -> ComparedModel:
    """B with its prompts in A's order."""
    ours, theirs = a.prompt_ids, b.prompt_ids
    if set(ours) != set(theirs):
        raise UserError(
            f"{b.run.path}: its held-out prompts are not those of {a.run.path} "
            f"({len(set(ours) - set(theirs))} are missing, {len(set(theirs) - set(ours))} are others), "
            "so the two cannot be compared."
        )
    place_a, place_b = ({prompt_id: n for n, prompt_id in enumerate(ids)} for ids in (ours, theirs))
    order = [place_b[prompt_id] for prompt_id in ours]
    found = b.answers
    return replace(
        b,
        answers=replace(
            found,
            generations=sorted(found.generations, key=lambda g: (place_a[g.prompt_id], g.sample)),
            correct=None if found.correct is None else found.correct[order],
            greedy_correct=None if found.greedy_correct is None else found.greedy_correct[order],
        ),
    )


def _common_opponent(a: ComparedModel, b: ComparedModel) -> tuple[dict[str, str], list[str]]:
    """The opponent's answers if both were judged against the same by the same judge, or why not."""
    if not a.answers.verdicts or not b.answers.verdicts:
        return {}, []
    answers, others = ({row["prompt_id"]: row["text"] for row in read_rows(side.run.opponent)} for side in (a, b))
    if answers != others:
        return {}, ["Their win rates are not compared: they were judged against different opponents."]
    if _judge(a) != _judge(b):
        return {}, ["Their win rates are not compared: they were judged by different judges."]
    return answers, []


def _judge(side: ComparedModel) -> dict[str, Any]:
    """What a verdict depends on: the judge, but not how it is reached, and how it is asked."""
    settings = side.config.evaluate.model_dump(mode="json", include={"judge", "judge_retries", "both_orders"})
    settings["judge"] = {key: value for key, value in settings["judge"].items() if key not in TRANSPORT}
    return settings


def _drawn_differently(a: ComparedModel, b: ComparedModel) -> list[str]:
    pairs = {key: (getattr(a.config.evaluate, key), getattr(b.config.evaluate, key)) for key in _DRAWING}
    differing = [f"evaluate.{key} {ours} and {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    return [f"Note that the answers were drawn with different settings: {', '.join(differing)}."] if differing else []


def _head_to_head(a: ComparedModel, b: ComparedModel, reporter: Reporter) -> dict[str, Any]:
    """A's first answers against B's, as A's judge sees them."""
    if a.config.evaluate.judge is None:
        raise UserError(f"{a.run.path}: its configuration names no judge (evaluate.judge), so there is none to ask.")
    theirs = {g.prompt_id: g.text for g in b.answers.generations if g.sample == 0}
    ours = [g for g in a.answers.generations if g.sample == 0]
    with a.run.lock(), Ledger(a.run.ledger) as ledger:
        verdicts = collect_verdicts(
            a.config.evaluate,
            _held_out(a),
            {a.model: ours},
            theirs,
            ledger,
            a.run.to_judge,
            reporter.progress,
        )[a.model]
    judged = model_metrics(replace(a.answers, verdicts=verdicts), theirs, a.config.seed)
    names = ("judged", "unjudged", "flip_rate", "win_rate", "win_rate_ci", "lc_win_rate", "lc_win_rate_ci")
    return {name: judged[name] for name in names if name in judged}


def _held_out(side: ComparedModel) -> list[Prompt]:
    encoder = load_encoder(side.config.student)
    pools = load_prompt_pools(side.config, encoder, lambda line: None)
    known = {prompt.id for prompt in pools.held_out}
    if not known.issuperset(side.prompt_ids):
        raise UserError(
            f"{side.config.data.source}: the held-out prompts have changed since {side.run.path} was evaluated, "
            "so its judge cannot be shown the questions."
        )
    return pools.held_out

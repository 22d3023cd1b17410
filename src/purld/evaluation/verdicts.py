"""Collect a judge's verdicts on several models. The judge is an endpoint, a local model or a file.

A file of verdicts is an answer file whose rows answer the judge's questions with A, B or T. People write it, or a model
that this machine cannot reach. The questions are known only after the models have answered, so the ones that the file
does not answer are written to `to_judge.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from purld.clients.batch import BatchClient
from purld.clients.ledger import Ledger
from purld.clients.open import open_client
from purld.config.clients import AnswerFile, FileColumns
from purld.config.schema import Evaluate
from purld.data.chat import readable_text
from purld.errors import UserError
from purld.evaluation.judge import Progress, judge_answers, judge_questions
from purld.records import Generation, Prompt, Verdict
from purld.runs.files import write_rows

WatchProgress = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display under a title."""


def collect_verdicts(
    settings: Evaluate,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Generation]],
    opponents: Mapping[str, str],
    ledger: Ledger,
    to_judge: Path,
    watch: WatchProgress,
    resend_unknown: bool = False,
) -> dict[str, list[Verdict]]:
    """Return the verdicts on every model's answers against the opponent's, by model.

    Args:
        settings: the section `evaluate` of the configuration, with a judge.
        prompts: the held-out prompts.
        answers: the answers to judge, by model.
        opponents: the opponent's answers by prompt id.
        ledger: the ledger that books the judge's calls.
        to_judge: where to write the questions that a file of verdicts does not answer.
        watch: opens a progress display.
        resend_unknown: send again requests that may have been billed although no answer arrived.

    Raises:
        UserError: the judge cannot be asked, or the file of verdicts does not answer all questions.
        ValueError: the settings name no judge.
    """
    judge = settings.judge
    if judge is None:
        raise ValueError("the settings name no judge")
    retries = settings.judge_retries
    if isinstance(judge, AnswerFile):
        _check_coverage(judge, _first_questions(settings, prompts, answers, opponents), ledger, to_judge)
        retries = 0  # a file gives the same reply every time
    displays = list[Progress]()
    client = open_client(judge, ledger, "judge", resend_unknown, lambda *state: displays[-1](*state))
    if isinstance(client, BatchClient):  # the first questions about all models at once
        client.submit(_first_questions(settings, prompts, answers, opponents))
    verdicts = {}
    for model, generations in answers.items():
        with watch(f"{model}: answers judged") as progress:
            displays.append(progress)
            verdicts[model] = judge_answers(
                prompts, generations, opponents, client, settings.both_orders, retries, progress
            )
    return verdicts


def _first_questions(
    settings: Evaluate,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Generation]],
    opponents: Mapping[str, str],
) -> list[Prompt]:
    """Return the questions about the answers of every model, without those that ask again after a bad reply."""
    return [
        question
        for generations in answers.values()
        for question in judge_questions(prompts, generations, opponents, settings.both_orders)
    ]


def _check_coverage(judge: AnswerFile, questions: Sequence[Prompt], ledger: Ledger, to_judge: Path) -> None:
    """Raise a UserError if the file does not answer all questions, after writing those it lacks to `to_judge`."""
    distinct = list(dict.fromkeys(questions))
    missing = distinct
    if Path(judge.path).exists():
        replies = open_client(judge, ledger, "judge").ask(distinct)
        missing = [question for question, reply in zip(distinct, replies, strict=True) if reply.text is None]
    if not missing:
        to_judge.unlink(missing_ok=True)
        return
    columns = judge.columns
    write_rows(to_judge, [_question_row(question, columns) for question in missing])
    raise UserError(
        f"{judge.path}: has no verdict on {len(missing)} of {len(distinct)} pairs; they are in {to_judge}: put A, B or "
        f"T into {columns.answer!r} of each row, add the rows to {judge.path}, and run the same command again."
    )


def _question_row(question: Prompt, columns: FileColumns) -> dict[str, Any]:
    """Return the row that asks for a verdict; the answered row is matched by its id."""
    row: dict[str, Any] = {columns.id: question.id, "question": readable_text(question.question), columns.answer: None}
    if question.images:
        row["images"] = [image.path or image.digest for image in question.images]
    return row

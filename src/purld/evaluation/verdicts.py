"""A judge's verdicts on several models, from wherever the judge is: an endpoint, this machine, or a file.

A file of verdicts is an answer file whose rows answer the judge's questions with A, B or T: by people, or by a
model that this machine cannot reach. Which questions those are is known once the models have answered, so what
the file lacks is written out for whoever fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from purld.clients.ledger import Ledger
from purld.clients.open import open_client
from purld.config.schema import AnswerFile, Evaluate, FileColumns
from purld.data.chat import readable_text
from purld.errors import UserError
from purld.evaluation.judge import Progress, judge_answers, judge_questions
from purld.records import Generation, Prompt, Verdict
from purld.runs.files import write_rows

Watch = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress display under a title."""


def collect_verdicts(
    settings: Evaluate,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Generation]],
    opponents: Mapping[str, str],
    ledger: Ledger,
    to_judge: Path,
    watch: Watch,
    resend_unknown: bool = False,
) -> dict[str, list[Verdict]]:
    """The verdicts on every model's answers against the opponent's, by model.

    Args:
        settings: `evaluate` of the configuration, with a judge.
        prompts: the held-out prompts.
        answers: by model, the answers to judge.
        opponents: the opponent's answers by prompt id.
        ledger: where the judge's calls are booked.
        to_judge: where to write the questions that a file of verdicts lacks.
        watch: shows progress.
        resend_unknown: ask again what may have been billed without an answer arriving.

    Raises:
        UserError: the judge cannot be asked, or a file of verdicts does not cover all questions.
        ValueError: the settings name no judge.
    """
    judge = settings.judge
    if judge is None:
        raise ValueError("there is no judge to ask")
    retries = settings.judge_retries
    if isinstance(judge, AnswerFile):
        asked = [q for a in answers.values() for q in judge_questions(prompts, a, opponents, settings.both_orders)]
        _check_coverage(judge, asked, ledger, to_judge)
        retries = 0  # a file says the same however often it is asked
    client = open_client(judge, ledger, "judge", resend_unknown)
    verdicts = {}
    for model, generations in answers.items():
        with watch(f"{model}: answers judged") as progress:
            verdicts[model] = judge_answers(
                prompts, generations, opponents, client, settings.both_orders, retries, progress
            )
    return verdicts


def _check_coverage(judge: AnswerFile, questions: Sequence[Prompt], ledger: Ledger, to_judge: Path) -> None:
    """Write out the questions without a row in the file, and refuse to go on without them."""
    distinct = list(dict.fromkeys(questions))
    missing = distinct
    if Path(judge.path).exists():
        replies = open_client(judge, ledger, "judge").ask(distinct)
        missing = [question for question, reply in zip(distinct, replies, strict=True) if reply.text is None]
    if not missing:
        to_judge.unlink(missing_ok=True)
        return
    columns = judge.columns
    write_rows(to_judge, [_to_judge(question, columns) for question in missing])
    raise UserError(
        f"{judge.path}: has no verdict on {len(missing)} of {len(distinct)} pairs; they are in {to_judge}: put A, B or "
        f"T into {columns.answer!r} of each row, add the rows to {judge.path}, and run the same command again."
    )


def _to_judge(question: Prompt, columns: FileColumns) -> dict[str, Any]:
    """The row that asks for a verdict; it is found again by its id."""
    row: dict[str, Any] = {columns.id: question.id, "question": readable_text(question.question), columns.answer: None}
    if question.images:
        row["images"] = [image.path or image.digest for image in question.images]
    return row

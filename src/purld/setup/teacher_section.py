"""Write the section `teacher` of a first configuration, for each kind of teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from purld.clients.answer_file import AnswerFileClient
from purld.config.clients import AnswerFile
from purld.errors import UserError
from purld.records import Prompt
from purld.setup.data_survey import FileSurvey, survey_file
from purld.setup.draft import Draft
from purld.setup.questions import (
    Interview,
    TeacherKind,
    Wishes,
    clean_amount,
    clean_key_variable,
    clean_text,
    usual_key_variable,
)
from purld.setup.render_yaml import render_yaml

_ANSWER_TOKENS = 1024  # the default limit of an answer
_JUDGE_TOKENS, _JUDGE_CALLS = 4, 1000


@dataclass(frozen=True)
class TeacherContext:
    """What the section of the teacher is made of.

    Attributes:
        address: the file, directory or address of the teacher.
        file: what the file of prompts holds.
        prompts: the prompts.
        wishes: what the user has said.
        interview: asks for the rest.
    """

    address: str
    file: FileSurvey
    prompts: Sequence[Prompt]
    wishes: Wishes
    interview: Interview


def put_teacher(draft: Draft, kind: TeacherKind, context: TeacherContext) -> None:
    """Add the section `teacher`, and how to add a judge.

    Raises:
        UserError: an answer is missing or cannot be used, or a file of answers answers no prompt.
    """
    put = {"same file": _put_own_answers, "file": _put_file, "local": _put_local, "openai": _put_endpoint}[kind]
    put(draft, context)
    if kind == "openai" and not draft.get("evaluate.judge"):
        draft.append("evaluate", _judge_hint(draft))


def _put_own_answers(draft: Draft, context: TeacherContext) -> None:
    draft.put("teacher.kind", "file", "answers that you have; nothing is sent")
    if context.file.answer and context.file.answer != "answer":
        draft.put("teacher.columns", {"answer": context.file.answer})


def _put_file(draft: Draft, context: TeacherContext) -> None:
    path, count = context.address, len(context.prompts)
    survey = survey_file(Path(path), draft.get("teacher.format") or "auto", draft.get("teacher.columns.prompt"))
    columns = {"prompt": survey.prompt or "prompt", "answer": survey.answer or "answer"}
    columns |= draft.columns("teacher")
    draft.put("teacher.kind", "file", "answers that you have; nothing is sent")
    draft.put("teacher.path", path)
    draft.replace("teacher.columns", {key: column for key, column in columns.items() if column != key})
    teacher = draft.read("the configuration").teacher
    if not isinstance(teacher, AnswerFile):
        return  # as the user wants it
    answered = sum(reply.text is not None for reply in AnswerFileClient(teacher).ask(context.prompts))
    if not answered:
        read = ", ".join(f"{key}: {column}" for key, column in columns.items())
        raise UserError(f"--teacher: {path} answers none of the {count:,} prompts; its columns are read as {read}.")
    draft.comments["teacher.path"] = f"answers {answered:,} of {count:,} prompts"


def _put_local(draft: Draft, context: TeacherContext) -> None:
    draft.put("teacher.kind", "local", "a model on this machine; nothing is sent")
    draft.put("teacher.model", context.address)
    draft.put("teacher.max_tokens_per_answer", _ANSWER_TOKENS, "a longer answer is cut, and not used")


def _put_endpoint(draft: Draft, context: TeacherContext) -> None:
    """Add an endpoint, with hard caps on what it may cost."""
    wishes, interview = context.wishes, context.interview
    draft.put("teacher.kind", "openai", "an OpenAI-compatible endpoint")
    draft.put("teacher.base_url", context.address)
    if draft.get("teacher.model") is None:
        question = "The teacher's name at that endpoint"
        name = interview.answer(wishes.teacher_model, "--teacher-model", question, clean_text("--teacher-model"))
        draft.put("teacher.model", name)
    if not {"api_key_env", "api_key_file"} & draft.values["teacher"].keys():
        variable = interview.answer(
            wishes.api_key_env,
            "--api-key-env",
            "Environment variable that holds the key (empty for none)",
            clean_key_variable,
            default=usual_key_variable(context.address),
        )
        if variable:
            draft.put("teacher.api_key_env", variable, "the variable's name; the key itself belongs in no file")
    draft.put("teacher.max_tokens_per_answer", _ANSWER_TOKENS, "a longer answer is cut, and not used")
    draft.put("teacher.max_calls", math.ceil(1.1 * len(context.prompts)) + 10, "a hard cap, retries included")
    _put_prices(draft, wishes, interview)


def _put_prices(draft: Draft, wishes: Wishes, interview: Interview) -> None:
    """Add prices and the cap on cost, which needs them."""
    questions = {
        "input_price": (wishes.input_price, "Price per million tokens of prompts (empty: not metered)"),
        "output_price": (wishes.output_price, "Price per million tokens of answers"),
        "max_cost": (wishes.max_cost, "Hard cap on the teacher's bill, in the same currency (empty: none)"),
    }
    if all(given is None for given, _ in questions.values()) and not usual_key_variable(draft.get("teacher.base_url")):
        return  # a server on this machine
    for key, (given, question) in questions.items():
        flag = f"--{key.replace('_', '-')}"
        written = None if given is None else str(given)
        amount = interview.answer(written, flag, question, clean_amount(flag), default="")
        if amount is not None:
            draft.put(f"teacher.{key}", amount, _PRICE_COMMENTS.get(key))
        elif key == "input_price" and wishes.output_price is None and wishes.max_cost is None:
            break  # not metered


_PRICE_COMMENTS = {
    "input_price": "per million tokens, as output_price",
    "max_cost": "a hard cap; the worst case of a call is reserved before it is sent",
}


def _judge_hint(draft: Draft) -> list[str]:
    """Return the lines that add a judge, which costs calls and is therefore left to the user."""
    keys = ("base_url", "model", "api_key_env", "input_price", "output_price")
    endpoint = {"kind": "openai"} | {key: draft.get(f"teacher.{key}") for key in keys if draft.get(f"teacher.{key}")}
    judge = {"judge": endpoint | {"max_tokens_per_answer": _JUDGE_TOKENS, "max_calls": _JUDGE_CALLS}}
    shown = render_yaml({**judge, "opponent": {"kind": "teacher"}}, {})
    opening = "With these lines a judge compares answers with the teacher's, in up to six calls a held-out prompt:"
    return [opening, *(line for line in shown.splitlines() if line)]

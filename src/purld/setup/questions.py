"""What a first configuration is made of, asked for where it is not given.

The name of a variable that holds a key is checked: a key typed in its place must end up in no file and no message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from purld.config.base import key_variable
from purld.errors import UserError
from purld.model.directory import check_model_directory

T = TypeVar("T")
Ask = Callable[[str, str | None], str]
"""Asks a question, with an answer that is taken where nothing is typed; None: there is none."""
Say = Callable[[str], None]

TeacherKind = Literal["same file", "file", "openai", "local"]
OWN_ANSWERS = "data"
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Wishes:
    """What the user has said; None for what is to be asked.

    Attributes:
        model: the student's directory or hub id.
        data: the file of prompts.
        teacher: `data` for the answers in that file, another file of answers, the address of an endpoint, or the
            directory of a local model.
        teacher_model: the endpoint's name of the model.
        api_key_env: the environment variable that holds the endpoint's key; empty for an endpoint without one.
        input_price: per million tokens of prompts.
        output_price: per million tokens of answers.
        max_cost: the cap on the teacher's whole bill.
        overrides: further keys to write, as `key.path=value`.
    """

    model: str | None = None
    data: str | None = None
    teacher: str | None = None
    teacher_model: str | None = None
    api_key_env: str | None = None
    input_price: float | None = None
    output_price: float | None = None
    max_cost: float | None = None
    overrides: Sequence[str] = ()


class Interview:
    """Takes each answer from a flag, or else asks for it, again and again until it can be used.

    Args:
        ask: asks at the terminal; None if there is none, and then a default is taken.
        say: says why an answer cannot be used.
    """

    def __init__(self, ask: Ask | None, say: Say) -> None:
        self._ask = ask
        self._say = say

    def answer(
        self, given: str | None, flag: str, question: str, use: Callable[[str], T], default: str | None = None
    ) -> T:
        """Return what `use` makes of an answer.

        Args:
            given: the flag's value; None if it was not given.
            flag: its name, for messages.
            question: what to ask.
            use: checks the answer.
            default: taken where nothing is typed, or where there is no terminal.

        Raises:
            UserError: the given value cannot be used, or there is none and no terminal to ask at.
        """
        if given is not None:
            return use(given)
        if self._ask is None:
            if default is None:
                raise UserError(f"{flag} is missing, and there is no terminal to ask at; give it as a flag.")
            return use(default)
        while True:
            try:
                return use(self._ask(question, default).strip())
            except UserError as problem:
                self._say(str(problem))


def clean_model(text: str) -> str:
    """Return a model directory or hub id that is there.

    Raises:
        UserError: it is not.
    """
    path = str(Path(text).expanduser()) if text.startswith("~") else text
    check_model_directory(path, "--model")
    return path


def clean_file(text: str) -> str:
    """Return the path of a file or folder that is there.

    Raises:
        UserError: it is not.
    """
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise UserError(f"--data: {text or 'nothing'} does not exist; give a file of prompts.")
    return str(path)


def clean_teacher(text: str, data: str, answers: str | None) -> tuple[TeacherKind, str]:
    """Return what a teacher is, and its path or address.

    Args:
        text: as the user wrote it.
        data: the file of prompts.
        answers: the column of answers in that file; None if there is none.

    Raises:
        UserError: it is none of the kinds of teachers.
    """
    path = Path(text).expanduser()
    if text == OWN_ANSWERS or (path.exists() and path.resolve() == Path(data).resolve()):
        if answers is None:
            raise UserError(
                f"--teacher: {data} has no column of answers; add teacher.columns.answer=NAME, or name another teacher."
            )
        return "same file", data
    if re.match(r"https?://", text):
        return "openai", re.sub(r"/chat/completions/*$", "", text.rstrip("/"))
    if path.is_dir() and (path / "config.json").exists():
        return "local", str(path)
    if path.exists():
        return "file", str(path)
    raise UserError(
        f"--teacher: {text or 'nothing'} is neither {OWN_ANSWERS!r} nor a file of answers nor a model directory nor an "
        "address that begins with http:// or https://."
    )


def clean_key_variable(text: str) -> str | None:
    """Return the name of an environment variable, or None for an empty text.

    Raises:
        UserError: it is no name of a variable, or looks like a key; the message does not repeat it.
    """
    if not text:
        return None
    try:
        return key_variable(text)
    except PydanticCustomError as error:
        raise UserError(f"{error.message()}.") from None


def usual_key_variable(base_url: str) -> str:
    """Return the variable that is proposed for an endpoint's key; empty for a server on this machine."""
    host = urlsplit(base_url).hostname or ""
    if host in _LOCAL_HOSTS:
        return ""
    return "OPENAI_API_KEY" if host == "api.openai.com" and "OPENAI_API_KEY" in os.environ else "TEACHER_API_KEY"


def clean_text(flag: str) -> Callable[[str], str]:
    """Return a function that refuses an empty answer to a flag's question."""

    def use(text: str) -> str:
        if not text:
            raise UserError(f"{flag}: nothing was given.")
        return text

    return use


def clean_amount(flag: str) -> Callable[[str], float | None]:
    """Return a function that reads an amount of money; None for an empty text."""

    def use(text: str) -> float | None:
        try:
            amount = float(text) if text else None
        except ValueError:
            amount = -1.0
        if amount is not None and not 0 <= amount < 1e9:
            raise UserError(f"{flag}: {text} is no amount of money.")
        return amount or None

    return use

"""Answers that were collected elsewhere: a file in the place of a model.

Nothing leaves this machine, so the ledger has no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from purld.blackbox.replies import OnReply, Reply
from purld.chats import parse_chat
from purld.config import AnswerFile, FileColumns
from purld.errors import UserError
from purld.records import Prompt
from purld.rows import BadRowError, Row, check_text, iter_rows

SEVERAL = "several rows of the answer file differ on this prompt; the first is used"
OTHER_PROMPT = "the row of the answer file with this id answers another prompt"


@dataclass(frozen=True)
class _Answer:
    text: str | None  # None: the row is there, its answer is not
    prompt_id: str | None
    contested: bool = False


class FileClient:
    """Finds a prompt's answer by the prompt itself, or else by its id; see `purld.blackbox.replies.Client`.

    The id is `metadata["id"]` or the content hash `Prompt.id`. A row with the right id and another prompt is
    not taken: ids repeat between data sets, and a wrong anchor is worse than none.

    Raises:
        UserError: the file cannot be read, lacks its columns, or holds a bad row.
    """

    def __init__(self, config: AnswerFile) -> None:
        self._by_prompt: dict[str, _Answer] = {}
        self._by_id: dict[str, _Answer] = {}
        rows = 0
        for row in iter_rows(config.path):
            rows += 1
            try:
                self._take(row, config.columns)
            except BadRowError as problem:
                raise UserError(f"{problem}.") from None
        if not rows:
            raise UserError(f"{config.path}: has no answers.")

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """See `Client.ask`: every reply is `answered` or `missing`."""
        replies = [self._reply(prompt) for prompt in prompts]
        for place, reply in enumerate(replies):
            if on_reply:
                on_reply(place, reply)
        return replies

    def _reply(self, prompt: Prompt) -> Reply:
        answer = self._by_prompt.get(prompt.id)
        for name in (_id_of(prompt.metadata.get("id")), prompt.id):
            if answer is None and name is not None:
                answer = self._by_id.get(name)
        if answer is None:
            return Reply("missing", detail="no row of the answer file matches")
        if answer.prompt_id not in (None, prompt.id):
            return Reply("missing", detail=OTHER_PROMPT)
        if answer.text is None:
            return Reply("missing", detail="the answer is empty")
        return Reply("answered", answer.text, detail=SEVERAL if answer.contested else "")

    def _take(self, row: Row, columns: FileColumns) -> None:
        cells = row.cells()
        if columns.answer not in cells:
            raise BadRowError(f"{row.place}: there is no column {columns.answer!r} for the answer (see columns.answer)")
        name, prompt_id = _id_of(cells.get(columns.id)), _prompt_of(cells, row, columns)
        if name is None and prompt_id is None:
            raise BadRowError(f"{row.place}: has neither {columns.id!r} nor {columns.prompt!r} to match a prompt by")
        answer = _Answer(_text_of(cells[columns.answer], row, columns), prompt_id)
        if prompt_id is not None:
            _add(self._by_prompt, prompt_id, answer)
        if name is not None:
            _add(self._by_id, name, answer)


def _add(answers: dict[str, _Answer], name: str, answer: _Answer) -> None:
    first = answers.setdefault(name, answer)
    if first.text is None:
        answers[name] = answer
    elif answer.text not in (None, first.text):
        answers[name] = _Answer(first.text, first.prompt_id, contested=True)


def _prompt_of(cells: Mapping[str, Any], row: Row, columns: FileColumns) -> str | None:
    if cells.get(columns.prompt) is None:
        return None
    try:
        return Prompt(parse_chat(cells[columns.prompt]).messages).id
    except ValueError as problem:
        raise BadRowError(f"{row.place}: column {columns.prompt!r} cannot be used: {problem}") from None


def _text_of(cell: object, row: Row, columns: FileColumns) -> str | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return check_text(cell, "it")
    except ValueError as problem:
        raise BadRowError(f"{row.place}: column {columns.answer!r} cannot be used: {problem}") from None


def _id_of(cell: object) -> str | None:
    """An id as text: 7 and "7" are the same."""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        return None
    return str(cell)

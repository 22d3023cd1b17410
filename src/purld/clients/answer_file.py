"""A client that takes its answers from a file instead of a model.

Nothing is sent, so nothing is recorded in the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from purld.clients.base import OnReply, Reply
from purld.config.clients import AnswerFile, FileColumns
from purld.config.schema import Columns
from purld.data.chat import (
    Chat,
    TurnTexts,
    images_in_column,
    insert_images,
    parse_chat,
    readable_text,
    turns_without_images,
)
from purld.data.files import BadRowError, FileRow, check_text
from purld.data.formats import read_formatted
from purld.data.images import ImageFolders, read_image
from purld.errors import UserError
from purld.records import Message, Prompt

CONFLICTING_ANSWERS = "several rows of the answer file differ on this prompt; the first is used"
SHARED_ID = "several prompts have the id of the answer's row, which has no prompt"
OTHER_PROMPT = "the row of the answer file with this id answers another prompt"
AMBIGUOUS_IMAGES = "prompts differ in their images alone, and the answer file names neither ids nor images"


@dataclass(frozen=True)
class _Answer:
    text: str | None  # None: the row has no answer
    prompt_id: str | None = None  # id of the row's prompt and images; None: the row has no prompt
    turn_texts: TurnTexts | None = None  # of a row without images, which may belong to a prompt with images
    conflicting: bool = False  # another row has a different answer

    def matches(self, prompt: Prompt) -> bool:
        """Return whether the row can belong to `prompt`."""
        if self.prompt_id in (None, prompt.id):
            return True
        return bool(prompt.images) and self.turn_texts == turns_without_images(prompt.messages)


class AnswerFileClient:
    """A client that finds a prompt's answer by the prompt's content, or else by its id.

    The id is `metadata["id"]` or the content hash `Prompt.id`. A row with a matching id and another prompt is not used,
    because ids repeat between data sets and a wrong anchor is worse than none. A row with neither id nor images answers
    a prompt with images if its text belongs to only one of them.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a bad row.
    """

    def __init__(self, config: AnswerFile) -> None:
        self._by_prompt: dict[str, _Answer] = {}
        self._by_id: dict[str, _Answer] = {}
        self._by_turn_texts: dict[TurnTexts, _Answer] = {}
        path = Path(config.path)
        self._folders = ImageFolders(path if path.is_dir() else path.parent, config.image_folder)
        columns = Columns(prompt=config.columns.prompt, images=config.columns.images)
        formatted = read_formatted(path, config.format, columns, config.columns.answer, "teacher")
        self._prompt_name = formatted.prompt_name
        rows = 0
        for row in formatted.rows:
            rows += 1
            try:
                self._add_row(row, config.columns)
            except BadRowError as problem:
                raise UserError(f"{problem}.") from None
        if not rows:
            raise UserError(f"{config.path}: has no answers.")

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; each is `answered` or `missing`. See `Client.ask`."""
        turn_texts = {prompt.id: turns_without_images(prompt.messages) for prompt in prompts if prompt.images}
        prompts_per_text = Counter(turn_texts.values())
        prompts_per_id = Counter(_parse_id(prompt.metadata.get("id")) for prompt in prompts)
        replies = [self._find_reply(prompt, prompts_per_text, prompts_per_id) for prompt in prompts]
        for index, reply in enumerate(replies):
            if on_reply:
                on_reply(index, reply)
        return replies

    def _find_reply(
        self, prompt: Prompt, prompts_per_text: Mapping[TurnTexts, int], prompts_per_id: Mapping[str | None, int]
    ) -> Reply:
        """Return the reply to a prompt, given the prompts with images by their text, and all by their ids."""
        answer = self._by_prompt.get(prompt.id)
        for row_id in (_parse_id(prompt.metadata.get("id")), prompt.id):
            if answer is None and row_id is not None:
                answer = self._by_id.get(row_id)
                if answer is not None and answer.prompt_id is None and prompts_per_id[row_id] > 1:
                    return Reply("missing", detail=SHARED_ID)
        if answer is None and prompt.images:
            turn_texts = turns_without_images(prompt.messages)
            answer = self._by_turn_texts.get(turn_texts)
            if answer is not None and (answer.conflicting or prompts_per_text[turn_texts] > 1):
                return Reply("missing", detail=AMBIGUOUS_IMAGES)
        if answer is None:
            return Reply("missing", detail="no row of the answer file matches")
        if not answer.matches(prompt):
            return Reply("missing", detail=OTHER_PROMPT)
        if answer.text is None:
            return Reply("missing", detail="the answer is empty")
        return Reply("answered", answer.text, detail=CONFLICTING_ANSWERS if answer.conflicting else "")

    def _add_row(self, row: FileRow, columns: FileColumns) -> None:
        cells = row.cells()
        if columns.answer not in cells:
            raise BadRowError(
                f"{row.location}: there is no column {columns.answer!r} for the answer (see columns.answer)"
            )
        row_id, text = _parse_id(cells.get(columns.id)), _parse_answer(cells[columns.answer], row, columns)
        answer = _Answer(text)
        if cells.get(columns.prompt) is not None:
            answer = self._answer_to_prompt(cells, row, columns, text)
            _add_answer(self._by_prompt, answer.prompt_id, answer)
            if row_id is None:
                _add_answer(self._by_turn_texts, answer.turn_texts, answer)
        elif row_id is None:
            raise BadRowError(f"{row.location}: has neither {columns.id!r} nor {columns.prompt!r} to match a prompt by")
        _add_answer(self._by_id, row_id, answer)

    def _answer_to_prompt(
        self, cells: Mapping[str, Any], row: FileRow, columns: FileColumns, text: str | None
    ) -> _Answer:
        """Return the answer of a row together with the identity of the row's prompt."""
        try:
            chat = parse_chat(cells[columns.prompt])
            column_images = images_in_column(cells.get(columns.images))
            if column_images or any(image is not None for image in chat.images):
                chat = insert_images(chat, column_images)
                images = tuple(read_image(cell, self._folders, f"image {n}") for n, cell in enumerate(chat.images, 1))
                return _Answer(text, Prompt(chat.messages, images).id)
            return _Answer(text, _prompt_without_images(chat).id, turns_without_images(chat.messages))
        except ValueError as problem:
            raise BadRowError(f"{row.location}: column {self._prompt_name!r} cannot be used: {problem}") from None


def _prompt_without_images(chat: Chat) -> Prompt:
    """Return the prompt of a row without images, with its image parts written as `<image>`."""
    return Prompt(tuple(Message(message.role, readable_text(message.content)) for message in chat.messages))


def _add_answer(answers: dict[Any, _Answer], key: object, answer: _Answer) -> None:
    """Store an answer under a key unless the key is None; of several different answers, the first is kept."""
    if key is None:
        return
    first = answers.setdefault(key, answer)
    if first.text is None:
        answers[key] = answer
    elif answer.text not in (None, first.text):
        answers[key] = replace(first, conflicting=True)


def _parse_answer(cell: object, row: FileRow, columns: FileColumns) -> str | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return check_text(cell, "it")
    except ValueError as problem:
        raise BadRowError(f"{row.location}: column {columns.answer!r} cannot be used: {problem}") from None


def _parse_id(cell: object) -> str | None:
    """Return an id as text, so that 7 and "7" are equal; None if the cell is not an id."""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        return None
    return str(cell)

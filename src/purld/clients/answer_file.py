"""Answers that were collected elsewhere: a file in the place of a model.

Nothing leaves this machine, so the ledger has no part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from purld.clients.base import OnReply, Reply
from purld.config.schema import AnswerFile, FileColumns
from purld.data.chat import Chat, Words, images_in_column, parse_chat, place_images, readable_text, turns_without_images
from purld.data.files import BadRowError, FileRow, check_text, iter_rows
from purld.data.images import read_image
from purld.errors import UserError
from purld.records import Message, Prompt

SEVERAL = "several rows of the answer file differ on this prompt; the first is used"
OTHER_PROMPT = "the row of the answer file with this id answers another prompt"
OTHER_IMAGES = "prompts differ in their images alone, and the answer file names neither ids nor images"


@dataclass(frozen=True)
class _Answer:
    text: str | None  # None: the row is there, its answer is not
    prompt_id: str | None = None  # of the row's prompt with the images that the row names; None: it names no prompt
    words: Words | None = None  # of a prompt without images, which may be meant for one with images
    contested: bool = False

    def fits(self, prompt: Prompt) -> bool:
        """Whether the row can be about `prompt`."""
        if self.prompt_id in (None, prompt.id):
            return True
        return bool(prompt.images) and self.words == turns_without_images(prompt.messages)


class AnswerFileClient:
    """Finds a prompt's answer by the prompt itself, or else by its id; see `purld.clients.base.Client`.

    The id is `metadata["id"]` or the content hash `Prompt.id`. A row with the right id and another prompt is
    not taken: ids repeat between data sets, and a wrong anchor is worse than none. A row with neither id nor images
    answers the only prompt with images that has its words.

    Raises:
        UserError: the file cannot be read, lacks its columns, or holds a bad row.
    """

    def __init__(self, config: AnswerFile) -> None:
        self._by_prompt: dict[str, _Answer] = {}
        self._by_id: dict[str, _Answer] = {}
        self._by_words: dict[Words, _Answer] = {}
        path = Path(config.path)
        self._folder = path if path.is_dir() else path.parent
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
        pictured = {prompt.id: turns_without_images(prompt.messages) for prompt in prompts if prompt.images}
        shared = Counter(pictured.values())
        replies = [self._reply(prompt, shared) for prompt in prompts]
        for place, reply in enumerate(replies):
            if on_reply:
                on_reply(place, reply)
        return replies

    def _reply(self, prompt: Prompt, shared: Mapping[Words, int]) -> Reply:
        """The reply to a prompt; `shared` counts the prompts with images that have the same words."""
        answer = self._by_prompt.get(prompt.id)
        for name in (_id_of(prompt.metadata.get("id")), prompt.id):
            if answer is None and name is not None:
                answer = self._by_id.get(name)
        if answer is None and prompt.images:
            words = turns_without_images(prompt.messages)
            answer = self._by_words.get(words)
            if answer is not None and (answer.contested or shared[words] > 1):
                return Reply("missing", detail=OTHER_IMAGES)
        if answer is None:
            return Reply("missing", detail="no row of the answer file matches")
        if not answer.fits(prompt):
            return Reply("missing", detail=OTHER_PROMPT)
        if answer.text is None:
            return Reply("missing", detail="the answer is empty")
        return Reply("answered", answer.text, detail=SEVERAL if answer.contested else "")

    def _take(self, row: FileRow, columns: FileColumns) -> None:
        cells = row.cells()
        if columns.answer not in cells:
            raise BadRowError(f"{row.place}: there is no column {columns.answer!r} for the answer (see columns.answer)")
        name, text = _id_of(cells.get(columns.id)), _text_of(cells[columns.answer], row, columns)
        answer = _Answer(text)
        if cells.get(columns.prompt) is not None:
            answer = self._about(cells, row, columns, text)
            _add(self._by_prompt, answer.prompt_id, answer)
            if name is None:
                _add(self._by_words, answer.words, answer)
        elif name is None:
            raise BadRowError(f"{row.place}: has neither {columns.id!r} nor {columns.prompt!r} to match a prompt by")
        _add(self._by_id, name, answer)

    def _about(self, cells: Mapping[str, Any], row: FileRow, columns: FileColumns, text: str | None) -> _Answer:
        """The answer to the prompt that a row holds."""
        try:
            chat = parse_chat(cells[columns.prompt])
            listed = images_in_column(cells.get(columns.images))
            if listed or any(image is not None for image in chat.images):
                chat = place_images(chat, listed)
                images = tuple(read_image(cell, self._folder, f"image {n}") for n, cell in enumerate(chat.images, 1))
                return _Answer(text, Prompt(chat.messages, images).id)
            return _Answer(text, _without_images(chat).id, turns_without_images(chat.messages))
        except ValueError as problem:
            raise BadRowError(f"{row.place}: column {columns.prompt!r} cannot be used: {problem}") from None


def _without_images(chat: Chat) -> Prompt:
    """The prompt of a row that names no images; places for some are written as users write them."""
    return Prompt(tuple(Message(m.role, readable_text(m.content)) for m in chat.messages))


def _add(answers: dict[Any, _Answer], name: object, answer: _Answer) -> None:
    """Keep an answer under a name, if it has one; of several that differ, the first."""
    if name is None:
        return
    first = answers.setdefault(name, answer)
    if first.text is None:
        answers[name] = answer
    elif answer.text not in (None, first.text):
        answers[name] = replace(first, contested=True)


def _text_of(cell: object, row: FileRow, columns: FileColumns) -> str | None:
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

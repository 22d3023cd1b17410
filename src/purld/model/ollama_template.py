"""Translate a chat template into one of Ollama, which reads Go templates and guesses the template of an unknown model.

The template is not parsed: chats with known contents are rendered, and what stands between the contents is what a Go
template has to write there. Further chats check the result. A template that writes anything else between the turns of a
longer chat, or changes the contents, has no translation here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from purld.model.template_dates import go_date, split_dates

Turn = tuple[str, str]
"""A role (system, user or assistant) and a content."""

Render = Callable[[Sequence[Turn]], str | None]
"""Renders a chat up to where the answer begins; None if the template refuses it."""

_SYSTEM = ("system", "Contents of the rules")
_USER = [("user", f"Contents of question {number}") for number in ("one", "two", "three")]
_ASSISTANT = [("assistant", f"Contents of answer {number}") for number in ("one", "two")]


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around the contents of the turns.

    Attributes:
        start: before the first question, where there is no system turn.
        system: before and after a system turn; None if the template has no place for one.
        after_question: between a question and its answer, in earlier turns.
        after_answer: between an answer and the next question.
        ending: after the last question.
    """

    start: str
    system: tuple[str, str] | None
    after_question: str
    after_answer: str
    ending: str

    def render(self, turns: Sequence[Turn]) -> str:
        """Render a chat that begins with a system turn or a question and ends with a question."""
        text, first = "", True
        if turns[0][0] == "system" and self.system is not None:
            text, turns = self.system[0] + turns[0][1] + self.system[1], turns[1:]
        else:
            text = self.start
        for number, (role, content) in enumerate(turns):
            if role == "user":
                text += "" if first else self.after_answer
                text += content + (self.ending if number == len(turns) - 1 else self.after_question)
                first = False
            else:
                text += content
        return text

    def without_start(self, mark: str) -> ChatPieces:
        """Return the pieces without a mark at the very beginning, which the engine writes itself."""
        system = None if self.system is None else (self.system[0].removeprefix(mark), self.system[1])
        return replace(self, start=self.start.removeprefix(mark), system=system)


def find_pieces(render: Render) -> ChatPieces | None:
    """Return the pieces of a chat template; None if it is more than pieces around the contents.

    Args:
        render: the template.
    """
    chat = [_USER[0], _ASSISTANT[0], _USER[1]]
    plain = _around(render(chat), chat)
    if plain is None:
        return None
    start, after_question, after_answer, ending = plain
    pieces = ChatPieces(start, _system_pieces(render, ending), after_question, after_answer, ending)
    longer = [_USER[0], _ASSISTANT[0], _USER[1], _ASSISTANT[1], _USER[2]]
    checked = [[_USER[0]], longer, *([[_SYSTEM, *longer]] if pieces.system is not None else [])]
    return pieces if all(render(turns) == pieces.render(turns) for turns in checked) else None


def writes_known_dates(pieces: ChatPieces) -> bool:
    """Return whether Ollama's language has every date that the pieces hold."""
    texts = [pieces.start, *(pieces.system or ()), pieces.after_question, pieces.after_answer, pieces.ending]
    return all(go_date(part) is not None for text in texts for part, is_date in split_dates(text) if is_date)


def go_template(pieces: ChatPieces) -> str:
    """Return the template in Ollama's language. A last turn of the assistant is left open, to be continued."""
    start = _write(pieces.start)
    if pieces.system is not None:
        before, after = map(_write, pieces.system)
        start = f"{{{{- if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end -}}}}"
    return "\n".join(
        [
            start,
            "{{- $first := true }}",
            "{{- range $i, $turn := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq $turn.Role "user" }}',
            f"{{{{- if $first }}}}{{{{ $first = false }}}}{{{{ else }}}}{_write(pieces.after_answer)}{{{{ end }}}}",
            "{{- $turn.Content }}",
            f"{{{{- if $last }}}}{_write(pieces.ending)}{{{{ else }}}}{_write(pieces.after_question)}{{{{ end }}}}",
            '{{- else if eq $turn.Role "assistant" }}',
            "{{- $turn.Content }}",
            "{{- end }}",
            "{{- end }}",
        ]
    )


def _system_pieces(render: Render, ending: str) -> tuple[str, str] | None:
    turns = [_SYSTEM, _USER[0]]
    pieces = _around(render(turns), turns)
    return None if pieces is None or pieces[2] != ending else (pieces[0], pieces[1])


def _around(text: str | None, turns: Sequence[Turn]) -> list[str] | None:
    """Split a rendered chat at the contents of its turns; None if one is not there, once and in its place."""
    pieces, rest = [], text or ""
    for _, content in turns:
        before, found, rest = rest.partition(content)
        if not found or content in rest:
            return None
        pieces.append(before)
    return [*pieces, rest]


def _write(text: str) -> str:
    """Return actions that write a text, with today's date where it has one; the escapes of JSON are those of Go."""
    return "".join(
        (go_date(part) or "") if is_date else f"{{{{ {json.dumps(part, ensure_ascii=False)} }}}}"
        for part, is_date in split_dates(text)
        if part
    )

"""Read the answer out of a chat completion, in every shape in which servers send one.

An answer that was paid for is never dropped: where it has no text that can be read, the result is `answered` with the
whole body as `raw` and the reason as `error`. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from purld.clients.finish_reasons import FinishKind, finish_kind
from purld.clients.ledger import CallResult, Usage
from purld.clients.requests import token_cost
from purld.config.clients import OpenAIEndpoint
from purld.errors import one_line

MAX_RAW = 20_000  # characters kept of the body of a failed call
# Parts of a content that hold what the model thought before it answered.
THOUGHTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_text", "thought", "summary_text")
_WRITTEN = ("content", "refusal", "reasoning_content", "reasoning")  # what of a message takes output tokens
_EVENT = re.compile(r"^data:", re.MULTILINE)
_LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines splits at U+2028 and others too, which JSON may hold as they are
_COMPLETION = re.compile(r'"choices"\s*:\s*\[|"object"\s*:\s*"(chat\.)?completion|"finish_reason"')
DAMAGED_STREAM = "damaged_stream"  # the finish reason of a stream with an event that cannot be read: it is not whole
MAX_DEPTH = 4  # of parts within parts


@dataclass
class _Content:
    """What a message's content holds: its text, a refusal, and the kinds of everything else."""

    texts: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class _Counts(NamedTuple):
    """The tokens that a usage reports; None where it has no count."""

    prompt: int | None = None
    output: int | None = None
    total: int | None = None

    @property
    def written(self) -> int:
        """The tokens billed as output; some servers count thinking, which is, in the total alone."""
        beyond = 0 if self.total is None or self.prompt is None else self.total - self.prompt
        return max(self.output or 0, beyond)


def parse_json(body: str) -> Any:
    """Parse a body; None if it is no JSON. A number of any length is accepted."""
    try:
        return json.loads(body, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except (ValueError, RecursionError):
        return None


def parse_body(body: str) -> Any:
    """Parse a response's body: JSON, or the events of a stream, which some gateways send unasked; None if neither."""
    body = body.removeprefix("\ufeff")
    data = parse_json(body)
    return _join_events(body) if data is None and _EVENT.search(body[:MAX_RAW]) else data


def _join_events(body: str) -> Any:
    """Return the events of a stream as one completion, or the first event if it is an error.

    An event of the answer that cannot be read ends the text, because what follows would hide the gap; only the usage
    and the finish reason are still read.
    """
    text, refusal, begun, damaged = "", "", False, False
    joined: dict[str, Any] = {"finish_reason": None}
    usage = None
    for line in _LINE_END.split(body):
        if not line.startswith("data:"):
            continue
        event = parse_json(line[5:])
        if not isinstance(event, dict):
            damaged |= not joined["finish_reason"] and _may_hold_text(line[5:].strip(), event, begun)
            continue
        if event.get("error") and not begun:
            return event
        usage = event.get("usage") or usage
        choice = _first_choice(event)
        begun = begun or choice is not None
        if choice is None:
            continue
        joined["finish_reason"] = choice.get("finish_reason") or joined["finish_reason"]
        if not damaged:
            content = _read_message(_message_of(choice))
            text = _append_piece(text, content.text, event, choice)
            refusal = _append_piece(refusal, "".join(content.refusals), event, choice)
    if damaged and not _is_refusal(joined["finish_reason"]):
        joined["finish_reason"] = DAMAGED_STREAM
    joined["message"] = {"content": text, "refusal": refusal}
    return {"choices": [joined], "usage": usage} if begun else None


def _may_hold_text(line: str, event: object, begun: bool) -> bool:
    """Return whether a line of a stream that is no object may have been a piece of the answer.

    Before the first piece, servers send greetings; only what looks like a completion may be a piece.
    """
    if line in ("", "[DONE]", "null") or isinstance(event, str):
        return False
    return begun or _COMPLETION.search(line) is not None


def _is_refusal(finish: object) -> bool:
    return isinstance(finish, str) and finish_kind(finish) == FinishKind.REFUSED


def _append_piece(text: str, piece: str, event: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    """Return the text of a stream with the next event's piece; a whole message, as some servers send, replaces it."""
    is_whole = event.get("object") == "chat.completion" or piece.startswith(text)
    return piece if piece and choice.get("message") is not None and is_whole else text + piece


def is_cut_completion(body: str) -> bool:
    """Return whether a body that is no JSON is the beginning of a completion, which may have been billed."""
    start = body.lstrip("\ufeff \t\r\n")[:MAX_RAW]
    return (start.startswith("{") or _EVENT.search(start) is not None) and _COMPLETION.search(start) is not None


def read_completion(data: object, body: str, endpoint: OpenAIEndpoint) -> CallResult | None:
    """Return the result that a parsed body holds, or None if it is not a completion and reports no tokens."""
    if not isinstance(data, dict):
        return None
    counts = _read_counts(data)
    usage = _to_usage(counts, endpoint)
    choice = _first_choice(data)
    if choice is None:
        if not counts.written:
            return None
        return _unreadable("no choices", None, body, usage)
    message = _message_of(choice)
    content = _read_message(message)
    content.unreadable += [name for name in ("tool_calls", "function_call", "audio") if message.get(name)]
    if usage and not usage.output_tokens and (content.unreadable or any(message.get(name) for name in _WRITTEN)):
        usage = None  # it was written by a model, so it took tokens
    return _to_result(content, _finish_reason(choice, counts, endpoint), body, usage)


def _to_result(content: _Content, finish: str | None, body: str, usage: Usage | None) -> CallResult:
    text, refusal = _clean(content.text), _clean("".join(content.refusals))
    kind = finish_kind(finish)
    if refusal.strip() and not text.strip():
        return CallResult("answered", refusal, "refusal", usage=usage)
    if text.strip():
        return CallResult("answered", text, finish, usage=usage)
    if kind == FinishKind.REFUSED or (kind in (FinishKind.CUT, FinishKind.CONTEXT) and not content.unreadable):
        return CallResult("answered", None, finish, usage=usage)
    if content.unreadable:
        return _unreadable(", ".join(dict.fromkeys(content.unreadable)), finish, body, usage)
    return CallResult("answered", None, finish, "empty_answer", body, usage)


def _unreadable(what: str, finish: str | None, body: str, usage: Usage | None) -> CallResult:
    return CallResult("answered", None, finish, f"unreadable_answer: {what}", body, usage)


def _first_choice(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = data.get("choices")
    if isinstance(choices, dict):
        choices = [choices] if "message" in choices else list(choices.values())
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) and first else None


def _message_of(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a choice's message; a bare text, or a server's piece of a stream, is read as one."""
    for name in ("message", "delta"):
        message = choice.get(name)
        if isinstance(message, dict):
            return message
        if message is not None:
            return {"content": message}
    return {"content": choice.get("text")}


def _read_message(message: Mapping[str, Any]) -> _Content:
    found = _Content()
    _add_parts(message.get("content"), found, 0)
    found.refusals += _texts_of(message.get("refusal"))
    return found


def _add_parts(part: object, found: _Content, depth: int) -> None:
    """Add the text of a part, or of a list of parts; what is thought before the answer is no part of it."""
    if part is None:
        return
    if isinstance(part, str):
        found.texts.append(part)
    elif isinstance(part, list) and depth < MAX_DEPTH:
        for item in part:
            _add_parts(item, found, depth + 1)
    elif isinstance(part, dict) and depth < MAX_DEPTH:
        _add_part(part, found, depth)
    else:
        found.unreadable.append(f"a content of type {type(part).__name__}")


def _add_part(part: Mapping[str, Any], found: _Content, depth: int) -> None:
    kind = part.get("type")
    if kind in THOUGHTS or part.get("thought") is True:
        return
    if kind == "refusal":
        found.refusals += _texts_of(part.get("refusal"))
        return
    for name in ("text", "value", "content", "parts"):
        if part.get(name) is not None:
            _add_parts(part[name], found, depth + 1)
            return
    found.unreadable.append(f"a part of type {one_line(kind, 40)}" if isinstance(kind, str) else "a part without text")


def _texts_of(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value


def _finish_reason(choice: Mapping[str, Any], counts: _Counts, endpoint: OpenAIEndpoint) -> str | None:
    """Return the finish reason by name; None only if the server names none and the limit was not reached.

    A server that counts thinking in the total alone may not count it towards the limit either.
    """
    if "finish_reason" not in choice:
        return "length" if (counts.output or 0) >= endpoint.max_tokens_per_answer else None
    reason = choice["finish_reason"]
    if isinstance(reason, dict | list):
        return type(reason).__name__
    return one_line(reason if isinstance(reason, str) else json.dumps(reason), 80) or "empty"


def reports_output(data: object) -> bool:
    """Return whether a parsed body reports that a model wrote something, which is paid for."""
    return isinstance(data, dict) and _read_counts(data).written > 0


def _read_counts(data: Mapping[str, Any]) -> _Counts:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return _Counts()
    reported = (
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
        usage.get("total_tokens"),
    )
    return _Counts(*(count if _is_count(count) else None for count in reported))


def _to_usage(counts: _Counts, endpoint: OpenAIEndpoint) -> Usage | None:
    """Return the usage to book, or None if it is not two counts that can be true; the worst case then stays booked."""
    if not counts.prompt or counts.output is None:
        return None
    return Usage(counts.prompt, counts.written, token_cost(endpoint, counts.prompt, counts.written))


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _clean(text: str) -> str:
    """Replace lone surrogates, which neither files nor the ledger can store."""
    return text.encode("utf-8", "replace").decode("utf-8")

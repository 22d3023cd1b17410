"""The protocol that all clients implement, and their replies, whether new or stored in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from purld.clients.finish_reasons import FinishKind, finish_kind
from purld.clients.ledger import CallResult
from purld.errors import one_line
from purld.records import Prompt

ReplyState = Literal["answered", "refused", "truncated", "failed", "unknown", "missing", "capped"]
FAILURE_DESCRIPTIONS = {
    "no_connection": "no connection to the endpoint",
    "connection_lost": "the connection broke after the prompt was sent",
    "timeout": "no complete answer came within the timeout",
    "interrupted": "purld was stopped while it waited for the answer",
    "invalid_response": "the response is not a chat completion",
    "empty_answer": "the answer is empty",
    "cut_response": "the response breaks off in the middle",
    "context_too_long": "the prompt does not fit the model's context",
    "content_filter": "the endpoint's content filter refused the prompt",
    "unreadable_answer": "the answer is kept in the ledger, but purld cannot read its form",
    "too_large": "the response is longer than purld reads",
    "compressed": "the response is compressed, although purld asks for plain text",
    "batch_expired": "the batch expired before this request was executed",
    "batch_cancelled": "the batch was cancelled before this request was executed",
    "batch_failed": "the endpoint refused the batch",
    "not_submitted": "the batch with this request was never submitted",
    "no_line": "the results of the batch have no line for this request",
    "output_gone": "the endpoint has deleted the results of the batch",
}


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt.

    States: `answered`, a complete answer; `refused` and `truncated`, which may have text too; `failed`, no answer;
    `unknown`, sent but lost, and not sent again by default; `missing`, not in the answer file; `capped`, not sent
    because it would exceed a cap. `detail` gives the reason, in the same words for the same cause; `cap` is the key of
    the cap that kept a prompt from being sent, such as `max_calls`.
    """

    state: ReplyState
    text: str | None = None
    finish_reason: str | None = None
    detail: str = ""
    cap: str | None = None


OnReply = Callable[[int, Reply], None]
"""Receives a prompt's index and its reply."""


class Client(Protocol):
    """A model that answers prompts."""

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; `on_reply` is called as soon as a reply is stored durably.

        Raises:
            UserError: no prompt can be asked: a wrong API key, an unknown model, an endpoint that is down.
        """
        ...


class ReplyCollector:
    """Collects replies for a list of ledger keys and passes them to `on_reply`; equal keys are asked once."""

    def __init__(self, keys: Iterable[str], on_reply: OnReply | None) -> None:
        self._on_reply = on_reply
        self._replies: dict[int, Reply] = {}
        self._indices: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            self._indices.setdefault(key, []).append(index)

    def distinct_keys(self) -> Iterator[tuple[str, int]]:
        """Return every distinct key with the first index at which it occurs."""
        return ((key, indices[0]) for key, indices in self._indices.items())

    def add_reply(self, key: str, reply: Reply) -> None:
        """Store the reply for every index of `key` and pass it on."""
        for index in self._indices[key]:
            self._replies[index] = reply
            if self._on_reply:
                self._on_reply(index, reply)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return sum(map(len, self._indices.values()))

    @property
    def done(self) -> int:
        """Return how many prompts have their reply."""
        return len(self._replies)

    def in_order(self) -> list[Reply]:
        """Return all replies in the order of the keys; every key must have its reply."""
        return [self._replies[index] for index in range(len(self))]


def capped_reply(cap: str) -> Reply:
    """Return the reply to a prompt that a cap left unsent, from the cap's key and limit: "max_calls (5)"."""
    return Reply("capped", detail=f"{cap} is reached", cap=cap.partition(" ")[0])


class KnownResults(Protocol):
    """What knows the results of requests: a ledger, or all ledgers of a folder."""

    def find_result(self, key: str) -> CallResult | None:
        """Return the result of a request, or None."""
        ...


def reply_from_ledger(ledger: KnownResults, key: str, resend_unknown: bool = False) -> Reply | None:
    """Return the reply to a request that must not be sent again, or None if it would be sent."""
    result = ledger.find_result(key)
    return None if result is None else settled_reply(result, resend_unknown)


def settled_reply(result: CallResult, resend_unknown: bool = False) -> Reply | None:
    """Return the reply of an ended call that must not be sent again, or None if it would be sent.

    With `resend_unknown`, a lost answer and one that cannot be used are asked for again.
    """
    lost = result.state == "unknown" or result.unusable
    return None if result.state == "failed" or (lost and resend_unknown) else reply_from_result(result)


def reply_from_result(result: CallResult) -> Reply:
    """Convert the result of a settled call to a reply."""
    if result.state == "failed" and result.error == "content_filter":
        return Reply("refused", None, result.finish_reason, _describe_failure(result))
    if result.state != "answered":
        return Reply(result.state, None, result.finish_reason, _describe_failure(result))
    if result.unusable:
        return Reply("failed", None, result.finish_reason, _describe_failure(result))
    return _answer(result)


def _answer(result: CallResult) -> Reply:
    """Return the reply of an answered call. Only a finish reason that is known to be good makes it whole."""
    name = one_line(result.finish_reason or "", 80)
    named = f"finish reason {name}"
    match finish_kind(result.finish_reason):
        case FinishKind.WHOLE:
            return Reply("answered", result.text, result.finish_reason)
        case FinishKind.REFUSED:
            return Reply("refused", result.text, result.finish_reason, f"the model refused, {named}")
        case FinishKind.CUT if result.text is None:
            detail = f"the token limit was used up before the answer began, {named}: raise max_tokens_per_answer"
        case FinishKind.CUT:
            detail = f"the answer was cut at the token limit, {named}"
        case FinishKind.CONTEXT:
            detail = f"the answer was cut at the end of the model's context, {named}"
        case _:
            detail = f"the answer ended early or for an unknown reason, {named}"
    return Reply("truncated", result.text, result.finish_reason, detail)


def _describe_failure(result: CallResult) -> str:
    """Return the reason for a missing answer in words, or its error class if there is no description."""
    error = one_line(result.error or "", 300)
    error_class, _, words = error.partition(": ")
    if error_class not in FAILURE_DESCRIPTIONS:
        return error
    if error == "empty_answer" and finish_kind(result.finish_reason) != FinishKind.WHOLE:
        words = f"finish reason {one_line(result.finish_reason or '', 80)}"
    return FAILURE_DESCRIPTIONS[error_class] + (f": {words}" if words else "")

"""One protocol for every model we talk to, and its replies: new ones, and those that the ledger knows already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from purld.clients.ledger import CallResult, LedgerView
from purld.records import Prompt

ReplyState = Literal["answered", "refused", "truncated", "failed", "unknown", "missing", "capped"]
REFUSALS = ("content_filter", "refusal")
TRUNCATIONS = ("length", "max_tokens")
FAILURE_DESCRIPTIONS = {
    "no_connection": "no connection to the endpoint",
    "connection_lost": "the connection broke after the prompt was sent",
    "timeout": "no whole answer came within the timeout",
    "interrupted": "purld was stopped while the prompt was under way",
    "invalid_response": "the response is no chat completion",
    "empty_answer": "the answer is empty",
    "context_too_long": "the prompt does not fit the model's context",
    "content_filter": "the endpoint's content filter refused the prompt",
}


@dataclass(frozen=True)
class Reply:
    """What became of one prompt.

    `answered` is a whole answer; `refused` and `truncated` may carry text too. `failed`: there is no answer;
    `unknown`: sent, then lost, and never sent again unasked; `missing`: not in the answer file; `capped`: not
    sent because a cap would have been passed. `detail` says why, in words that are the same for the same cause.
    """

    state: ReplyState
    text: str | None = None
    finish_reason: str | None = None
    detail: str = ""


OnReply = Callable[[int, Reply], None]


class Client(Protocol):
    """A model that answers prompts."""

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """The replies, in the order of `prompts`.

        `on_reply` is called with a prompt's position and its reply as soon as the reply is durable.

        Raises:
            UserError: nothing can be asked at all: a wrong key, an unknown model, an endpoint that is down.
        """
        ...


class ReplyCollector:
    """Replies on their way to whoever asked: equal questions, told by their ledger keys, are asked once."""

    def __init__(self, keys: Iterable[str], on_reply: OnReply | None) -> None:
        self._on_reply = on_reply
        self._replies: dict[int, Reply] = {}
        self._places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            self._places.setdefault(key, []).append(place)

    def questions(self) -> Iterator[tuple[str, int]]:
        """Every distinct key, with the first position that it stands for."""
        return ((key, places[0]) for key, places in self._places.items())

    def deliver(self, key: str, reply: Reply) -> None:
        """Hand over the reply to a question, once for every position that it stands for."""
        for place in self._places[key]:
            self._replies[place] = reply
            if self._on_reply:
                self._on_reply(place, reply)

    def in_order(self) -> list[Reply]:
        """All replies; every question has been delivered."""
        return [self._replies[place] for place in range(sum(map(len, self._places.values())))]


def reply_from_ledger(ledger: LedgerView, key: str, resend_unknown: bool = False) -> Reply | None:
    """The reply to a question that need not, or must not, be asked again; None if it would be sent."""
    result = ledger.find(key)
    if result is None or result.state == "failed" or (result.state == "unknown" and resend_unknown):
        return None
    return reply_from_result(result)


def reply_from_result(result: CallResult) -> Reply:
    """A settled call, as those who asked see it."""
    match result.state:
        case "answered" if result.finish_reason in REFUSALS:
            return Reply("refused", result.text, result.finish_reason, "the model refused")
        case "answered" if result.finish_reason in TRUNCATIONS:
            return Reply("truncated", result.text, result.finish_reason, "the answer met the token limit")
        case "answered":
            return Reply("answered", result.text, result.finish_reason)
        case "failed" if result.error in REFUSALS:
            return Reply("refused", None, result.finish_reason, describe_failure(result))
        case _:
            return Reply(result.state, None, result.finish_reason, describe_failure(result))


def describe_failure(result: CallResult) -> str:
    """Why there is no answer, for a person; a cause without words of its own is named by its class."""
    return FAILURE_DESCRIPTIONS.get(result.error or "", result.error or "")

"""A client that gives back what the ledger holds and sends nothing."""

from __future__ import annotations

from collections.abc import Sequence

from purld.clients.answer_file import AnswerFileClient
from purld.clients.base import Client, OnReply, Reply, ReplyCollector, reply_from_result
from purld.clients.ledger import LedgerView, Request
from purld.clients.local_model import build_local_request
from purld.clients.requests import build_requests
from purld.config.clients import AnswerFile, LocalModel, OpenAIEndpoint
from purld.records import Prompt


class RecordedClient:
    """A client that answers from a run's own ledger; what the ledger does not hold is `missing`.

    It needs no API key, and asks for nothing again that failed, was lost or was left out by a cap. See
    `purld.clients.base.Client`.
    """

    def __init__(self, config: OpenAIEndpoint | LocalModel, ledger: LedgerView) -> None:
        self.config = config
        self.ledger = ledger

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; see `Client.ask`."""
        collector = ReplyCollector([request.key for request in self._requests(prompts)], on_reply)
        for key, _ in collector.distinct_keys():
            result = self.ledger.find_result(key)
            absent = Reply("missing", detail="the ledger has no call for it")
            collector.add_reply(key, absent if result is None else reply_from_result(result))
        return collector.in_order()

    def _requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        if isinstance(self.config, LocalModel):
            return [build_local_request(self.config, prompt) for prompt in prompts]
        return list(build_requests(self.config, prompts))


def open_recorded(config: OpenAIEndpoint | AnswerFile | LocalModel, ledger: LedgerView) -> Client:
    """Return a client that gives the answers which `config` has given before, and asks nobody.

    Raises:
        UserError: the answer file that `config` names is missing or cannot be used.
    """
    return AnswerFileClient(config) if isinstance(config, AnswerFile) else RecordedClient(config, ledger)

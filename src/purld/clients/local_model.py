"""A client for a transformers model on this machine.

Its answers are stored in the ledger, so a kill costs one batch at most. Nothing is sent, so no call is ever `unknown`:
interrupted answers are generated again. The ledger identifies the model by its name or directory; give retrained
weights another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from purld.clients.base import OnReply, Reply, ReplyCollector, reply_from_result
from purld.clients.ledger import CallResult, Caps, Ledger, Request, Role, Usage
from purld.config.clients import LocalModel
from purld.records import Prompt

if TYPE_CHECKING:
    from purld.clients.local_writer import LocalWriter, WrittenAnswer

LOCAL = "local:"  # stands for the endpoint's address in the ledger


class LocalModelClient:
    """A client that generates answers in batches and loads the weights at the first question.

    See `purld.clients.base.Client`.
    """

    def __init__(self, config: LocalModel, ledger: Ledger, role: Role) -> None:
        self.config = config
        self.ledger = ledger
        self.role: Role = role
        self._writer: LocalWriter | None = None

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Return the replies in the order of `prompts`; see `Client.ask`."""
        requests = [build_local_request(self.config, prompt) for prompt in prompts]
        self.ledger.import_results(dict.fromkeys(request.key for request in requests), self.role)
        collector = ReplyCollector((request.key for request in requests), on_reply)
        pending: list[tuple[Request, Prompt]] = []
        for key, index in collector.distinct_keys():
            known = self.ledger.find_result(key)
            if known and known.state == "answered":
                collector.add_reply(key, reply_from_result(known))
            else:
                pending.append((requests[index], prompts[index]))
        # A batch is padded to its longest prompt, so group prompts of similar length.
        pending.sort(key=lambda pair: len(pair[0].body))
        for start in range(0, len(pending), self.config.batch_size):
            self._answer_batch(pending[start : start + self.config.batch_size], collector)
        return collector.in_order()

    def _answer_batch(self, batch: Sequence[tuple[Request, Prompt]], collector: ReplyCollector) -> None:
        if self._writer is None:
            self._writer = _load_writer(self.config)
        calls = [self.ledger.reserve(request, self.role, 0, 0.0, Caps()) for request, _ in batch]
        answers = self._writer.write([prompt for _, prompt in batch], seed=int(batch[0][0].key[:8], 16))
        for call, (request, _), answer in zip(calls, batch, answers, strict=True):
            result = _call_result(answer)
            self.ledger.settle(call, result)
            collector.add_reply(request.key, reply_from_result(result))


def _load_writer(config: LocalModel) -> LocalWriter:
    from purld.clients.local_writer import LocalWriter
    from purld.model.sample import Decoding

    return LocalWriter(
        config.model, Decoding(config.temperature, config.max_tokens_per_answer), config.max_image_pixels
    )


def _call_result(written: WrittenAnswer | None) -> CallResult:
    if written is None:
        return CallResult("failed", error="context_too_long", billable=False, left=False)
    usage = Usage(written.prompt_tokens, written.tokens, 0.0)
    if not written.text.strip():
        return CallResult("failed", error="empty_answer", usage=usage, left=False)
    return CallResult("answered", written.text, "stop" if written.finished else "length", usage=usage, left=False)


def build_local_request(config: LocalModel, prompt: Prompt) -> Request:
    """Build the request for `prompt` by which the ledger knows a local model's answer; it is never sent."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens_per_answer,
    }
    if prompt.images:
        body["images"] = [image.digest for image in prompt.images]
        body["max_image_pixels"] = config.max_image_pixels
    return Request(LOCAL, config.model, json.dumps(body, separators=(",", ":")), prompt.id)

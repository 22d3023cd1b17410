"""A transformers model on this machine in the place of an endpoint.

Its answers go through the ledger so that a kill costs one batch and not a night. Nothing leaves this machine,
so nothing is ever `unknown`: what a kill interrupts is generated again. Answers are remembered by the model's
name or directory: give retrained weights another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from purld.clients.base import OnReply, Reply, ReplyCollector, reply_from_result
from purld.clients.ledger import CallResult, Caps, Ledger, Request, Role, Usage
from purld.config.schema import LocalModel
from purld.records import Prompt

if TYPE_CHECKING:
    from purld.clients.local_writer import LocalWriter, WrittenAnswer

LOCAL = "local:"  # in the ledger, in the place of an endpoint's address


class LocalModelClient:
    """Generates answers in batches; see `purld.clients.base.Client`. Weights load at the first question."""

    def __init__(self, config: LocalModel, ledger: Ledger, role: Role) -> None:
        self.config = config
        self.ledger = ledger
        self.role: Role = role
        self._writer: LocalWriter | None = None

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """See `Client.ask`."""
        requests = [_request_of(self.config, prompt) for prompt in prompts]
        delivery = ReplyCollector((request.key for request in requests), on_reply)
        wanted: list[tuple[Request, Prompt]] = []
        for key, place in delivery.questions():
            known = self.ledger.find(key)
            if known and known.state == "answered":
                delivery.deliver(key, reply_from_result(known))
            else:
                wanted.append((requests[place], prompts[place]))
        # Like lengths together: a batch is padded to its longest prompt.
        wanted.sort(key=lambda pair: len(pair[0].body))
        for start in range(0, len(wanted), self.config.batch_size):
            self._answer(wanted[start : start + self.config.batch_size], delivery)
        return delivery.in_order()

    def _answer(self, batch: Sequence[tuple[Request, Prompt]], delivery: ReplyCollector) -> None:
        if self._writer is None:
            self._writer = _load(self.config)
        calls = [self.ledger.reserve(request, self.role, 0, 0.0, Caps()) for request, _ in batch]
        answers = self._writer.write([prompt for _, prompt in batch], seed=int(batch[0][0].key[:8], 16))
        for call, (request, _), answer in zip(calls, batch, answers, strict=True):
            result = _result(answer)
            self.ledger.settle(call, result)
            delivery.deliver(request.key, reply_from_result(result))


def _load(config: LocalModel) -> LocalWriter:
    from purld.clients.local_writer import LocalWriter
    from purld.model.sample import Decoding

    return LocalWriter(
        config.model, Decoding(config.temperature, config.max_tokens_per_answer), config.max_image_pixels
    )


def _result(written: WrittenAnswer | None) -> CallResult:
    if written is None:
        return CallResult("failed", error="context_too_long", billable=False, left=False)
    usage = Usage(written.prompt_tokens, written.tokens, 0.0)
    if not written.text.strip():
        return CallResult("failed", error="empty_answer", usage=usage, left=False)
    return CallResult("answered", written.text, "stop" if written.finished else "length", usage=usage, left=False)


def _request_of(config: LocalModel, prompt: Prompt) -> Request:
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

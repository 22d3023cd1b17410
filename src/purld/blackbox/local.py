"""A transformers model on this machine in the place of an endpoint.

Its answers go through the ledger so that a kill costs one batch and not a night. Nothing leaves this machine,
so nothing is ever `unknown`: what a kill interrupts is generated again. Answers are remembered by the model's
name or directory: give retrained weights another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from purld.blackbox.ledger import Caps, Ledger, Request, Result, Role, Usage
from purld.blackbox.replies import Delivery, OnReply, Reply, reply_of
from purld.config import LocalModel
from purld.errors import UserError
from purld.records import Prompt

if TYPE_CHECKING:
    import torch

LOCAL = "local:"  # in the ledger, in the place of an endpoint's address


class LocalClient:
    """Generates answers in batches; see `purld.blackbox.replies.Client`. Weights load at the first question."""

    def __init__(self, config: LocalModel, ledger: Ledger, role: Role) -> None:
        self.config = config
        self.ledger = ledger
        self.role: Role = role
        self._writer: _Writer | None = None

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """See `Client.ask`."""
        requests = [_request_of(self.config, prompt) for prompt in prompts]
        delivery = Delivery((request.key for request in requests), on_reply)
        wanted: list[tuple[Request, Prompt]] = []
        for key, place in delivery.questions():
            known = self.ledger.find(key)
            if known and known.state == "answered":
                delivery.deliver(key, reply_of(known))
            else:
                wanted.append((requests[place], prompts[place]))
        # Like lengths together: a batch is padded to its longest prompt.
        wanted.sort(key=lambda pair: len(pair[0].body))
        for start in range(0, len(wanted), self.config.batch_size):
            self._answer(wanted[start : start + self.config.batch_size], delivery)
        return delivery.in_order()

    def _answer(self, batch: Sequence[tuple[Request, Prompt]], delivery: Delivery) -> None:
        if self._writer is None:
            self._writer = _Writer(self.config)
        calls = [self.ledger.reserve(request, self.role, 0, 0.0, Caps()) for request, _ in batch]
        results = self._writer.write([prompt for _, prompt in batch], seed=int(batch[0][0].key[:8], 16))
        for call, (request, _), result in zip(calls, batch, results, strict=True):
            self.ledger.settle(call, result)
            delivery.deliver(request.key, reply_of(result))


class _Writer:
    """The model and its tokenizer.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, config: LocalModel) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.config = config
        self.model: Any
        gpu = torch.cuda.is_available()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(config.model, dtype="auto" if gpu else torch.float32)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{config.model}: no causal language model can be loaded from there ({reason}).") from None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.to("cuda" if gpu else "cpu").eval()

    def write(self, prompts: Sequence[Prompt], seed: int) -> list[Result]:
        """One result per prompt. A prompt that leaves no room for an answer fails; the others are answered."""
        texts = [self._render(prompt) for prompt in prompts]
        room = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        fits = [
            len(self.tokenizer(text, add_special_tokens=False).input_ids) + self.config.max_tokens_per_answer <= room
            for text in texts
        ]
        written = iter(self._generate([text for text, fit in zip(texts, fits) if fit], seed))
        too_long = Result("failed", error="context_too_long", billable=False, left=False)
        return [next(written) if fit else too_long for fit in fits]

    def _render(self, prompt: Prompt) -> str:
        if self.tokenizer.chat_template is None:
            return prompt.question
        turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _generate(self, texts: list[str], seed: int) -> list[Result]:
        import torch

        if not texts:
            return []
        # A chat template writes the special tokens itself.
        special = self.tokenizer.chat_template is None
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
        batch = batch.to(self.model.device)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": self.config.temperature, "top_p": 1.0, "top_k": 0}
            if self.config.temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self.model.generate(
                **batch,
                **sampling,
                max_new_tokens=self.config.max_tokens_per_answer,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [self._result(row[width:], length) for row, length in zip(output, lengths, strict=True)]

    def _result(self, tokens: torch.Tensor, prompt_tokens: int) -> Result:
        """The answer in the new tokens, which stop at the first end-of-sequence token if there is one."""
        ends = self.model.generation_config.eos_token_id
        ids: list[int] = tokens.tolist()
        stops = [place for place, token in enumerate(ids) if token in (ends if isinstance(ends, list) else [ends])]
        length = stops[0] if stops else len(ids)
        text = str(self.tokenizer.decode(ids[:length], skip_special_tokens=True))
        usage = Usage(prompt_tokens, length, 0.0)
        if not text.strip():
            return Result("failed", error="empty_answer", usage=usage, left=False)
        return Result("answered", text, "stop" if stops else "length", usage=usage, left=False)


def _request_of(config: LocalModel, prompt: Prompt) -> Request:
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens_per_answer,
    }
    if prompt.images:
        body["images"] = [image.digest for image in prompt.images]  # nothing leaves, so that their bytes need not stay
    return Request(LOCAL, config.model, json.dumps(body, separators=(",", ":")), prompt.id)

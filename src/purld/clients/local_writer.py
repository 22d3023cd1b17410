"""A model on this machine that writes answers to prompts, pictures included, as a teacher or a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.load import context_length, default_device
from purld.model.processor import auto_model_class, read_processor
from purld.model.sample import Completion, Decoding, generate_completions, seeded_torch
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

# What a tokenizer without a chat template is shown: a model that was never tuned to chats goes on with the text.
_BARE_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer with its length and its prompt's in tokens; `finished` is False if it met the length limit."""

    text: str
    prompt_tokens: int
    tokens: int
    finished: bool


class LocalWriter:
    """A model with its tokenizer or processor.

    Args:
        model: a directory or hub id.
        decoding: how answers are drawn.
        max_image_pixels: pictures with more are made smaller first; None leaves that to the model's processor.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, model: str, decoding: Decoding, max_image_pixels: int | None = None) -> None:
        device = default_device()
        try:
            processor = read_processor(model)
            weights = auto_model_class(AutoConfig.from_pretrained(model))
            self._model: Any = weights.from_pretrained(model, dtype=torch.float32 if device.type == "cpu" else "auto")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{model}: no language model can be loaded from there ({reason}).") from None
        if not processor.chat_template:
            processor.chat_template = _BARE_TEMPLATE
        self._model.to(device).eval()
        self._encoder = Encoder(processor, 0, max_image_pixels)
        self._decoding = decoding
        self._room = context_length(model) or 2**31

    def write(self, prompts: Sequence[Prompt], seed: int) -> list[WrittenAnswer | None]:
        """One answer per prompt, the same ones for the same seed; None where there is no room for one."""
        # What a judge is shown was written by models: a mark of a picture in it is no picture.
        heads = [self._encoder.prompt(self._encoder.harmless(prompt)) for prompt in prompts]
        fits = [len(head) + self._decoding.max_new_tokens <= self._room for head in heads]
        drawn = iter(self._draw([head for head, fit in zip(heads, fits) if fit], seed))
        return [next(drawn) if fit else None for fit in fits]

    def _draw(self, heads: Sequence[EncodedPrompt], seed: int) -> list[WrittenAnswer]:
        if not heads:
            return []
        with seeded_torch(seed):
            groups = generate_completions(self._model, self._encoder, heads, 1, self._decoding)
        return [self._written(head, completion) for head, (completion,) in zip(heads, groups, strict=True)]

    def _written(self, head: EncodedPrompt, completion: Completion) -> WrittenAnswer:
        tokens = len(completion.ids) - completion.finished
        return WrittenAnswer(self._encoder.text(completion.ids), len(head), tokens, completion.finished)

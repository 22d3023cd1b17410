"""Generate a teacher's or judge's answers with a local transformers model, for prompts with or without images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from purld.errors import UserError
from purld.model.chat_template import ChatSettings
from purld.model.encode import Encoder
from purld.model.load import context_length, default_device
from purld.model.processor import read_end_tokens, read_processor
from purld.model.sample import Completion, Decoding, GenerateSampler, Sampler, seed_from_content
from purld.model.vision import EncodedPrompt
from purld.model.weights import load_weights
from purld.records import Prompt

# For tokenizers without a chat template: a model that was not tuned on chats continues the text.
_BARE_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer with the token counts of its prompt and itself; `finished` is False if it was cut at the limit."""

    text: str
    prompt_tokens: int
    tokens: int
    finished: bool


class LocalWriter:
    """A model with its tokenizer or processor.

    Args:
        model: a directory or hub id.
        decoding: the sampling settings.
        max_image_pixels: larger images are scaled down to this; None leaves that to the model's processor.

    Raises:
        UserError: no language model can be loaded from `model`.
    """

    def __init__(self, model: str, decoding: Decoding, max_image_pixels: int | None = None) -> None:
        device = default_device()
        try:
            processor = read_processor(model)
            self._model: Any = load_weights(model, torch.float32 if device.type == "cpu" else "auto")
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{model}: no language model can be loaded from there ({reason}).") from None
        if not processor.chat_template:
            processor.chat_template = _BARE_TEMPLATE
        self._model.to(device).eval()
        # It thinks as its template says: what it thought is told from its answer where the answer is used.
        self._encoder = Encoder(processor, 0, max_image_pixels, ChatSettings(thinking="keep"), read_end_tokens(model))
        self._max_new_tokens = decoding.max_new_tokens
        self._sampler: Sampler = GenerateSampler(self._encoder, decoding)
        self._context_length = context_length(model) or 2**31

    def write(self, prompts: Sequence[Prompt], seed: int) -> list[WrittenAnswer | None]:
        """Write one answer per prompt, deterministic for a seed; None if it would exceed the context length."""
        encoded_prompts = [self._encoder.encode_prompt(prompt) for prompt in prompts]
        longest = self._context_length - self._max_new_tokens
        answers = iter(self._generate([prompt for prompt in encoded_prompts if len(prompt) <= longest], seed))
        return [next(answers) if len(prompt) <= longest else None for prompt in encoded_prompts]

    def _generate(self, encoded_prompts: Sequence[EncodedPrompt], seed: int) -> list[WrittenAnswer]:
        if not encoded_prompts:
            return []
        seeds = [seed_from_content(seed, index) for index in range(len(encoded_prompts))]
        groups = self._sampler(self._model, encoded_prompts, 1, seeds)
        return [
            self._decode_answer(prompt, completion)
            for prompt, (completion,) in zip(encoded_prompts, groups, strict=True)
        ]

    def _decode_answer(self, prompt: EncodedPrompt, completion: Completion) -> WrittenAnswer:
        tokens = len(completion.ids) - completion.finished
        return WrittenAnswer(self._encoder.decode_reply(completion.ids), len(prompt), tokens, completion.finished)

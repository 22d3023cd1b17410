"""The only place that turns text into tokens, pads them, and knows where a completion begins.

A prompt is rendered by the model's own chat template. Text that somebody else wrote into a template of ours
(anchors, candidates) is encoded with special tokens taken literally, so that an answer that contains
"<|im_end|>" cannot close its own turn. Images would enter here and nowhere else: `Encoder.prompt` is the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from purld.errors import UserError
from purld.records import Message, Prompt
from purld.templates import RATING_HEAD, SELF_EVALUATION_HEAD, SELF_EVALUATION_TAIL

# Stands for a slot while the chat template is rendered around it; no tokeniser ever sees it.
_SLOT = "\ue000slot\ue000"


@dataclass(frozen=True)
class Answer:
    """A target of fine-tuning: token ids, with the end-of-turn token unless the text was cut."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class EvaluationFrame:
    """The tokens around a candidate in the self-evaluation prompt: `head` is shared by a whole group."""

    head: list[int]
    tail: list[int]


class Encoder:
    """A tokenizer with the conventions of a run.

    Args:
        tokenizer: a tokenizer with a chat template.
        max_anchor_tokens: anchors are cut to this many tokens.

    Raises:
        UserError: the tokenizer has no chat template or no end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_anchor_tokens: int) -> None:
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(f"{name}: the tokenizer has no chat template; purld aligns instruct models.")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer names no end-of-turn token (eos_token).")
        self.tokenizer = tokenizer
        self.max_anchor_tokens = max_anchor_tokens
        self.end: int = tokenizer.eos_token_id
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prompt(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt up to where the assistant's answer begins."""
        return self._rendered(self._chat(prompt.messages))

    def answer(self, text: str) -> Answer:
        """An anchor as a training target of at most `max_anchor_tokens` tokens."""
        ids = self.literal(text)
        if len(ids) + 1 > self.max_anchor_tokens:
            return Answer(ids[: self.max_anchor_tokens], cut=True)
        return Answer([*ids, self.end], cut=False)

    def evaluation_frame(self, prompt: Prompt, anchor: str | None) -> EvaluationFrame:
        """The self-evaluation prompt (appendix C.4) around a slot for the candidate; without an anchor, a bare rating.

        The anchor is cut like a training target, so that the frame fits wherever the anchor did.
        """
        template, texts = RATING_HEAD, {"question": self.literal(prompt.question)}
        if anchor is not None:
            template = SELF_EVALUATION_HEAD
            texts["anchor"] = self.literal(anchor)[: self.max_anchor_tokens]
        words = template.format(**dict.fromkeys(texts, _SLOT))
        turn = Message("user", words + _SLOT + SELF_EVALUATION_TAIL)
        *around, closing = self._chat([turn]).split(_SLOT)
        head = self._rendered(around[0])
        for text, following in zip(texts.values(), around[1:], strict=True):
            head += text + self._rendered(following)
        return EvaluationFrame(head, self._rendered(closing))

    def literal(self, text: str) -> list[int]:
        """Token ids of somebody's text, special tokens in it spelled out."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        return list(self.tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True))

    def text(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chat(self, messages: Sequence[Message]) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _rendered(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one (B, L) tensor, padded after their end, and its (B, L) mask of ones."""
    return _pad(rows, pad, device, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one (B, L) tensor, padded before their start, and its (B, L) mask of ones."""
    return _pad(rows, pad, device, left=True)


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(list(row), dtype=torch.long)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)

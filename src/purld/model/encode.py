"""The only place that turns text into tokens, pads them, and knows where a completion begins.

A prompt is rendered by the model's own chat template, its pictures where their marks are, each as many placeholder
tokens as the model's processor says. Text that somebody else wrote into a template of ours (questions, anchors,
candidates) is encoded with special tokens taken literally, so that an answer that contains "<|im_end|>" cannot close
its own turn, nor one that contains "<image>" pass for a picture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from purld.errors import UserError
from purld.model.vision import EncodedPrompt, ImagePreparer, pixel_inputs
from purld.records import IMAGE, Message, Prompt
from purld.templates import RATING_HEAD, SELF_EVALUATION_HEAD, SELF_EVALUATION_TAIL

# Stands for a slot while the chat template is rendered around it; no tokeniser ever sees it.
_SLOT = "\ue000slot\ue000"


@dataclass(frozen=True)
class EncodedAnswer:
    """A target of fine-tuning: token ids, with the end-of-turn token unless the text was cut."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class EvaluationFrame:
    """What is around a candidate in the self-evaluation prompt: `head` is shared by a whole group."""

    head: EncodedPrompt
    tail: list[int]


class Encoder:
    """A tokenizer, or a processor with one, and the conventions of a run.

    Args:
        processor: a tokenizer, or the processor of a model that reads pictures; with a chat template.
        max_anchor_tokens: anchors are cut to this many tokens.
        max_image_pixels: pictures with more are made smaller first; None leaves that to the processor.

    Raises:
        UserError: there is no chat template or no end-of-turn token, or a processor does not show pictures the way
            those of transformers do.
    """

    def __init__(
        self,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        max_anchor_tokens: int,
        max_image_pixels: int | None = None,
    ) -> None:
        reads_pictures = isinstance(processor, ProcessorMixin)
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer if reads_pictures else processor
        name = self.tokenizer.name_or_path
        if not processor.chat_template:
            raise UserError(f"{name}: the tokenizer has no chat template; purld aligns instruct models.")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer names no end-of-turn token (eos_token).")
        self.processor = processor
        self.max_anchor_tokens = max_anchor_tokens
        self.end: int = self.tokenizer.eos_token_id
        self.pad: int = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self._preparer = ImagePreparer(processor, max_image_pixels) if reads_pictures else None
        if self._preparer is not None:
            self._check_template(self._preparer.placeholder)
        self._opening = _opening(self.tokenizer) if reads_pictures else []
        # Tokens that stand for a picture in the model's eyes: no completion may hold one.
        self.placeholders: list[int] = _placeholders(processor) if reads_pictures else []

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        """A prompt up to where the assistant's answer begins.

        Raises:
            UserError: it has pictures and the model reads none, or its text holds the model's own mark of a picture.
        """
        return self._head([self._chat(prompt.messages)], [], prompt)

    def harmless(self, prompt: Prompt) -> Prompt:
        """The prompt with the model's own marks of a picture broken up where a text spells one."""
        marks = sorted(self._preparer.marks) if self._preparer else []
        turns = [Message(m.role, functools.reduce(_broken, marks, m.content)) for m in prompt.messages]
        return replace(prompt, messages=tuple(turns))

    def answer(self, text: str) -> EncodedAnswer:
        """An anchor as a training target of at most `max_anchor_tokens` tokens."""
        ids = self.literal(text)
        if len(ids) + 1 > self.max_anchor_tokens:
            return EncodedAnswer(ids[: self.max_anchor_tokens], cut=True)
        return EncodedAnswer([*ids, self.end], cut=False)

    def evaluation_frame(self, prompt: Prompt, anchor: str | None) -> EvaluationFrame:
        """The self-evaluation prompt (appendix C.4) around a slot for the candidate; without an anchor, a bare rating.

        The prompt's pictures stand where the question has them. The anchor is cut like a training target, so that the
        frame fits wherever the anchor did.
        """
        pieces = prompt.question.split(IMAGE)
        literals = [self.literal(piece) for piece in pieces]
        template, fields = RATING_HEAD, {"question": IMAGE.join([_SLOT] * len(pieces))}
        if anchor is not None:
            template = SELF_EVALUATION_HEAD
            fields["anchor"] = _SLOT
            literals.append(self.literal(anchor)[: self.max_anchor_tokens])
        turn = Message("user", template.format(**fields) + _SLOT + SELF_EVALUATION_TAIL)
        *around, closing = self._chat([turn]).split(_SLOT)
        return EvaluationFrame(self._head(around, literals, prompt), self._rendered(closing))

    def literal(self, text: str) -> list[int]:
        """Token ids of somebody's text, special tokens in it spelled out."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        ids = self.tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True)
        return [i for i in ids if i not in self.placeholders]  # some vocabularies do not call them special

    def text(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chat(self, messages: Sequence[Message]) -> str:
        turns = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        return str(self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _check_template(self, placeholder: str) -> None:
        try:
            shown = self._chat([Message("user", f"{IMAGE}What is this?")]).count(placeholder)
        except Exception:  # whatever a template written for texts makes of the parts of a message
            shown = 0
        if shown != 1:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template does not put {placeholder} where a message has an "
                "image; purld needs one that does."
            )

    def _content(self, content: str) -> str | list[dict[str, str]]:
        """A message's content as chat templates take it: a text, or parts where the model reads pictures."""
        return content if self._preparer is None else list(_parts(content))

    def _head(self, rendered: Sequence[str], literals: Sequence[list[int]], prompt: Prompt) -> EncodedPrompt:
        """Rendered texts with `literals` between them; placeholders in the texts become the prompt's pictures."""
        if self._preparer is None:
            if prompt.images:
                name = self.tokenizer.name_or_path
                raise UserError(f"{prompt.place or prompt.id}: the prompt has images, and {name} reads none.")
            expanded = list(rendered)
        else:
            expanded = _expanded(rendered, prompt, self._preparer)
        ids = self._rendered(expanded[0])
        if ids[: len(self._opening)] != self._opening:
            ids = self._opening + ids
        for literal, text in zip(literals, expanded[1:], strict=True):
            ids += literal + self._rendered(text)
        return EncodedPrompt(ids, prompt.images, self._preparer)

    def _rendered(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _broken(text: str, mark: str) -> str:
    return text.replace(mark, f"{mark[:1]} {mark[1:]}")


def _parts(content: str) -> Iterator[dict[str, str]]:
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def _expanded(rendered: Sequence[str], prompt: Prompt, preparer: ImagePreparer) -> list[str]:
    """Rendered texts in which each placeholder is as long as the model wants the picture it stands for."""
    for mark in sorted(preparer.marks):
        found = sum(text.count(mark) for text in rendered)
        if found != (len(prompt.images) if mark == preparer.placeholder else 0):
            raise UserError(
                f"{prompt.place or prompt.id}: the prompt has {len(prompt.images)} images, and {found} times the text "
                f"{mark} that stands for one; that text cannot be part of a question to this model."
            )
    if not prompt.images:
        return list(rendered)
    expansions = iter(preparer.expansions(prompt.images))
    return ["".join(_with_pictures(text.split(preparer.placeholder), expansions)) for text in rendered]


def _with_pictures(around: Sequence[str], expansions: Iterator[str]) -> Iterator[str]:
    yield around[0]
    for text in around[1:]:
        yield next(expansions)
        yield text


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that processors, unlike tokenizers, put before a rendered chat that does not begin with it, if any."""
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _placeholders(processor: ProcessorMixin) -> list[int]:
    found = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
    return sorted({token for token in found if token is not None})


def training_batch(rows: Sequence[tuple[EncodedPrompt, Sequence[int]]], pad: int) -> dict[str, Any]:
    """Heads and the answers to learn as one batch on the CPU, padded on the right, as a model's `forward` takes it.

    Labels are (B, L), -100 on heads and padding; the model shifts them.
    """
    ids, mask = pad_right([[*head.ids, *answer] for head, answer in rows], pad, torch.device("cpu"))
    labels = torch.full_like(ids, -100)
    for row, (head, answer) in enumerate(rows):
        labels[row, len(head) : len(head) + len(answer)] = ids[row, len(head) : len(head) + len(answer)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | pixel_inputs([head for head, _ in rows], ids)


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

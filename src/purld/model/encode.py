"""The encoding of prompts, answers and self-evaluation prompts as token ids, and their padding.

No other module turns text into tokens. A prompt is rendered by the model's own chat template; each image mark in it
becomes as many placeholder tokens as the model's processor says. Text written by others into a template of purld
(questions, anchors, candidates) is encoded with special tokens taken literally, so that an answer that contains
"<|im_end|>" cannot close its own turn and one that contains "<image>" cannot pass for an image.
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
from purld.templates import IN_CONTEXT_TAIL, RATING_HEAD, SELF_EVALUATION_HEAD, SELF_EVALUATION_TAIL

# Stands for a slot while the chat template is rendered around it; no tokenizer ever sees it.
_SLOT = "\ue000slot\ue000"


@dataclass(frozen=True)
class EncodedAnswer:
    """A target of fine-tuning: token ids, with the end-of-turn token unless the text was cut."""

    ids: list[int]
    cut: bool


@dataclass(frozen=True)
class EvaluationFrame:
    """A self-evaluation prompt without its candidate: what comes before it, the same for a group, and after it."""

    prefix: EncodedPrompt
    suffix: list[int]


class Encoder:
    """A tokenizer, or a processor with one, and the conventions of a run.

    Args:
        processor: a tokenizer, or the processor of a model that reads images; with a chat template.
        max_anchor_tokens: anchors are cut to this many tokens.
        max_image_pixels: larger images are scaled down first; None leaves that to the processor.

    Attributes:
        end: the end-of-turn token.
        pad: the token to pad with.
        placeholders: tokens that stand for an image; no completion may contain one.

    Raises:
        UserError: there is no chat template or no end-of-turn token, or the processor does not handle images the way
            those of transformers do.
    """

    def __init__(
        self,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        max_anchor_tokens: int,
        max_image_pixels: int | None = None,
    ) -> None:
        self.processor = processor
        self.max_anchor_tokens = max_anchor_tokens
        self.tokenizer = tokenizer_of(processor)
        name = self.tokenizer.name_or_path
        if not processor.chat_template:
            raise UserError(f"{name}: the tokenizer has no chat template; purld aligns instruct models.")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer names no end-of-turn token (eos_token).")
        self.end: int = self.tokenizer.eos_token_id
        self.pad: int = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.placeholders: list[int] = []
        self._preparer: ImagePreparer | None = None
        self._opening: list[int] = []
        if isinstance(processor, ProcessorMixin):
            self._preparer = ImagePreparer(processor, max_image_pixels)
            self._check_template(self._preparer.placeholder)
            self._opening = _opening_token(self.tokenizer)
            self.placeholders = _placeholder_ids(processor)

    def encode_prompt(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt up to where the assistant's answer begins.

        Raises:
            UserError: it has images and the model reads none, or its text contains the model's own image mark.
        """
        return self._encode([self._chat(prompt.messages)], [], prompt)

    def break_image_marks(self, prompt: Prompt) -> Prompt:
        """Return the prompt with a space put into every image mark of the model that its text contains."""
        marks = sorted(self._preparer.marks) if self._preparer else []
        turns = [Message(m.role, functools.reduce(_break_mark, marks, m.content)) for m in prompt.messages]
        return replace(prompt, messages=tuple(turns))

    def encode_answer(self, text: str) -> EncodedAnswer:
        """Encode an anchor as a training target of at most `max_anchor_tokens` tokens."""
        ids = self.encode_literal(text)
        if len(ids) + 1 > self.max_anchor_tokens:
            return EncodedAnswer(ids[: self.max_anchor_tokens], cut=True)
        return EncodedAnswer([*ids, self.end], cut=False)

    def evaluation_frame(self, prompt: Prompt, anchor: str | None) -> EvaluationFrame:
        """Encode the self-evaluation prompt (appendix C.4) around the candidate; without an anchor, a bare rating.

        Images are where the question has them. The anchor is cut like a training target, so that the frame fits
        wherever the anchor did.
        """
        pieces = prompt.question.split(IMAGE)
        literals = [self.encode_literal(piece) for piece in pieces]
        template, fields = RATING_HEAD, {"question": IMAGE.join([_SLOT] * len(pieces))}
        if anchor is not None:
            template = SELF_EVALUATION_HEAD
            fields["anchor"] = _SLOT
            literals.append(self.encode_literal(anchor)[: self.max_anchor_tokens])
        turn = Message("user", template.format(**fields) + _SLOT + SELF_EVALUATION_TAIL)
        *before, after = self._chat([turn]).split(_SLOT)
        return EvaluationFrame(self._encode(before, literals, prompt), self._encode_rendered(after))

    def encode_anchored_prompt(self, prompt: Prompt, anchor: str) -> EncodedPrompt:
        """Encode a prompt with the anchor in its last user turn, up to where the assistant's answer begins.

        The anchor is cut like a training target.
        """
        last = prompt.messages[-1]
        turn = Message(last.role, last.content + IN_CONTEXT_TAIL.format(anchor=_SLOT))
        rendered = self._chat([*prompt.messages[:-1], turn]).split(_SLOT)
        return self._encode(rendered, [self.encode_literal(anchor)[: self.max_anchor_tokens]], prompt)

    def encode_literal(self, text: str) -> list[int]:
        """Encode text written by others, with special tokens in it spelled out."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        ids = self.tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True)
        return [i for i in ids if i not in self.placeholders]  # some vocabularies do not mark them as special

    def decode_text(self, ids: Sequence[int]) -> str:
        """Decode a completion, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chat(self, messages: Sequence[Message]) -> str:
        """Render messages by the chat template, up to where the assistant's answer begins."""
        turns: list[dict[str, Any]] = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        rendered = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def _check_template(self, placeholder: str) -> None:
        try:
            shown = self._chat([Message("user", f"{IMAGE}What is this?")]).count(placeholder)
        except Exception:  # a template written for texts may do anything with the parts of a message
            shown = 0
        if shown != 1:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template does not put {placeholder} where a message has an "
                "image; purld needs one that does."
            )

    def _content(self, content: str) -> str | list[dict[str, str]]:
        """Return a message's content as chat templates take it: a text, or parts if the model reads images."""
        return content if self._preparer is None else list(_content_parts(content))

    def _encode(self, rendered: Sequence[str], literals: Sequence[list[int]], prompt: Prompt) -> EncodedPrompt:
        """Encode rendered texts, with `literals` between them and the prompt's images for their placeholders."""
        if self._preparer is None:
            if prompt.images:
                name = self.tokenizer.name_or_path
                raise UserError(f"{prompt.location or prompt.id}: the prompt has images, and {name} reads none.")
            expanded = list(rendered)
        else:
            expanded = _expand_placeholders(rendered, prompt, self._preparer)
        ids = self._encode_rendered(expanded[0])
        if ids[: len(self._opening)] != self._opening:
            ids = self._opening + ids
        for literal, text in zip(literals, expanded[1:], strict=True):
            ids += literal + self._encode_rendered(text)
        return EncodedPrompt(ids, prompt.images, self._preparer)

    def _encode_rendered(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return a processor's tokenizer, or the tokenizer itself."""
    if isinstance(processor, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        return tokenizer
    return processor


def _break_mark(text: str, mark: str) -> str:
    return text.replace(mark, f"{mark[:1]} {mark[1:]}")


def _content_parts(content: str) -> Iterator[dict[str, str]]:
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def _expand_placeholders(rendered: Sequence[str], prompt: Prompt, preparer: ImagePreparer) -> list[str]:
    """Repeat each placeholder in rendered texts as often as the model wants for the image it stands for."""
    for mark in sorted(preparer.marks):
        count = sum(text.count(mark) for text in rendered)
        if count != (len(prompt.images) if mark == preparer.placeholder else 0):
            raise UserError(
                f"{prompt.location or prompt.id}: the prompt has {len(prompt.images)} images, and {count} times the "
                f"text {mark} that stands for one; that text cannot be part of a question to this model."
            )
    if not prompt.images:
        return list(rendered)
    image_texts = iter(preparer.image_texts(prompt.images))
    return ["".join(_insert_images(text.split(preparer.placeholder), image_texts)) for text in rendered]


def _insert_images(pieces: Sequence[str], image_texts: Iterator[str]) -> Iterator[str]:
    """Yield the pieces of a text, with the next image's text before each but the first."""
    yield pieces[0]
    for piece in pieces[1:]:
        yield next(image_texts)
        yield piece


def _opening_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that processors put before a rendered chat that does not begin with it, if there is one.

    Tokenizers do not do this.
    """
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _placeholder_ids(processor: ProcessorMixin) -> list[int]:
    ids = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
    return sorted({token for token in ids if token is not None})


def training_batch(rows: Sequence[tuple[EncodedPrompt, Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """Return prompts and their answers as one right-padded batch on the CPU, as a model's `forward` takes it.

    Labels are (B, L), -100 on prompts and padding; the model shifts them.
    """
    prompts = [prompt for prompt, _ in rows]
    ids, mask = pad_right([[*prompt.ids, *answer] for prompt, answer in rows], pad, torch.device("cpu"))
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        answered = slice(len(prompt), len(prompt) + len(answer))
        labels[row, answered] = ids[row, answered]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | pixel_inputs(prompts, ids)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of token ids as one (B, L) tensor, padded at the end, and its (B, L) attention mask."""
    return _pad(rows, pad, device, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of token ids as one (B, L) tensor, padded at the start, and its (B, L) attention mask."""
    return _pad(rows, pad, device, left=True)


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(list(row), dtype=torch.long)
        mask[i, columns] = 1
    return ids.to(device), mask.to(device)

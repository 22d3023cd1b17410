"""The encoding of prompts, answers and self-evaluation prompts as token ids, and their padding.

No other module turns text into tokens. A prompt is rendered by the model's own chat template; each image mark in it
becomes as many placeholder tokens as the model's processor says. In text written by others (questions, anchors,
candidates) the tokenizer's marks are spelled out, so that an answer that contains "<|im_end|>" cannot close its own
turn and one that contains "<image>" cannot pass for an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from purld.errors import UserError
from purld.model.chat_template import ChatSettings, ChatTemplate
from purld.model.plain_text import PlainTextEncoder, Slots
from purld.model.vision import EncodedPrompt, ImagePreparer, pixel_inputs
from purld.records import IMAGE, Message, Prompt
from purld.templates import IN_CONTEXT_TAIL, RATING_HEAD, SELF_EVALUATION_HEAD, SELF_EVALUATION_TAIL
from purld.thinking import SplitReply, split_thinking

IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class EncodedAnswer:
    """A target of fine-tuning: token ids, with the end-of-turn token unless the text breaks off.

    `cut` says that it does at `max_anchor_tokens`.
    """

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
        chat: how the model is talked to.
        ends: further tokens at which the model's own configuration says that generation stops.

    Attributes:
        end: the token that ends a turn in the chat template, or else the tokenizer's eos token.
        ends: all tokens that end a completion.
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
        chat: ChatSettings | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self.processor = processor
        self.max_anchor_tokens = max_anchor_tokens
        self.tokenizer = tokenizer_of(processor)
        self._settings = chat or ChatSettings()
        self._chat = ChatTemplate(processor, self._settings)
        self.placeholders: list[int] = []
        self._preparer: ImagePreparer | None = None
        self._opening: list[int] = []
        further_marks: list[str] = []
        if isinstance(processor, ProcessorMixin):
            self._preparer = ImagePreparer(processor, max_image_pixels)
            self._check_template(self._preparer.placeholder)
            self._opening = _opening_token(self.tokenizer)
            self.placeholders = _placeholder_ids(processor)
            further_marks = [*self._preparer.marks, *self.tokenizer.convert_ids_to_tokens(self.placeholders)]
        self._text = PlainTextEncoder(self.tokenizer, further_marks)
        self.end = self._turn_end()
        eos = self.tokenizer.eos_token_id
        self.ends = frozenset({self.end, *ends, *([] if eos is None else [eos])})
        self.pad: int = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self._unwritten = self.ends | (_special_ids(self.tokenizer) - self._thinking_ids())
        self._lead = self._find_lead()

    @property
    def thinking_note(self) -> str | None:
        """Return a sentence on what becomes of the thinking that the chat template provides for, if it does."""
        return self._chat.note

    @property
    def keeps_thinking(self) -> bool:
        """Return whether the student thinks before it answers, so that a direct prompt is another one."""
        return self._settings.thinking == "keep"

    def encode_prompt(self, prompt: Prompt, direct: bool = False) -> EncodedPrompt:
        """Encode a prompt up to where the assistant's answer begins.

        Args:
            prompt: the prompt.
            direct: end where the answer itself begins, even if the student thinks first (`student.thinking: keep`).

        Raises:
            UserError: the chat template refuses it, or it has images and the model reads none.
        """
        slots = Slots()
        return self._encode(self._chat.render(self._turns(prompt, slots), _where(prompt), direct), slots, prompt)

    def encode_answer(self, text: str, cut: bool = False) -> EncodedAnswer:
        """Encode an anchor's answer, without thinking, as at most `max_anchor_tokens` tokens after a direct prompt.

        Args:
            text: the anchor's text.
            cut: whether the teacher's reply broke off, so that no end-of-turn token follows it.
        """
        return self._cut_answer(self.encode_literal(self._lead + split_thinking(text).answer), cut)

    def encode_target(self, text: str, cut: bool = False) -> EncodedAnswer:
        """Encode an anchor as what the student is to write after `encode_prompt`: with `keep` the thinking as well.

        See `encode_answer` for the arguments.
        """
        if not self.keeps_thinking:
            return self.encode_answer(text, cut)
        reply, slots = split_thinking(text), Slots()
        head = self._chat.before_answer(slots.add(self._text.encode(reply.thinking)) if reply.thinking else "")
        return self._cut_answer(self._encode_pieces(*slots.split(head)) + self.encode_literal(reply.answer), cut)

    def encode_drawn_answer(self, answer: str, finished: bool) -> list[int]:
        """Encode a drawn answer of which only the text is there, with the end-of-turn token if it finished.

        It is not cut. One that the model did not come to, for its thinking, is the end-of-turn token alone.
        """
        ids = self.encode_literal(self._lead + answer) if answer else []
        return ids if ids and not finished else [*ids, self.end]

    def evaluation_frame(self, prompt: Prompt, anchor: str | None) -> EvaluationFrame:
        """Encode the self-evaluation prompt (appendix C.4) around the candidate; without an anchor, a bare rating.

        Images are where the question has them. The anchor is cut like a training target, so that the frame fits
        wherever the anchor did.
        """
        slots = Slots()
        question = IMAGE.join(slots.add(self.encode_literal(piece)) for piece in prompt.question.split(IMAGE))
        head = RATING_HEAD.format(question=question)
        if anchor is not None:
            head = SELF_EVALUATION_HEAD.format(question=question, anchor=slots.add(self.encode_quoted_anchor(anchor)))
        candidate = slots.add([])
        turn = Message("user", head + candidate + SELF_EVALUATION_TAIL)
        before, found, after = self._chat.render([turn], _where(prompt), direct=True).partition(candidate)
        if not found:
            raise UserError(f"{self.tokenizer.name_or_path}: the chat template leaves out a part of the question.")
        return EvaluationFrame(self._encode(before, slots, prompt), self._encode_inside(after))

    def encode_anchored_prompt(self, prompt: Prompt, anchor: str, direct: bool = True) -> EncodedPrompt:
        """Encode a prompt with the anchor in its last user turn, up to where the assistant's answer begins.

        The anchor is cut like a training target. See `encode_prompt` for `direct`.
        """
        slots = Slots()
        turns = self._turns(prompt, slots)
        tail = IN_CONTEXT_TAIL.format(anchor=slots.add(self.encode_quoted_anchor(anchor)))
        turns[-1] = Message(turns[-1].role, turns[-1].content + tail)
        return self._encode(self._chat.render(turns, _where(prompt), direct), slots, prompt)

    def encode_quoted_anchor(self, anchor: str) -> list[int]:
        """Encode an anchor's answer as it is quoted in a prompt: without thinking, cut like a training target."""
        return self.encode_literal(split_thinking(anchor).answer)[: self.max_anchor_tokens]

    def encode_literal(self, text: str) -> list[int]:
        """Encode text written by others, with the tokenizer's marks in it spelled out."""
        return self._text.encode(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Decode a completion's answer, without tokens that end a turn, special tokens and thinking."""
        return self.read_reply(ids).answer

    def read_reply(self, ids: Sequence[int]) -> SplitReply:
        """Return the thinking and the answer of a completion.

        Raises:
            UserError: there is thinking, and `student.thinking` is `fail`.
        """
        reply = split_thinking(self.decode_reply(ids))
        if reply.found and self._settings.thinking == "fail":
            raise UserError(
                "the student began to think in an answer, which student.thinking: fail does not accept; "
                "strip sets the thinking aside."
            )
        return replace(reply, answer=reply.answer.removeprefix(self._lead))

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Decode a completion with its thinking, from the tag that the prompt ends in if it ends in one."""
        text = str(self.tokenizer.decode([token for token in ids if token not in self._unwritten]))
        return text if self._chat.opened is None else self._chat.opened.opening + text

    def _turns(self, prompt: Prompt, slots: Slots) -> list[Message]:
        """Return the turns of a prompt to be rendered, with slots in the places of marks."""
        pieces = [(message.role, self._without_thinking(message).split(IMAGE)) for message in prompt.messages]
        return [
            Message(role, IMAGE.join(self._text.replace_marks(text, slots) for text in texts)) for role, texts in pieces
        ]

    def _without_thinking(self, message: Message) -> str:
        """Return a turn's text; an earlier turn of the assistant loses its thinking, as reasoning models expect."""
        if message.role != "assistant" or self._chat.tags is None:
            return message.content
        return split_thinking(message.content).answer

    def _cut_answer(self, ids: list[int], unended: bool) -> EncodedAnswer:
        whole = ids if ids and unended else [*ids, self.end]
        if len(whole) > self.max_anchor_tokens:
            return EncodedAnswer(ids[: self.max_anchor_tokens], cut=True)
        return EncodedAnswer(whole, cut=False)

    def _turn_end(self) -> int:
        """Return the token that the chat template puts after an answer if it is one of its marks, else the eos token.

        Raises:
            UserError: there is neither.
        """
        after = self._encode_rendered(self._chat.ending.lstrip())[:1]
        if after and after[0] in self._text.mark_ids:
            return after[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.tokenizer.name_or_path}: the tokenizer names no end-of-turn token (eos_token).")
        return int(self.tokenizer.eos_token_id)

    def _thinking_ids(self) -> set[int]:
        """Return the tokens that are part of the model's thinking tags, which some tokenizers call special."""
        tags = self._chat.tags
        if tags is None:
            return set()
        spelled = tags.opening + tags.closing
        return {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content in spelled} - self.ends

    def _find_lead(self) -> str:
        """Return the white space that the chat template puts before an answer, if it becomes a token of its own."""
        lead, sample = self._chat.opening, "The next one."
        if not lead or lead.strip():
            return ""
        prompt = self._chat.render([Message("user", sample)], "")
        whole, before = self._encode_rendered(prompt + lead + sample), self._encode_rendered(prompt)
        return lead if whole == before + self.encode_literal(lead + sample) else ""

    def _check_template(self, placeholder: str) -> None:
        try:
            shown = self._chat.render([Message("user", f"{IMAGE}What is this?")], "").count(placeholder)
        except UserError:  # a template written for texts may do anything with the parts of a message
            shown = 0
        if shown != 1:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template does not put {placeholder} where a message has an "
                "image; purld needs one that does."
            )

    def _encode(self, rendered: str, slots: Slots, prompt: Prompt) -> EncodedPrompt:
        """Encode a rendered chat, with the prompt's images in the places of their placeholders."""
        texts, literals = slots.split(rendered)
        if self._preparer is not None:
            texts = _expand_placeholders(texts, prompt, self._preparer)
        elif prompt.images:
            raise UserError(f"{_where(prompt)}: the prompt has images, and {self.tokenizer.name_or_path} reads none.")
        ids = self._encode_pieces(texts, literals)
        if ids[: len(self._opening)] != self._opening:
            ids = self._opening + ids
        return EncodedPrompt(ids, prompt.images, self._preparer)

    def _encode_pieces(self, texts: Sequence[str], literals: Sequence[list[int]]) -> list[int]:
        ids = self._encode_rendered(texts[0])
        for literal, text in zip(literals, texts[1:], strict=True):
            ids += literal + self._encode_inside(text)
        return ids

    def _encode_rendered(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode_inside(self, text: str) -> list[int]:
        return self._text.encode_inside(text, self._encode_rendered)


def _where(prompt: Prompt) -> str:
    return prompt.location or f"prompt {prompt.id}"


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return a processor's tokenizer, or the tokenizer itself."""
    if isinstance(processor, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        return tokenizer
    return processor


def _expand_placeholders(rendered: Sequence[str], prompt: Prompt, preparer: ImagePreparer) -> list[str]:
    """Repeat each placeholder in rendered texts as often as the model wants for the image it stands for."""
    shown = sum(text.count(preparer.placeholder) for text in rendered)
    if shown != len(prompt.images):
        raise UserError(
            f"{_where(prompt)}: the prompt has {len(prompt.images)} images, and the chat template shows {shown}."
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

    Labels are (B, L), `IGNORED` on prompts and padding, and not shifted.
    """
    prompts = [prompt for prompt, _ in rows]
    ids, mask = pad_right([[*prompt.ids, *answer] for prompt, answer in rows], pad, torch.device("cpu"))
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        answered = slice(len(prompt), len(prompt) + len(answer))
        labels[row, answered] = ids[row, answered]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | pixel_inputs(prompts, ids)


def next_token_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions whose next token is an answer's, (B, L) bool, and those next tokens, (N,).

    Args:
        labels: those of a `training_batch`, (B, L).
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORED
    return positions, labels[:, 1:][positions[:, :-1]]


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

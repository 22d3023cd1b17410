"""The encoding of text written by others, in which nothing can become a token that stands for more than text.

A tokenizer's added tokens open and close turns, mark images or thoughts, or call tools. Not all of them are flagged as
special: in many models the mark that ends a turn is not. So a question that quotes such a mark, or an answer that ends
its own turn, has it spelled out in ordinary pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from purld.templates import SELF_EVALUATION_HEAD, SELF_EVALUATION_TAIL

_EDGE = "\ue000"  # around the number of a slot; no text of others keeps it
_SLOT = re.compile(f"{_EDGE}(\\d+){_EDGE}")
# Runs of white space are added tokens of some tokenizers, and so ordinary text; "▁" is the blank of SentencePiece.
_BLANK = " \t\n\r\v\f▁"
# Words of our own templates are ordinary text too, also where a tokenizer, such as the testbed's, has a token for them.
_OWN_WORDS = SELF_EVALUATION_HEAD + SELF_EVALUATION_TAIL


class Slots:
    """The token ids that take the places of marks in a chat while a template is rendered around them."""

    def __init__(self) -> None:
        self._ids: list[list[int]] = []

    def add(self, ids: list[int]) -> str:
        """Return a text that stands for `ids` in what is rendered."""
        self._ids.append(ids)
        return f"{_EDGE}{len(self._ids) - 1}{_EDGE}"

    def split(self, rendered: str) -> tuple[list[str], list[list[int]]]:
        """Return the texts around the slots of a rendered chat, and the ids of each slot, in the order of the text."""
        texts = _SLOT.split(rendered)
        return texts[::2], [self._ids[int(number)] for number in texts[1::2]]


class PlainTextEncoder:
    """Encodes text so that none of a tokenizer's marks is among its tokens.

    Args:
        tokenizer: the tokenizer.
        further_marks: texts that the model reads as more than text although the tokenizer did not add them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, further_marks: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        marks = {token.content for token in added.values()} | {*tokenizer.all_special_tokens, *further_marks}
        self.marks = frozenset(mark for mark in marks if mark.strip(_BLANK) and mark not in _OWN_WORDS)
        # The token of what a vocabulary cannot spell comes from ordinary text too.
        vocabulary = tokenizer.get_vocab()
        self.mark_ids = frozenset(vocabulary[mark] for mark in self.marks if mark in vocabulary)
        self.mark_ids -= {tokenizer.unk_token_id}
        # Others are matched before the text is normalised, so that looking for the mark itself is enough.
        self._normalized = any(token.normalized and token.content in self.marks for token in added.values())
        longest_first = sorted(self.marks | {_EDGE}, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        opening = tokenizer.convert_ids_to_tokens(self._encode_directly("a")[:1])
        self._begins_with_blank = bool(opening) and opening[0].startswith(("▁", "Ġ"))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with its marks spelled out."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        first, *others = self._pattern.split(clean)
        ids = self._encode_directly(first)
        for number, piece in enumerate(others):
            ids += self.encode_inside(piece, self._encode_directly) if number % 2 else self._spell(piece)
        if self.mark_ids.isdisjoint(ids):
            return ids
        # Normalisation has made a mark of it, such as one in full-width letters.
        return [token for character in clean for token in self._spell(character)]

    def encode_inside(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode text that follows other tokens: some tokenizers begin every text with a blank, which is taken off."""
        if not text or not self._begins_with_blank:
            return encode(text)
        ids, newline = encode("\n" + text), encode("\n")
        return ids[len(newline) :] if newline and ids[: len(newline)] == newline else encode(text)

    def replace_marks(self, text: str, slots: Slots) -> str:
        """Return the text with a slot in the place of each of its marks, to be rendered by a chat template."""
        if self._normalized and not self.mark_ids.isdisjoint(self._encode_directly(self._pattern.sub("", text))):
            return slots.add(self.encode(text))
        return self._pattern.sub(lambda match: slots.add(self._spell(match[0])), text)

    def _encode_directly(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []

    def _spell(self, mark: str) -> list[int]:
        ids = self.encode_inside(mark, self._encode_without_marks)
        return [token for token in ids if token not in self.mark_ids]

    def _encode_without_marks(self, text: str) -> list[int]:
        """Encode by the tokenizer's model alone, which knows no added tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer in Python: no single character is one of its marks
            return [token for character in text for token in self._encode_directly(character)]
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

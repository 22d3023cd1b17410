"""Train the tiny students' tokenizers: Qwen2's rules, the world's words and single digits, ChatML turns.

They use the class that a student's directory is loaded with, because the loader rebuilds a tokenizer's rules from its
class and keeps only vocabulary and merges: one with its own rules would split texts differently in training and after
loading. Each fixed text of the self-evaluation template is one token, because a student's context is short. Any text
encodes and decodes back, up to Unicode's composed form (NFC); text from outside the world takes more tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from purld import templates

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 1024


def train_tokenizer(
    texts: Iterable[str], chat_template: str, image_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """Train a tokenizer of at most VOCABULARY entries on `texts`; `image_tokens` become special tokens."""
    untrained = Qwen2Tokenizer(
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN, *image_tokens],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=4096,
    )
    phrases = template_phrases()
    tokenizer: PreTrainedTokenizerBase = untrained.train_new_from_iterator(
        texts, VOCABULARY - len(phrases), show_progress=False
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    tokenizer.chat_template = chat_template
    return tokenizer


def template_phrases() -> list[str]:
    """Return the fixed texts between the fields of the self-evaluation template."""
    pieces = re.split(r"\{\w+\}", templates.SELF_EVALUATION_HEAD)
    return [*pieces, templates.SELF_EVALUATION_TAIL]

"""The tiny student's tokenizer: byte-level BPE over the world's words, with single digits and ChatML turns.

The fixed words of the self-evaluation template are one token each: the student has little length to spare. Any text
encodes and decodes back; text from outside the world just takes more tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from purld import templates

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# An operator with its spaces is one piece, a digit is always one piece, a word takes the space before it.
_PIECES = r" [-+*/=] (?=[0-9])|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with VOCABULARY entries at most that knows the pieces of `texts`."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    phrases = template_phrases()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(phrases),
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def template_phrases() -> list[str]:
    """The fixed texts between the fields of the self-evaluation template."""
    pieces = re.split(r"\{\w+\}", templates.SELF_EVALUATION_HEAD)
    return [*pieces, templates.SELF_EVALUATION_TAIL]


def render(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """One user turn, ready for the reply."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text

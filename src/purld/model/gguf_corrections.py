"""What transformers loses of a GGUF file: RoPE scaling, how some tokenizers split text, the token that ends a turn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from purld.errors import PlainWarning, UserError
from purld.model.pretrained import load_part

# The same in every Llama 3.1, 3.2 and 3.3; only `factor` differs.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_READ_BY_TRANSFORMERS = ("gpt-oss", "gemma4")
# Values of tokenizer.ggml.pre for which llama.cpp splits text like GPT-2, and those that split off each digit first.
_LIKE_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_ANSWER = "answer"
_SAMPLE = "It's 2024: 1234567 + 89, naïve!\n\n  CamelCase (東京) isn't 0.5%  \tDON'T"


def restore_rope_scaling(config: Any, reader: Any) -> None:
    """Set the RoPE scaling of Llama 3, which a GGUF file holds as one factor per frequency.

    Raises:
        UserError: the file scales positions in another way, which transformers would silently ignore.
    """
    architecture = _field(reader, "general.architecture")
    if architecture in _ROPE_READ_BY_TRANSFORMERS:
        return
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    scaled = _field(reader, f"{architecture}.rope.scaling.type") not in (None, "none")
    lost = scaled or any("rope_factors" in name for name in tensors)
    if "rope_freqs.weight" in tensors:
        factors = torch.tensor(tensors["rope_freqs.weight"])
        unscaled = config.rope_parameters["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
        config.rope_parameters |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        lost = lost or not torch.allclose(frequencies, unscaled / factors, rtol=1e-3)
    if lost:
        raise UserError("transformers does not read the kind of RoPE scaling that it states.")


def restore_text_split(tokenizer: Any, reader: Any) -> None:
    """Split off single digits if the file's tokenizer does; warn if nobody knows how it splits text."""
    kind = _field(reader, "tokenizer.ggml.pre")
    if kind in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif _field(reader, "tokenizer.ggml.model") == "gpt2" and kind not in _LIKE_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        message = f"tokenizer.ggml.pre is {kind}, which is unknown: text is split like GPT-2's, so tokens may differ."
        warnings.warn(PlainWarning(message), stacklevel=2)


def warn_of_other_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Warn if the tokenizer that was saved in `folder` loads as one that encodes differently.

    For some architectures transformers loads its own way to split text, whatever was saved.
    """
    if load_part(AutoTokenizer, str(folder)).encode(_SAMPLE) != tokenizer.encode(_SAMPLE):
        message = "transformers splits text for this architecture in another way than the file; tokens may differ."
        warnings.warn(PlainWarning(message), stacklevel=2)


def set_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token that ends a turn the eos token; generation stops there and at the file's own eos tokens."""
    stated = model.config.eos_token_id if isinstance(model.config.eos_token_id, list) else [tokenizer.eos_token_id]
    end = _turn_end(tokenizer)
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ends = [token for token in dict.fromkeys([end, *stated]) if token is not None]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else end,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first special token after an answer in the chat template, or else the file's eos token."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, shown, after = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(_ANSWER)
    except Exception:  # there is no template, or one that may raise anything
        shown, after = "", ""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids = tokenizer.encode(after, add_special_tokens=False) if shown else []
    eos: int | None = tokenizer.eos_token_id
    return next((token for token in ids if token in special), eos)


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()

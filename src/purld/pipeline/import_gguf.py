"""Convert a GGUF file of a causal LM to an ordinary Hugging Face directory.

transformers reads the file, and `gguf_corrections` repairs what it loses. A model in several files is not joined.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from purld.errors import UserError, reason_of
from purld.model.gguf_corrections import (
    restore_rope_scaling,
    restore_text_split,
    set_special_tokens,
    warn_of_other_tokens,
)
from purld.model.pretrained import load_part
from purld.runs.files import atomic_folder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def import_gguf(file: Path, out: Path, dtype: str = "float32") -> Path:
    """Write a GGUF file's model, dequantized, and its tokenizer to a new or empty directory `out`; return `out`.

    Raises:
        UserError: `file` is not a complete GGUF file of a causal LM that transformers reads, `out` is not empty or
            cannot be written, `dtype` is unknown, or the package gguf is not installed.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: give float32 or bfloat16.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty directory; give a new one.")
    reader = _open_reader(file)
    with tempfile.TemporaryDirectory() as folder:  # transformers would also read other files next to this one
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            model, tokenizer = _load(reader, folder, link.name, _DTYPES[dtype])
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{file}: cannot be read by transformers: {reason_of(error)}.") from error
    _write(model, tokenizer, out.resolve())
    return out


def _open_reader(file: Path) -> Any:
    """Open the file with the package gguf, which also finds tensors that are cut off."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("GGUF files need the package gguf; install purld[gguf].") from None
    if not file.is_file():
        raise UserError(f"{file}: there is no such file.")
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{file}: is not a GGUF file.")
    try:
        return GGUFReader(file)
    except Exception as error:  # reading past the end of the file raises various errors
        raise UserError(f"{file}: is truncated or damaged: {reason_of(error)}.") from error


def _load(reader: Any, folder: str, name: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    config = load_part(AutoConfig, folder, gguf_file=name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a model of type {config.model_type} is not a causal LM.")
    restore_rope_scaling(config, reader)
    tokenizer = cast(PreTrainedTokenizerBase, load_part(AutoTokenizer, folder, gguf_file=name))
    restore_text_split(tokenizer, reader)
    model, info = load_part(
        AutoModelForCausalLM, folder, gguf_file=name, config=config, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"weights are missing ({len(missing)}, the first is {missing[0]}); merge the files first if the model is "
            "split into several."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError("its tokenizer cannot be rebuilt; it names special tokens that are not in the vocabulary.")
    # The weights are plain parameters, but a model that counts as quantized refuses to be saved.
    model.hf_quantizer, model.is_quantized = None, False
    for attribute in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        model.config.__dict__.pop(attribute, None)
    set_special_tokens(model, tokenizer)
    return model, tokenizer


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    try:
        with atomic_folder(out) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            warn_of_other_tokens(tokenizer, partial)
            for file in partial.iterdir():
                shutil.copymode(partial / "config.json", file)  # safetensors files are readable only by their owner
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {reason_of(error)}.") from error

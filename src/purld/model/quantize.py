"""Keep the frozen base of a student in four bits (QLoRA, Dettmers et al., 2023), by bitsandbytes.

An adapter is never merged into such weights: rounding the sum to four bits again gives another model. So both stages'
adapters stay beside them, see `purld.model.adapters`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from purld.config.schema import Student
from purld.errors import UserError

NF4_BYTES = 0.52  # of a weight: four bits, and the scales of blocks of 64, quantized themselves


def check_quantizing(student: Student) -> None:
    """Check that the student's base can be quantized as configured.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if student.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "student.quantize: nf4 needs bitsandbytes, which is not installed; run `pip install 'purld[nf4]'`, or "
            "leave student.quantize out."
        )


def quantizing_options(student: Student, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load the student's base as configured; none without `quantize`."""
    if student.quantize is None:
        return {}
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=student.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def is_quantized(model: Any) -> bool:
    """Return whether weights of a model, bare or under adapters, are quantized."""
    return isinstance(model, nn.Module) and any(
        getattr(module, "hf_quantizer", None) is not None for module in model.modules()
    )

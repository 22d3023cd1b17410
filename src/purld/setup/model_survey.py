"""Look at a model directory without loading it: its family, size, dtype, context and chat template.

Only configuration files and the headers of weight files are read. Whether the model can be trained is checked by the
plan; here it is only described, so a file that cannot be read leaves a gap and is no error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purld.model.directory import find_model_folder

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class ModelSurvey:
    """What the files of a model directory say of the model.

    Attributes:
        family: transformers' name of its architecture, such as `qwen2`.
        parameters: the number of stored weights; None if it is not known.
        dtype: the type that its weights are stored in; None if it is not known.
        context: how many tokens it reads; None if it is not known.
        has_template: whether it has a chat template.
        quantized: whether its weights are quantized.
    """

    family: str
    parameters: int | None
    dtype: str | None
    context: int | None
    has_template: bool
    quantized: bool

    def describe(self) -> str:
        """Return the survey as one line."""
        size = f"{self.parameters / 1e6:,.1f} M weights" if self.parameters else "weights of unknown number"
        parts = [self.family, size, f"in {self.dtype}" if self.dtype else "", "quantized" if self.quantized else ""]
        parts.append(f"reads {self.context:,} tokens" if self.context else "")
        parts.append("chat template" if self.has_template else "no chat template")
        return ", ".join(part for part in parts if part)


def survey_model(model: str) -> ModelSurvey:
    """Describe a model directory or a hub id in the local cache.

    Raises:
        UserError: it is neither.
    """
    folder = find_model_folder(model)
    config = _read_object(folder / "config.json")
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    text = config | dict(inner or {})
    context = text.get("max_position_embeddings")
    dtype = config.get("dtype", config.get("torch_dtype", text.get("dtype", text.get("torch_dtype"))))
    return ModelSurvey(
        family=str(config.get("model_type", "unknown")),
        parameters=_count_weights(folder),
        dtype=dtype if isinstance(dtype, str) else None,
        context=context if isinstance(context, int) and context > 0 else None,
        has_template=_has_template(folder),
        quantized="quantization_config" in config,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _has_template(folder: Path) -> bool:
    files = any((folder / name).exists() for name in _TEMPLATE_FILES)
    return files or bool(_read_object(folder / "tokenizer_config.json").get("chat_template"))


def _count_weights(folder: Path) -> int | None:
    """Return the number of weights in a folder's safetensors files; None if there are none or one is damaged."""
    try:
        return sum(math.prod(shape) for file in folder.glob("*.safetensors") for shape in _shapes(file)) or None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _shapes(file: Path) -> Iterator[list[int]]:
    """Yield the shapes in the header of a safetensors file: its length in 8 bytes, then JSON."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"{file}: is no safetensors file")
        header = json.loads(handle.read(length))
    yield from (entry["shape"] for name, entry in header.items() if name != "__metadata__")

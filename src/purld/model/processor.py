"""The tokenizer of a model directory, or the processor of a model that reads images: loading and saving.

transformers' processors of models that also take videos need torchvision for their video part. purld takes no videos:
without torchvision such a processor is built from its tokenizer and its image processor (which falls back to PIL by
itself). Saving copies the files that the processor was loaded from, so that the result loads as the class that the
base model has, with torchvision or without.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.utils.hub import cached_file

from purld.model.pretrained import load_part

# What a processor's directory may contain besides its tokenizer's files.
_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def reads_images(config: PreTrainedConfig) -> bool:
    """Return whether a model of this configuration takes images and text and generates text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def auto_model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that builds the whole model of a configuration."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class of the whole model of a configuration.

    Raises:
        ValueError: transformers has none that generates text.
    """
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if reads_images(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"a model of type {config.model_type} does not generate text")
    found = mapping[type(config)]
    if not isinstance(found, (tuple, list)):
        return found
    named = [each for each in found if each is not None and each.__name__ in (config.architectures or [])]
    return (named or found)[0]


def read_processor(model: str) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the tokenizer, or the processor, of a model directory or hub id.

    Raises:
        OSError, ValueError, KeyError, ImportError: there is none that can be loaded.
    """
    config = load_part(AutoConfig, model)
    if not reads_images(config):
        tokenizer: PreTrainedTokenizerBase = load_part(AutoTokenizer, model)
        return tokenizer
    if is_torchvision_available() or "video_processor" not in _processor_class(config).get_attributes():
        processor = load_part(AutoProcessor, model)
    else:
        processor = _read_without_video(model, _processor_class(config))
    if not isinstance(processor, ProcessorMixin):
        raise ValueError("its directory holds no processor for images (processor_config.json)")
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def read_end_tokens(model: str) -> list[int]:
    """Return the tokens at which a model directory or hub id says that generation stops."""
    try:
        settings = GenerationConfig.from_pretrained(model)
    except OSError:  # it has none of its own: its configuration says it
        settings = GenerationConfig.from_model_config(load_part(AutoConfig, model))
    return listed_ends(settings)


def listed_ends(settings: GenerationConfig) -> list[int]:
    """Return the tokens at which a generation configuration stops: it holds none, one, or a list of them."""
    ends = settings.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def save_processor(processor: PreTrainedTokenizerBase | ProcessorMixin, source: str, path: Path) -> None:
    """Save what `read_processor(source)` returned, so that it loads from `path` as it did from `source`."""
    if not isinstance(processor, ProcessorMixin):
        processor.save_pretrained(path)
        return
    processor.tokenizer.save_pretrained(path)
    for name in _FILES:
        # The processor was loaded from these files, so those that exist are on this machine.
        file = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, path / name)
    _save_changed_template(processor, path)


def _save_changed_template(processor: ProcessorMixin, path: Path) -> None:
    """Write a processor's chat template if it is not the one in the files that were copied to `path`."""
    own, old = path / "chat_template.jinja", path / "chat_template.json"
    copied = own.read_text(encoding="utf-8") if own.exists() else None
    if copied is None and old.exists():
        copied = json.loads(old.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(processor.chat_template, str) and copied != processor.chat_template:
        own.write_text(processor.chat_template, encoding="utf-8")
        old.unlink(missing_ok=True)


def processor_without_video(full: type) -> Any:
    """Return a subclass of a processor class whose video part may be None."""
    return type(full.__name__, (_WithoutVideo, full), {})


def _processor_class(config: PreTrainedConfig) -> Any:
    return PROCESSOR_MAPPING[type(config)]


class _WithoutVideo:
    """A mixin for processors whose video part is None."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render as `ProcessorMixin` does, which needs no video part where a subclass may."""
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)  # type: ignore[arg-type]

    def check_argument_for_proper_class(self, name: str, part: Any) -> Any:
        """See `ProcessorMixin`."""
        return type(None) if part is None else super().check_argument_for_proper_class(name, part)  # type: ignore[misc]


def _read_without_video(model: str, full: Any) -> Any:
    parts = {
        "tokenizer": load_part(AutoTokenizer, model),
        "image_processor": load_part(AutoImageProcessor, model),
    }
    values, _ = full.get_processor_dict(model)
    return processor_without_video(full).from_args_and_dict([parts.get(name) for name in full.get_attributes()], values)

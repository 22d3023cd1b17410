"""Describe the tiny students before training: their architectures, processors and chat templates.

`text` is a Qwen2. The two that read images are a LLaVA (CLIP tower, Qwen2 language model, as in llava-interleave) and a
Qwen2.5-VL. Both encode an image as nine vectors, one per cell, and both use ordinary Hugging Face processors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from purld.testbed.shipped import STUDENT_FOLDERS
from purld.testbed.students import corpus, scene_corpus
from purld.testbed.world.scenes import COLUMNS
from purld.testbed.world.world import SCENE_TASKS, TEXT_TASKS, Task

# Pixels of the image that a tower encodes, and of one cell.
_IMAGE_SIDE, _PATCH_SIDE = 48, 16
_VISION_START, _VISION_END, _IMAGE_PAD, _VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_TEXT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Images stay where the message has them.
_QWEN_VL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A message's images come before its text.
_LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Design:
    """The parts of a student.

    Attributes:
        tasks: the tasks that it is measured on.
        corpus: the module that draws its lessons.
        chat_template: its Jinja chat template.
        model: makes the untrained model for a tokenizer.
        save_processor: saves the tokenizer or processor to the model's directory.
        image_tokens: special tokens for images.
    """

    tasks: tuple[Task, ...]
    corpus: ModuleType
    chat_template: str
    model: Callable[[PreTrainedTokenizerBase], PreTrainedModel]
    save_processor: Callable[[PreTrainedTokenizerBase, Path], None]
    image_tokens: tuple[str, ...] = ()

    @property
    def reads_images(self) -> bool:
        """True if it reads images."""
        return len(self.image_tokens) > 0


def _language_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings that the students' language models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        # If tied, the output's gradient would blur the input embeddings, which must be distinct to compare words.
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        # The usual 0.02 suits wide models; at this width attention would start uniform and stay so for long.
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _text_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_language_config(tokenizer)))


def _llava_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=_IMAGE_SIDE,
            patch_size=_PATCH_SIDE,
            initializer_range=0.08,
        ),
        text_config=Qwen2Config(**_language_config(tokenizer)),
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        image_seq_length=len(COLUMNS) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_5_vl_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    language = _language_config(tokenizer)
    language["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    ids: dict[str, Any] = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", _IMAGE_PAD),
            ("video_token_id", _VIDEO_PAD),
            ("vision_start_token_id", _VISION_START),
            ("vision_end_token_id", _VISION_END),
        )
    }
    config = Qwen2_5_VLConfig(
        text_config=language,
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": _PATCH_SIDE // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": _IMAGE_SIDE,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1],
            "initializer_range": 0.08,
        },
        tie_word_embeddings=False,
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    tokenizer.save_pretrained(path)


def _save_llava_processor(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": _IMAGE_SIDE}, crop_size={"height": _IMAGE_SIDE, "width": _IMAGE_SIDE}
    )
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=_PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(path)


def _save_qwen2_5_vl_processor(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the files of `Qwen2_5_VLProcessor.save_pretrained`, including the video part.

    The class itself needs torchvision to be instantiated. Where torchvision is installed, the video part is loaded too.
    """
    tokenizer.save_pretrained(path)
    pixels = Qwen2VLImageProcessorPil(
        size={"shortest_edge": _IMAGE_SIDE**2, "longest_edge": _IMAGE_SIDE**2},
        patch_size=_PATCH_SIDE // 2,
        merge_size=2,
        temporal_patch_size=2,
    )
    image = json.loads(pixels.to_json_string())
    video = {key: value for key, value in image.items() if key != "image_processor_type"} | _VIDEO
    parts = {"image_processor": image, "processor_class": "Qwen2_5_VLProcessor", "video_processor": video}
    (path / "processor_config.json").write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def start_from_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the text student's layers, and its embeddings of the tokens that both know, into a model.

    A model that reads images is built on one that reads text, as real ones are.
    """
    text_model = AutoModelForCausalLM.from_pretrained(STUDENT_FOLDERS["text"])
    text_vocabulary = AutoTokenizer.from_pretrained(STUDENT_FOLDERS["text"]).get_vocab()
    decoder = model.get_decoder()
    decoder.layers.load_state_dict(text_model.model.layers.state_dict())
    decoder.norm.load_state_dict(text_model.model.norm.state_dict())
    vocabulary = tokenizer.get_vocab()
    shared = sorted(vocabulary.keys() & text_vocabulary.keys())
    own_ids, text_ids = [vocabulary[token] for token in shared], [text_vocabulary[token] for token in shared]
    with torch.no_grad():
        for own, text in (
            (model.get_input_embeddings(), text_model.get_input_embeddings()),
            (model.get_output_embeddings(), text_model.get_output_embeddings()),
        ):
            cast(Tensor, cast(Any, own).weight)[own_ids] = cast(Any, text).weight[text_ids]


_VIDEO = {
    "do_sample_frames": False,
    "max_frames": 768,
    "max_video_tokens": 128_000,
    "min_frames": 4,
    "return_metadata": False,
    "video_processor_type": "Qwen2VLVideoProcessor",
}

DESIGNS = {
    "text": Design(TEXT_TASKS, corpus, _TEXT_TEMPLATE, _text_model, _save_tokenizer),
    "qwen2_5_vl": Design(
        SCENE_TASKS,
        scene_corpus,
        _QWEN_VL_TEMPLATE,
        _qwen2_5_vl_model,
        _save_qwen2_5_vl_processor,
        (_VISION_START, _VISION_END, _IMAGE_PAD, _VIDEO_PAD),
    ),
    "llava": Design(SCENE_TASKS, scene_corpus, _LLAVA_TEMPLATE, _llava_model, _save_llava_processor, ("<image>",)),
}

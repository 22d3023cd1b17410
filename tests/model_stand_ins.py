"""Stand-ins for published models, with full-size configurations, and small stand-ins for data sets.

Their weight files have whole headers, and no numbers on the disk, so `purld check` sees the true sizes. Tokenizers
have the published models' types, special tokens and templates, trained on a few words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from image_factory import encode_image, make_image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_WORDS = [
    "Question Answer Options Rationale Reference Candidate Scalar Score", "the cat sat on 0.12 mats", "3 + 4 = 7.",
    "Rate the candidate answer against the reference answer.", "Solve the following competition math problem:",
]  # fmt: skip

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_VISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


def write_models(folder: Path, text_student: Path) -> None:
    """Write `models/NAME` for the four backbones of the paper; `text_student` has a tokenizer of Qwen2's type."""
    for name, write in _BACKBONES.items():
        path = folder / "models" / name
        path.mkdir(parents=True)
        write(path, text_student)
        _write_header(path)


def _write_header(path: Path) -> None:
    """Write a weight file whose header is complete and whose numbers are a hole in the file."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        weights = auto.from_config(config).state_dict()
    entries, end = {}, 0
    for name, weight in weights.items():
        start, end = end, end + 2 * weight.numel()
        entries[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + end)


def _qwen(path: Path, text_student: Path) -> None:
    _qwen_tokenizer(path, text_student, _CHATML)
    Qwen2Config(**_QWEN_7B).save_pretrained(path)


def _qwen_vl(path: Path, text_student: Path) -> None:
    _qwen_tokenizer(path, text_student, _CHATML_VISION)
    Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 3136, "longest_edge": 12845056}
    ).save_pretrained(path)
    file = path / "preprocessor_config.json"
    published = {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
              "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
    Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config=_QWEN_7B | {"max_position_embeddings": 128000, "rope_parameters": rope},
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()},
    ).save_pretrained(path)  # fmt: skip


def _qwen_tokenizer(path: Path, text_student: Path, template: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(text_student / name, path / name)
    (path / "chat_template.jinja").write_text(template)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.save_pretrained(path)


def _llama3(path: Path, text_student: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_WORDS, trainers.BpeTrainer(special_tokens=marks, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[-1], chat_template=_LLAMA3
    ).save_pretrained(path)
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ).save_pretrained(path)  # fmt: skip


def _llava(path: Path, text_student: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marks = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    pieces = trainers.BpeTrainer(special_tokens=marks + [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.train_from_iterator(_WORDS, pieces)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        wrapped,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=_LLAVA,
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096,
        ).to_dict(),
        image_token_index=wrapped.convert_tokens_to_ids("<image>"),
    ).save_pretrained(path)  # fmt: skip


_BACKBONES: dict[str, Callable[[Path, Path], None]] = {
    "Qwen2.5-7B-Instruct": _qwen,
    "Meta-Llama-3-8B-Instruct": _llama3,
    "Qwen2.5-VL-7B-Instruct": _qwen_vl,
    "llava-1.5-7b-hf": _llava,
}


def write_data(folder: Path, rows: int = 12) -> None:
    """Write `data/NAME` for the paper's data sets, in their published forms."""
    _writing_prompts(folder / "data" / "writingPrompts", rows)
    _competition_math(folder / "data" / "MATH", rows)
    _aokvqa(folder / "data" / "aokvqa", rows)


def _writing_prompts(path: Path, rows: int) -> None:
    path.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        prompts = [f"[ {tag} ] Write about {split} number {i} ." for i in range(rows) for tag in ("CW", "EU", "WP")]
        (path / f"{split}.wp_source").write_text("".join(f"{line}\n" for line in prompts))
        (path / f"{split}.wp_target").write_text("".join("A story . <newline> The end .\n" for _ in prompts))


def _competition_math(path: Path, rows: int) -> None:
    for split in ("train", "test"):
        for kind in ("Counting & Probability", "Geometry"):
            folder = path / split / kind.lower().replace(" & ", "_and_")
            folder.mkdir(parents=True)
            for i in range(rows):
                problem = {"problem": f"What is ${i}$ in {split}?", "level": "Level 1", "type": kind}
                (folder / f"{i}.json").write_text(json.dumps(problem | {"solution": rf"It is $\boxed{{{i}}}$."}))


def _aokvqa(path: Path, rows: int) -> None:
    path.mkdir(parents=True)
    for split, first in (("train", 0), ("val", rows)):
        (path / f"{split}2017").mkdir()
        entries = []
        for i in range(first, first + rows):
            (path / f"{split}2017" / f"{i:012}.jpg").write_bytes(encode_image(make_image(640, 480, seed=i), "JPEG"))
            entries.append({
                "split": split, "image_id": i, "question_id": f"q{i}", "question": f"What is in picture {i}?",
                "choices": ["a cat", "a dog", "a hat", "a cup"], "correct_choice_idx": i % 4,
                "direct_answers": ["cat"] * 10, "difficult_direct_answer": False, "rationales": ["One can see it."] * 3,
            })  # fmt: skip
        (path / f"aokvqa_v1p0_{split}.json").write_text(json.dumps(entries))

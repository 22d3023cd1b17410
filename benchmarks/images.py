"""Time a Stage II step on a prompt with an image, shared and plain, for LLaVA and Qwen2.5-VL.

    python benchmarks/images.py --quick          one small cell, a minute or two
    python benchmarks/images.py --output images.json

The models have random weights and the images are noise; the timings depend on neither. The plain forms are those of
`step.py`: the prompt with its image is repeated K times in the update and K + 1 times in scoring (a padded batch of
full texts); in sampling, transformers itself encodes the image once and repeats the features. "Frozen" means that the
vision modules are not trained, the default with an adapter: their features are kept for the step, and all roles share
them. Both forms take turns in one process. Seconds are CPU time on a CPU; ratios are of medians.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from PIL import Image as Pil
from step import Bench, Cell, Shape, format_ratio, make_tokenizer, random_words, time_phases, write_report
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from purld.model import vision
from purld.model.encode import Encoder
from purld.model.processor import processor_without_video
from purld.model.vision import vision_modules
from purld.records import IMAGE, Image, Prompt

ARCHITECTURES = ("llava", "qwen2_5_vl")
SHAPES = {"small": Shape(512, 12, 1408, 2, 32_000), "quick": Shape(256, 4, 704, 1, 32_000)}
TOKENS_PER_SIDE = 25  # 625 tokens per image
PATCH_PIXELS = 14
QUESTION_WORDS = 40  # words next to the image

_TEMPLATE = (
    "{% for m in messages %}<|turn|> {{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} <|end|> {% endfor %}"
    "<|turn|> assistant "
)


def text_config(shape: Shape, encoder: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the language model's sizes, the same for both architectures."""
    return {
        "vocab_size": shape.vocabulary + 8,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.kv,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "pad_token_id": encoder.pad_token_id,
        "eos_token_id": encoder.eos_token_id,
        "bos_token_id": None,
    }


def make_llava(shape: Shape, text: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """Return a LLaVA configuration and its processor: a tower of half the width and depth, 625 tokens per image."""
    side = TOKENS_PER_SIDE * PATCH_PIXELS
    pixels = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        pixels,
        text,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=shape.hidden // 2,
        intermediate_size=shape.hidden * 2,
        num_hidden_layers=shape.layers // 2,
        num_attention_heads=shape.hidden // 128,
        image_size=side,
        patch_size=PATCH_PIXELS,
    )
    config = LlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config=LlamaConfig(**text_config(shape, text)).to_dict(),
        image_token_index=cast(int, text.convert_tokens_to_ids("<image>")),
        vision_feature_layer=-1,
    )
    return config, processor


def make_qwen2_5_vl(shape: Shape, text: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """Return the same for Qwen2.5-VL: four patches make a token, so its tower runs on 2,500 patches."""
    side = TOKENS_PER_SIDE * 2 * PATCH_PIXELS
    size = {"shortest_edge": 1, "longest_edge": side**2}
    pixels = Qwen2VLImageProcessorPil(patch_size=PATCH_PIXELS, merge_size=2, size=size)
    text.image_token, text.video_token = "<image>", "<video>"
    text.image_token_id, text.video_token_id = (text.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    processor = processor_without_video(Qwen2_5_VLProcessor)(pixels, text, None, chat_template=_TEMPLATE)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": shape.layers // 2,
            "hidden_size": shape.hidden // 2,
            "intermediate_size": shape.hidden,
            "num_heads": shape.hidden // 128,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH_PIXELS,
            "spatial_merge_size": 2,
            "window_size": 8 * PATCH_PIXELS,
            "fullatt_block_indexes": [shape.layers // 2 - 1],
        },
        text_config=text_config(shape, text)
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}},
        image_token_id=text.image_token_id,
        video_token_id=text.video_token_id,
    )
    return config, processor


def noise_image(side: int) -> Image:
    """Return a square image of noise, as bytes."""
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    buffer = io.BytesIO()
    Pil.fromarray(pixels.numpy()).save(buffer, format="PNG")
    data = buffer.getvalue()
    return Image(hashlib.sha256(data).hexdigest()[:16], (side, side), data=data)


class ImageBench(Bench):
    """A bench whose steps start without cached image features."""

    def sample_shared(self, tokens: int | None = None) -> list[list[int]]:
        """Sample K candidates, see `Bench`."""
        vision._feature_caches.clear()  # a run has other images at every step
        return super().sample_shared(tokens)


def make_bench(architecture: str, shape: Shape, cell: Cell, frozen: bool, options: argparse.Namespace) -> Bench:
    """Create a bench with the model of an architecture and a prompt with one image."""
    torch.manual_seed(0)
    text = make_tokenizer(shape.vocabulary)
    text.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    config, processor = {"llava": make_llava, "qwen2_5_vl": make_qwen2_5_vl}[architecture](shape, text)
    with torch.device(options.device):
        base = AutoModelForImageTextToText.from_config(config).to(getattr(torch, options.dtype)).eval()
    if frozen:
        for module in vision_modules(base).values():
            module.requires_grad_(False)
    side = TOKENS_PER_SIDE * PATCH_PIXELS * (1 if architecture == "llava" else 2)
    prompt = Prompt.from_text(f"{IMAGE} {random_words(QUESTION_WORDS, random.Random(1))}", images=(noise_image(side),))
    bench = ImageBench(Encoder(processor, cell.completion), base, prompt, cell, lora=False)
    if frozen:  # the roles of a run share frozen vision modules
        for name, module in vision_modules(bench.policy).items():
            setattr(bench.frozen.base_model, name, module)
    return bench


def format_row(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    cells = [
        f"{row['architecture']}, {'frozen' if row['frozen'] else 'trained'}",
        f"{row['prompt']}/{row['candidates']}",
    ]
    total: dict[str, list[float]] = {"plain": [], "shared": []}
    for times in row["phases"].values():
        cells.append(_seconds(times))
        for form, values in times.items():
            total[form] = [a + b for a, b in zip(total[form], values)] or list(values)
    return "| " + " | ".join([*cells, _seconds(total)]) + " |"


def _seconds(times: dict[str, list[float]]) -> str:
    seconds = " / ".join(f"{statistics.median(times[form]):.3g}" for form in ("plain", "shared"))
    return f"{seconds} s = {format_ratio(times['plain'], times['shared'])}"


HEADER = """| vision | P/K | sample plain / shared | score plain / shared | update plain / shared | all three |
|---|---|---|---|---|---|"""


def measure_rows(shape: Shape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure each architecture with its vision trained and frozen."""
    cell = Cell(0, options.completion, options.candidates)
    for architecture in options.architectures:
        for frozen in (False, True):
            bench = make_bench(architecture, shape, cell, frozen, options)
            yield {
                "architecture": architecture,
                "frozen": frozen,
                "prompt": len(bench.encoded_prompt),
                "candidates": cell.candidates,
                "phases": time_phases(bench, options.repeats),
            }


def main() -> None:
    """Run both architectures, vision trained and frozen; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    shape = SHAPES["quick" if options.quick else "small"]
    print(HEADER, flush=True)
    write_report(measure_rows(shape, options), format_row, shape, options)


if __name__ == "__main__":
    main()

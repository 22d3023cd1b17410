"""Architectures that process images differently: the numbers of transformers alone for each of them.

Qwen3-VL puts image features into several layers; in Gemma 3 the tokens of an image attend to each other both ways, by
a tensor of another name; LLaVA-OneVision cuts images into patches, unless there are several in a prompt; InternVL's
processor cuts them too, which its image processor alone would not.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_vlm import build_model, picture, text_config
from transformers import (
    Gemma3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from purld.config.schema import Student
from purld.data.images import open_image
from purld.errors import UserError
from purld.model import sample
from purld.model.encode import Encoder, training_batch
from purld.model.load import load_encoder, load_model, save_model
from purld.model.prefix import FullSequences, SharedPrefixes
from purld.model.sample import Decoding, GenerateSampler
from purld.model.self_check import can_share_prefix
from purld.records import IMAGE, Message, Prompt

PROMPTS = [
    Prompt.from_text(f"{IMAGE}How many?", images=(picture(40, 24),)),
    Prompt((Message("user", f"Is {IMAGE} like this {IMAGE} here?"),), (picture(33, 21, 1), picture(16, 48, 2))),
    Prompt.from_text("How many are there?"),
    Prompt.from_text(f"Look: {IMAGE}What?", images=(picture(90, 60, 3),)),
]
COMPLETIONS = [[5, 6, 7, 8], [9], [4, 5, 6, 6, 7]]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GRID = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


def write_processor(tokenizer, path, image_processor, kind, mark, special=(), named=None, **values):
    """Write a processor's files: `mark` is an image in the chat template, `named` are the tokenizer's own tokens."""
    named = named or {}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special, *named.values()]})
    tokenizer.save_pretrained(path)
    if named:
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": named}))
    image_processor.save_pretrained(path)
    file = path / "preprocessor_config.json"
    name = type(image_processor).__name__.removesuffix("Pil")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": name, "processor_class": kind}))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": kind, **values}))
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + mark + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer.convert_tokens_to_ids([*special, *named.values()])


def qwen3_vl(tokenizer, path):
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096})
    start, end, image, video = write_processor(
        tokenizer, path, pixels, "Qwen3VLProcessor", "<|vision_start|><|image_pad|><|vision_end|>", marks
    )
    return Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        text_config=text_config(tokenizer)
        | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def gemma3(tokenizer, path):
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    start, end, image = write_processor(
        tokenizer, path, pixels, "Gemma3Processor", named["boi_token"], named=named, image_seq_length=4
    )
    return Gemma3Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config=text_config(tokenizer)
        | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
        initializer_range=0.2,
    )


def llava_onevision(tokenizer, path):
    values = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    pixels = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=GRID)
    image, video = write_processor(
        tokenizer, path, pixels, "LlavaOnevisionProcessor", "<image>\n", ("<image>", "<video>"), **values
    )
    vision = SiglipVisionConfig(**VISION, image_size=32, patch_size=8).to_dict() | {"vision_use_head": False}
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text_config(tokenizer)).to_dict(),
        image_token_index=image,
        video_token_index=video,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=GRID,
    )


def internvl(tokenizer, path):
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    pixels = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=6)
    _, _, image, _ = write_processor(
        tokenizer, path, pixels, "InternVLProcessor", "<IMG_CONTEXT>\n", named=named, image_seq_length=4
    )
    return InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8], "initializer_range": 0.2},
        text_config=Qwen2Config(**text_config(tokenizer)).to_dict(),
        image_token_id=image,
        image_seq_length=4,
    )


@pytest.fixture(scope="module", params=[qwen3_vl, gemma3, llava_onevision, internvl], ids=lambda build: build.__name__)
def student(request, shipped_student, tmp_path_factory):
    return Student(model=str(build_model(request.param, shipped_student, tmp_path_factory.mktemp("vlm") / "model")))


@pytest.fixture(scope="module")
def encoder(student):
    return load_encoder(student)


@pytest.fixture(scope="module")
def model(student):
    return load_model(student, student.model)


def chat(encoder, prompts):
    """What transformers makes of chats by itself."""
    turns = [[{"role": m.role, "content": encoder._chat._content(m.content)} for m in p.messages] for p in prompts]
    return encoder.processor(
        text=[encoder.processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns],
        images=[[open_image(i) for i in p.images] for p in prompts] if any(p.images for p in prompts) else None,
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )


def gradient(model, values):
    model.zero_grad()
    weights = torch.arange(1.0, 1.0 + values.numel()).reshape(values.shape).sin()
    (weights * values).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("prompt", PROMPTS, ids=["one", "two", "none", "large"])
def test_encoded_prompts_are_what_the_models_own_processor_makes_of_the_chat(model, encoder, prompt):
    given, encoded = chat(encoder, [prompt]), encoder.encode_prompt(prompt)
    assert given["input_ids"].tolist() == [encoded.ids]
    with torch.no_grad():
        expected = model(**given).logits[0, -1].log_softmax(-1)[[5, 6, 7]]
        actual = FullSequences(model, [encoded], encoder.pad).token_log_probs([[5], [6], [7]])[0][:, 0]
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=["one", "two"])
def test_a_shared_prefix_gives_the_numbers_and_gradients_of_full_sequences(model, encoder, prompt, recwarn):
    encoded = encoder.encode_prompt(prompt)
    plain, shared = (
        way(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0] for way in (FullSequences, SharedPrefixes)
    )
    assert torch.allclose(shared, plain, atol=1e-5)
    expected, actual = gradient(model, plain), gradient(model, shared)
    assert (expected - actual).norm() / expected.norm() < 1e-5
    assert can_share_prefix(model, encoded, COMPLETIONS, encoder.pad)


def test_the_model_sees_its_pictures(model, encoder):
    """Else none of the other tests would say anything."""
    other = Prompt.from_text(f"{IMAGE}How many?", images=(picture(40, 24, 7),))
    with torch.no_grad():
        one, two = (
            FullSequences(model, [encoder.encode_prompt(p)], encoder.pad).token_log_probs([[5]])[0]
            for p in (PROMPTS[0], other)
        )
    assert abs(one - two) > 1e-3


def test_pictures_of_many_shapes_make_a_batch(model, encoder):
    """Its tensors are those that the processor makes of all chats at once, its loss that of its rows."""
    rows = [(encoder.encode_prompt(prompt), [5, 6, 7, 8][:n]) for prompt, n in zip(PROMPTS, (4, 2, 3, 1))]
    batch, given = training_batch(rows, encoder.pad), chat(encoder, PROMPTS)
    names = [name for name in given if name.startswith(("pixel", "image", "batch"))]
    assert names
    assert all(torch.equal(batch[name], given[name]) for name in names)
    with torch.no_grad():
        loss = model(**batch).loss
        alone = [
            FullSequences(model, [encoded], encoder.pad).token_log_probs([answer])[0].sum() for encoded, answer in rows
        ]
    assert torch.allclose(loss, -sum(alone) / 10, atol=1e-5)


def test_shared_prompts_and_full_ones_draw_the_same(model, encoder, monkeypatch):
    encoded_prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    sampler = GenerateSampler(encoder, Decoding(1.0, 4))
    shared = sampler(model, encoded_prompts, 2, seeds=range(len(encoded_prompts)))
    monkeypatch.setattr(sample, "can_share_prefix", lambda *_: False)
    assert sampler(model, encoded_prompts, 2, seeds=range(len(encoded_prompts))) == shared


def test_a_saved_student_reads_prompts_as_before(student, encoder, model, tmp_path):
    save_model(student, model, encoder, tmp_path)
    there = load_encoder(Student(model=str(tmp_path)))
    assert all(there.encode_prompt(prompt) == encoder.encode_prompt(prompt) for prompt in PROMPTS)


def test_no_mark_of_a_picture_passes_in_a_question(encoder):
    for mark in encoder.tokenizer.convert_ids_to_tokens(encoder.processor.image_token_ids):
        assert not {*encoder.placeholders} & {*encoder.encode_prompt(Prompt.from_text(f"What is {mark}?")).ids}


@pytest.mark.parametrize("how", ["adds to the text", "fails"])
def test_an_unusual_processor_is_refused_when_it_is_loaded(encoder, how, monkeypatch):
    plain = type(encoder.processor).__call__

    def call(self, images=None, text=None, **kwargs):
        if how == "fails":
            raise NotImplementedError("no such thing")
        return plain(self, images=images, text=[f"{part}\n" for part in text], **kwargs)

    monkeypatch.setattr(type(encoder.processor), "__call__", call)
    reason = "no such thing" if how == "fails" else "more into the text"
    with pytest.raises(UserError, match=rf"Processor does not handle images the way .* \(.*{reason}"):
        Encoder(encoder.processor, 8)


def test_a_chat_template_for_texts_alone_is_refused_when_it_is_loaded(encoder, monkeypatch):
    for template in ("{{ messages[0]['content'] + '' }}", "{{ messages[0]['role'] }}"):
        monkeypatch.setattr(encoder.processor, "chat_template", template)
        with pytest.raises(UserError, match=r"the chat template does not put <.*> where a message has an image"):
            Encoder(encoder.processor, 8)

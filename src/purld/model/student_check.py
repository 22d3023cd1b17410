"""Check the student before anything is paid for, without loading its weights.

Its weight files must hold a whole model, its embeddings every token that it will read, and its modules must take the
adapter that is configured. All of it is known from the configuration, the tokenizer and the headers of the files.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from purld.config.schema import Lora, Student
from purld.errors import UserError, reason_of
from purld.model.causal_lm import unwrap_adapters
from purld.model.encode import Encoder
from purld.model.load import count_parameters, make_trainable
from purld.model.pretrained import load_part
from purld.model.quantize import check_quantizing
from purld.model.shard import sharding_plan
from purld.model.weights import WeightsError, build_skeleton, check_finite, load_skeleton, stored_weights
from purld.records import Prompt

_MEDIA_MARK = re.compile("image|img|vision|video|audio|sound", re.IGNORECASE)
# What peft raises for modules that it cannot adapt, and `re` for a pattern that is none.
_ADAPTER_ERRORS = (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, re.error)


@dataclass(frozen=True)
class StudentSizes:
    """Numbers of weights.

    Attributes:
        weights: the student's own.
        trained: those that are trained, which are the student's or an adapter's.
        linear: those of linear layers but the LM head, which `student.quantize` quantizes.
    """

    weights: int
    trained: int
    linear: int


def check_student(student: Student, encoder: Encoder, may_change: bool = True) -> StudentSizes:
    """Check that the student can be loaded, read its tokens, and be trained as configured.

    Args:
        student: the student.
        encoder: its encoder.
        may_change: whether its settings can still change. Of a run that has been trained with them, nothing is said
            about what training makes of them.

    Raises:
        UserError: it cannot; the message says what to change.
    """
    check_quantizing(student)
    if may_change and student.lora is None and student.dtype == "bfloat16":
        raise UserError(
            "student.dtype: in bfloat16 the updates of weights that are trained round to nothing; leave it out, or set "
            "student.lora, whose adapter is trained in float32."
        )
    try:
        config = load_part(AutoConfig, student.model)
        quantized = _check_quantized(student, config)
        skeleton = build_skeleton(config) if quantized else load_skeleton(student.model, config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"student.model: {student.model} cannot be loaded: {reason_of(error)}.") from None
    _check_vocabulary(student, encoder, skeleton)
    if student.shard is not None:
        sharding_plan(skeleton)
    weights, linear = count_parameters(skeleton), _count_linear(skeleton)
    tied = _shares_ends(skeleton)
    model = _check_training(student, skeleton, lambda: build_skeleton(config))
    if may_change and tied:
        _check_merging(student, model)
    return StudentSizes(weights, sum(p.numel() for p in model.parameters() if p.requires_grad), linear)


def check_stored_weights(student: Student) -> None:
    """Read the student's weight files once and check that every weight is finite.

    Raises:
        UserError: one is not, or a file is damaged.
    """
    try:
        check_finite(stored_weights(student.model))
    except WeightsError as error:
        raise UserError(f"student.model: {student.model} cannot be trained: {error}.") from None


def _check_quantized(student: Student, config: PreTrainedConfig) -> bool:
    """Return whether the student's weights are quantized.

    Raises:
        UserError: they are, and they cannot be loaded on this machine or trained.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    if student.quantize is not None:
        raise UserError(
            f"student.quantize: the weights of {student.model} are quantized already; leave it out, or give a "
            "directory of weights that are not quantized."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # every quantizer raises what it likes
        raise UserError(
            f"student.model: the weights of {student.model} are quantized and cannot be loaded on this machine "
            f"({reason_of(error)}); install what is missing, or give a directory of weights that are not quantized."
        ) from None
    if student.lora is None:
        raise UserError(
            f"student.model: the weights of {student.model} are quantized, so they cannot be trained themselves; set "
            "student.lora, or give a directory of weights that are not quantized."
        )
    return True


def _check_vocabulary(student: Student, encoder: Encoder, skeleton: Any) -> None:
    """Check that every token has an embedding.

    The marks of images may have none in a text model that was cut out of one that reads images: nothing contains them.

    Raises:
        UserError: one has none.
    """
    rows = skeleton.get_input_embeddings().weight.shape[0]
    tokenizer = encoder.tokenizer
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    read = {encoder.end, encoder.pad, *encoder.encode_prompt(Prompt.from_text("A question.")).ids} if beyond else set()
    needed = sorted(index for index, token in beyond.items() if index in read or not _MEDIA_MARK.search(token))
    if needed:
        raise UserError(
            f"student.model: the weights of {student.model} have embeddings for {rows:,} tokens, and its tokenizer "
            f"has {len(needed):,} beyond them, such as {beyond[needed[0]]} ({needed[0]}); give the tokenizer that "
            "belongs to the weights, or resize the embeddings before."
        )


def _check_training(student: Student, skeleton: Any, build: Callable[[], Any]) -> Any:
    """Return the skeleton prepared for training.

    Args:
        student: says what is trained.
        skeleton: the student on the meta device; it is changed.
        build: makes another one.

    Raises:
        UserError: there is an adapter to train, and the student does not take it.
    """
    layers = _linear_layers(skeleton)
    modules = {name for name, _ in skeleton.named_modules()}
    try:
        model = make_trainable(student, skeleton)
    except _ADAPTER_ERRORS as error:
        raise UserError(_adapter_advice(student, error, layers, build)) from None
    for name in student.lora.target_modules if student.lora and isinstance(student.lora.target_modules, list) else []:
        known = any(module == name or module.endswith(f".{name}") for module in modules)
        if not known and not _takes_adapter(student, name, build):  # peft knows modules that were fused by old names
            raise UserError(
                f"student.lora: no adapter can be made on {name}, which {student.model} does not have; "
                f"its linear layers are {', '.join(layers)}."
            )
    return model


def _shares_ends(skeleton: Any) -> bool:
    """Return whether embeddings and LM head are one tensor."""
    head = skeleton.get_output_embeddings()
    return head is not None and head.weight is skeleton.get_input_embeddings().weight


def _check_merging(student: Student, model: Any) -> None:
    """Check that no adapter lies on a tensor that embeddings and LM head share: merged, it would change both.

    Raises:
        UserError: one does.
    """
    bare: Any = unwrap_adapters(model)
    if any(isinstance(end, LoraLayer) for end in (bare.get_input_embeddings(), bare.get_output_embeddings())):
        raise UserError(
            f"student.lora: {student.model} has one tensor for its embeddings and its LM head, and an adapter on one "
            "of them cannot be merged without changing the other; leave them out of student.lora.target_modules."
        )


def _linear_layers(skeleton: Any) -> list[str]:
    """Return the last names of the model's linear layers but its LM head, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name, _ in _linear_modules(skeleton)))


def _linear_modules(skeleton: Any) -> list[tuple[str, nn.Linear | Conv1D]]:
    head = skeleton.get_output_embeddings()
    return [(n, m) for n, m in skeleton.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _count_linear(skeleton: Any) -> int:
    return sum(module.weight.numel() for _, module in _linear_modules(skeleton))


def _adapter_advice(student: Student, error: Exception, layers: list[str], build: Callable[[], Any]) -> str:
    words = re.sub(r"^\[PEFT:\S+\] ", "", " ".join(str(error).split()))
    reason = textwrap.shorten(words.partition(". ")[0].rstrip("."), 160)
    fitting = [name for name in layers if _takes_adapter(student, name, build)]
    advice = f"set student.lora.target_modules to [{', '.join(fitting)}]" if fitting else "leave student.lora out"
    return f"student.lora: no adapter can be made ({reason}); {advice}."


def _takes_adapter(student: Student, name: str, build: Callable[[], Any]) -> bool:
    """Return whether peft makes an adapter for the modules of one name."""
    alone = student.model_copy(update={"lora": Lora(r=1, target_modules=[name])})
    try:
        make_trainable(alone, build())
    except _ADAPTER_ERRORS:
        return False
    return True

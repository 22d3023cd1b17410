"""Loading and saving of models and adapters, and their roles in Stage II.

In Stage II one model is policy, sampler, evaluator and reference. With LoRA there is one copy of the weights: Stage
I's adapter is merged into them when they are loaded, so that switching Stage II's adapter off gives p_sft (and not
p_base). Into quantized weights it cannot be merged; there it stays beside them as a second, frozen adapter. Without
LoRA all weights are trained, and p_sft is a second, frozen copy. Vision modules may stay frozen while the rest is
trained; then all roles share them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from purld.config.schema import Student
from purld.errors import UserError, reason_of
from purld.model.adapters import (
    STAGE_ONE,
    TRAINED,
    add_second_adapter,
    attach_adapter,
    combine_adapters,
    keeps_stage_one,
    make_lora_config,
    merge_adapter,
    use_adapters,
)
from purld.model.causal_lm import AdaptedCausalLM, CausalLM, has_adapters, unwrap_adapters
from purld.model.chat_template import ChatSettings
from purld.model.directory import check_model_directory
from purld.model.encode import Encoder, tokenizer_of
from purld.model.pretrained import load_part
from purld.model.processor import listed_ends, read_end_tokens, read_processor, reads_images, save_processor
from purld.model.quantize import is_quantized, quantizing_options
from purld.model.sample import seed_from_content, seeded_torch
from purld.model.shard import divides_weights, load_divided
from purld.model.vision import vision_modules
from purld.model.weights import WeightsError, check_finite, load_weights

_ADAPTER = "adapter_config.json"


class Roles:
    """The policy, which is trained, and p_sft, which is frozen.

    Args:
        policy: the model to sample from and to update.
        frozen_copy: p_sft, or None if it is the policy with its adapter switched off.
    """

    def __init__(self, policy: CausalLM, frozen_copy: CausalLM | None) -> None:
        self.policy = policy
        self._frozen_copy = frozen_copy
        self._trained = self._trainable()

    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, weight in self.policy.named_parameters() if weight.requires_grad)

    def check_trained(self) -> None:
        """Check that exactly those weights of the policy are trained that were at first.

        Raises:
            RuntimeError: others are.
        """
        changed = sorted(self._trained ^ self._trainable())
        if changed:
            raise RuntimeError(f"{len(changed)} weights changed between trained and frozen, such as {changed[0]}")

    def use_policy(self) -> None:
        """Activate the adapters of the policy, after something has activated others, such as loading a checkpoint."""
        if keeps_stage_one(self.policy):
            use_adapters(cast(PeftModel, self.policy), TRAINED, STAGE_ONE)

    def weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all roles; tensors that roles share come more than once."""
        yield from self.policy.parameters()
        if self._frozen_copy is not None:
            yield from self._frozen_copy.parameters()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[CausalLM]:
        """Yield p_sft, the evaluator and reference policy, with gradients disabled."""
        with torch.no_grad():
            if self._frozen_copy is not None:
                yield self._frozen_copy
            elif keeps_stage_one(self.policy):
                use_adapters(cast(PeftModel, self.policy), STAGE_ONE)
                try:
                    yield self.policy
                finally:
                    self.use_policy()
            else:
                with cast(AdaptedCausalLM, self.policy).disable_adapter():
                    yield self.policy


def load_processor(model: str) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the tokenizer of a student, or its processor if it reads images.

    Raises:
        UserError: there is none that can be loaded, or it knows no words, as one that is made without its files.
    """
    check_model_directory(model)
    try:
        processor = read_processor(model)
        tokenizer = tokenizer_of(processor)
        known = set(tokenizer.encode("A question.", add_special_tokens=False)) - {tokenizer.unk_token_id}
    except Exception as error:  # a damaged tokenizer may raise anything
        raise _load_error(model, error) from None
    if not known:
        raise UserError(
            f"student.model: {model} holds no tokenizer that can read; copy the files of the model's own tokenizer "
            "(tokenizer.json, tokenizer_config.json) there."
        )
    return processor


def load_encoder(student: Student) -> Encoder:
    """Load the student's tokenizer, or its processor if it reads images, with the conventions of a run.

    Raises:
        UserError: there is none, or its chat template is missing or cannot be used.
    """
    processor = load_processor(student.model)
    chat = ChatSettings(
        student.chat_template, student.chat_template_kwargs, student.thinking, student.system_turn == "fold"
    )
    return Encoder(processor, student.max_anchor_tokens, student.max_image_pixels, chat, read_end_tokens(student.model))


def load_model(student: Student, path: str | Path) -> CausalLM:
    """Load the model saved at `path`: full weights, or an adapter merged into the student's.

    Where the student's are quantized, the adapter stays beside them, frozen.

    Args:
        student: says where the base weights are and which dtype they get.
        path: the student's own directory or hub id, or a stage's directory in a run.

    Raises:
        UserError: it cannot be loaded as a model that generates text.
    """
    adapter = (Path(path) / _ADAPTER).exists()
    base = student.model if adapter else str(path)
    check_model_directory(base)
    divided = divides_weights(student)
    try:
        if divided:
            model = load_divided(base, _dtype(student))
        else:
            model = load_weights(base, _dtype(student), **quantizing_options(student, default_device()))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _load_error(base, error) from None
    try:
        if adapter:
            beside = divided or is_quantized(model)
            model = (attach_adapter if beside else merge_adapter)(model, Path(path))
        if student.quantize is None and not divided:  # else it is there
            model.to(default_device())
        check_finite(model.named_parameters())
    except WeightsError as error:
        raise _load_error(str(path), error) from None
    loaded: CausalLM = model.eval()
    return loaded


def make_trainable(student: Student, model: CausalLM, seed: int = 0) -> CausalLM:
    """Return the model prepared for training: with a new adapter, or all weights; its vision only if so configured.

    Args:
        student: says what is trained.
        model: as loaded.
        seed: the seed of a new adapter's weights, whatever the state of torch's random numbers.

    Raises:
        UserError: the vision modules should stay frozen, and they cannot be identified.
    """
    if not student.trains_vision and reads_images(model.config) and not vision_modules(model):
        raise UserError(
            f"student.model: the vision modules of a {type(model).__name__} cannot be identified, so they cannot be "
            "left out of training; set student.train_vision to true."
        )
    if student.lora is not None:
        with seeded_torch(seed_from_content("adapter", seed)):
            if has_adapters(model):
                return cast(AdaptedCausalLM, add_second_adapter(cast(PeftModel, model)))
            adapted = get_peft_model(cast(PreTrainedModel, model), make_lora_config(student, model))
        return cast(AdaptedCausalLM, adapted)
    if not student.trains_vision:
        for module in vision_modules(model).values():
            module.requires_grad_(False)
    return model


def load_roles(student: Student, sft: Path, seed: int = 0) -> Roles:
    """Load the roles of Stage II, which all start from the p_sft saved at `sft`; `seed` is that of a new adapter."""
    policy = make_trainable(student, load_model(student, sft), seed_from_content("stage two", seed))
    if student.lora is not None:
        return Roles(policy, None)
    frozen = load_model(student, sft)
    if not student.trains_vision:
        for name, module in vision_modules(policy).items():
            setattr(frozen.base_model, name, module)
    frozen.requires_grad_(False)
    return Roles(policy, frozen)


def save_model(
    student: Student, model: CausalLM, encoder: Encoder, path: Path, whole: dict[str, Tensor] | None = None
) -> None:
    """Save weights, or an adapter, with the student's tokenizer or processor, as an ordinary Hugging Face directory.

    `whole` are the gathered weights of a sharded model, see `purld.model.whole_weights`.
    """
    path.mkdir(parents=True, exist_ok=True)
    _stop_at_ends(model, encoder)
    if has_adapters(model):
        model.save_pretrained(str(path), save_embedding_layers=False)  # an adapter of embeddings needs no copy of them
    else:
        model.save_pretrained(str(path), state_dict=whole)
    _save_companions(student, model, encoder, path)


def _stop_at_ends(model: CausalLM, encoder: Encoder) -> None:
    """Add the tokens that end a turn to those at which the saved model's generation stops."""
    inner = unwrap_adapters(model)
    settings = inner.generation_config
    known = listed_ends(settings)
    if not encoder.ends.issubset(known):
        settings.eos_token_id = [*known, *sorted(encoder.ends.difference(known))]
    # Converters to other formats read this one.
    inner.config.get_text_config().eos_token_id = settings.eos_token_id


def save_policy(
    student: Student, roles: Roles, sft: Path, encoder: Encoder, path: Path, whole: dict[str, Tensor] | None = None
) -> None:
    """Save the policy so that it loads on the base weights; for `whole` see `save_model`.

    Stage II's adapter was trained on top of Stage I's, so the two are concatenated into one adapter of their summed
    rank, which is exact.
    """
    if student.lora is None:
        save_model(student, roles.policy, encoder, path, whole)
        return
    path.mkdir(parents=True, exist_ok=True)
    _stop_at_ends(roles.policy, encoder)
    combine_adapters(cast(PeftModel, roles.policy), sft, path)
    _save_companions(student, roles.policy, encoder, path)


def _save_companions(student: Student, model: CausalLM, encoder: Encoder, path: Path) -> None:
    """Save what goes with weights or an adapter at `path`, and let the umask say who may read the weights.

    An adapter gets a generation configuration too, so that a server that merges it knows where to stop.
    """
    unwrap_adapters(model).generation_config.to_json_file(path / "generation_config.json", use_diff=True)
    save_processor(encoder.processor, student.model, path)
    described = path / (_ADAPTER if (path / _ADAPTER).exists() else "config.json")
    for file in path.glob("*.safetensors"):
        shutil.copymode(described, file)  # safetensors writes files that only their owner may read


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, each shared tensor counted once."""
    return sum(p.numel() for p in model.parameters())


def context_length(model: str) -> int | None:
    """Return the maximum number of positions of a model directory or hub id, if its configuration states it."""
    config = load_part(AutoConfig, model)
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _dtype(student: Student) -> torch.dtype | str:
    if student.dtype == "auto":
        # Weights that are trained need float32: small updates vanish in bfloat16.
        frozen_base = student.lora is not None and torch.cuda.is_available()
        return "auto" if frozen_base else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[student.dtype]


def default_device() -> torch.device:
    """Return the device that models are put on: on a machine with several GPUs, this process's own."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _load_error(model: str, error: Exception) -> UserError:
    return UserError(f"student.model: {model} cannot be loaded: {reason_of(error)}.")

"""The causal language models that purld works with, as types: what the code uses of a transformers model.

Loading is `purld.model.load`'s. The protocols are structural, because neither a peft wrapper nor a model under FSDP
or `torch.compile` is a `PreTrainedModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig


class CausalLMOutput(Protocol):
    """The output of a model with its LM head."""

    logits: Tensor
    loss: Tensor | None


class BodyOutput(Protocol):
    """The output of a model without its LM head."""

    last_hidden_state: Tensor
    past_key_values: Any  # a transformers Cache; its layers are checked by `purld.model.cache`


class CausalLM(Protocol):
    """A transformers model that generates text, bare or under adapters.

    Attributes:
        generation_config: the defaults of `generate`.
        training: whether the model is in training mode.
    """

    generation_config: GenerationConfig
    training: bool

    @property
    def config(self) -> PreTrainedConfig:
        """The architecture; under adapters that of the model under them."""
        ...

    @property
    def base_model(self) -> nn.Module:
        """The model without its LM head. Under adapters it is the tuner: call `unwrap_adapters` first."""
        ...

    def __call__(self, *args: Any, **inputs: Any) -> CausalLMOutput:
        """Return logits, with the loss if there are labels."""
        ...

    @property
    def generate(self) -> Any:
        """The function that returns (B, L) token ids, or an output object if `return_dict_in_generate` is set."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that maps token ids to embeddings."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """See `nn.Module`."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See `nn.Module`."""
        ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module`."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """See `nn.Module`."""
        ...

    def train(self, mode: bool = True) -> Self:
        """See `nn.Module`."""
        ...

    def eval(self) -> Self:
        """See `nn.Module`."""
        ...

    def save_pretrained(self, save_directory: str, **options: Any) -> Any:
        """Save the weights, or the adapter's, as a Hugging Face directory."""
        ...


class AdaptedCausalLM(CausalLM, Protocol):
    """A causal language model under peft adapters."""

    def get_base_model(self) -> CausalLM:
        """Return the model under the adapters, in whose layers they are."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Switch the adapters off while the context lasts."""
        ...


def has_adapters(model: CausalLM) -> TypeGuard[AdaptedCausalLM]:
    """Return whether the model is under adapters."""
    return hasattr(model, "get_base_model")


def unwrap_adapters(model: CausalLM) -> CausalLM:
    """Return the model under its adapters, or the model itself if it has none."""
    return model.get_base_model() if has_adapters(model) else model


def model_device(model: CausalLM) -> torch.device:
    """Return the device of the model's first parameter, where its inputs go."""
    return next(model.parameters()).device

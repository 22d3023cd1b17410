"""Estimate by arithmetic what an update of Stage II keeps in memory, and how large a micro-batch may be.

The counts per token and layer are those of a Llama-like decoder in float32, measured on what autograd saves
(tests/model/test_memory.py measures them again). They are estimates: kernels, fragmentation and the vision tower of a
model that reads images come on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from purld.model.body_and_head import CHUNK_TOKENS

FIT = 0.9  # of a device's memory: the rest is for fragments and kernels


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that memory depends on.

    Attributes:
        layers: the number of layers.
        hidden: the width of the hidden states.
        queries: the width of all query heads together.
        keys: the width of all key heads together, and that of all value heads.
        intermediate: the width of the feed-forward part that one token runs through.
        vocabulary: the number of tokens.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Return the shape of a model by its configuration (that of its text part, if it has one)."""
        text = config.get_text_config()
        hidden = _size(text, "hidden_size")
        heads = _size(text, "num_attention_heads") or 1  # a state-space model has none; its state counts as one
        width = _size(text, "head_dim") or hidden // heads
        inner = _size(text, "intermediate_size") or _size(text, "ffn_dim") or 4 * hidden
        if experts := _size(text, "num_experts_per_tok"):
            inner = (_size(text, "moe_intermediate_size") or inner) * experts
            inner += _size(text, "shared_expert_intermediate_size")
        key_heads = _size(text, "num_key_value_heads") or heads
        return cls(text.num_hidden_layers, hidden, heads * width, key_heads * width, inner, int(text.vocab_size))

    def layer_bytes(self, tokens: int, width: int) -> int:
        """Return what one layer keeps for the backward pass of so many tokens, without the keys and values before."""
        return tokens * width * (6 * self.hidden + 3 * self.queries + 3 * self.keys + 4 * self.intermediate)

    @property
    def gathered_weights(self) -> int:
        """Return how many weights a process gathers at once where processes divide them: the next unit comes early."""
        layer = 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.intermediate
        return layer + max(layer, self.vocabulary * self.hidden)

    def ends_bytes(self, tokens: int, width: int) -> int:
        """Return what the embedding, the last norm and the head's chunks keep for the backward pass of such tokens."""
        return 3 * tokens * width * self.hidden


def _size(config: Any, name: str) -> int:
    """Return a size in a configuration: 0 if it has none, the largest where layers differ."""
    value = getattr(config, name, None) or 0
    return max((int(layer or 0) for layer in value), default=0) if isinstance(value, list | tuple) else int(value)


@dataclass(frozen=True)
class UpdateSizes:
    """What one update of Stage II works on.

    Attributes:
        prompt: tokens of the longest prompt.
        answer: tokens of the longest answer.
        members: members of a group.
        drawn: sequences drawn at once, with their caches.
        groups: groups that may share a pass.
    """

    prompt: int
    answer: int
    members: int
    drawn: int
    groups: int = 1

    def together(self, micro_batch: int) -> int:
        """Return how many whole groups share a pass of `micro_batch` members; 1 if one alone takes several."""
        return min(max(micro_batch // self.members, 1), self.groups)


@dataclass(frozen=True)
class MemoryNeed:
    """The bytes of Stage II at its peak: weights and optimiser, and the larger of sampling and an update.

    Attributes:
        weights: all weights, the frozen p_sft included.
        training: gradients, the optimiser's moments, and the copies of the weights that layers in half precision use.
        cache: the prompt's keys and values and their gradients, and what the prompt's layers keep.
        activations: what a micro-batch's layers keep.
        logits: the logits of the tokens that are in memory at once.
        sampling: keys and values of the sequences drawn at once.
    """

    weights: int
    training: int
    cache: int
    activations: int
    logits: int
    sampling: int

    @property
    def total(self) -> int:
        """Return the peak."""
        return self.weights + self.training + max(self.cache + self.activations + self.logits, self.sampling)


def estimate_memory(
    shape: DecoderShape,
    sizes: UpdateSizes,
    weights: int,
    trained: int,
    micro_batch: int,
    recompute: bool,
    width: int,
) -> MemoryNeed:
    """Return the memory of Stage II on one device.

    Args:
        shape: the decoder.
        sizes: the update.
        weights: bytes of all weights, the frozen p_sft included.
        trained: the number of weights that are trained.
        micro_batch: members per backward pass, of one group or of several whole ones.
        recompute: whether layers are computed again in the backward pass.
        width: bytes of a number in the layers: 4, or 2 in half precision.
    """
    together = sizes.together(micro_batch)
    rows, prompts = min(micro_batch, together * sizes.members), together * sizes.prompt
    tokens, read = rows * sizes.answer, rows * (sizes.prompt + sizes.answer)
    # Continuations attend with a mask, for which keys and values are repeated for every query head.
    one_layer = shape.layer_bytes(tokens, width) + 2 * read * shape.queries * width
    prompt_layer = shape.layer_bytes(prompts, width)
    activations, cache = shape.layers * one_layer, shape.layers * prompt_layer
    if recompute:  # the inputs of the layers, and the contents of the one that is being computed again
        activations = shape.layers * tokens * shape.hidden * width + one_layer
        cache = shape.layers * prompts * shape.hidden * width + prompt_layer
    activations += shape.ends_bytes(tokens, width)
    cache += shape.ends_bytes(prompts, width)
    per_token = 2 * shape.layers * shape.keys * width
    return MemoryNeed(
        weights=weights,
        training=(12 if width == 4 else 12 + width) * trained,  # autocast's copies stay for the backward pass
        cache=cache + 2 * prompts * per_token,
        activations=activations,
        logits=3 * 4 * min(CHUNK_TOKENS, tokens) * shape.vocabulary,
        sampling=sizes.drawn * (sizes.prompt + sizes.answer) * per_token,
    )


def largest_micro_batch(need: Callable[[int], MemoryNeed], device: int, members: int, groups: int = 1) -> int | None:
    """Return the largest micro-batch that fits a device: whole groups, or a power of two; None if not even 1 fits.

    Args:
        need: micro-batch size -> `MemoryNeed`.
        device: bytes of the device.
        members: members of a group.
        groups: groups at most.
    """
    powers = [2**n for n in range(members.bit_length())]
    sizes = [*(size for size in powers if size < members), *(members * n for n in range(1, groups + 1))]
    fitting = [size for size in sizes if need(size).total <= FIT * device]
    return max(fitting, default=None)


def device_memory() -> int:
    """Return the bytes of memory of the device that models are put on: a GPU's, or this machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return min(_physical_memory(), _container_memory())


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> int:
    """Return the limit of the container that the process is in; a number beyond all memory where there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as handle:
            text = handle.read().strip()
    except OSError:
        text = "max"
    return int(text) if text.isdigit() else 2**62

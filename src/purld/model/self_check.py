"""The checks whether a model may share a prefix, and run several in one pass: on the first groups that it meets.

The first compares, with full sequences, the log-probs of two of the group's rows and their gradient at the prompt's
embeddings, which passes through every key and value of the cache; and, if vision modules are trained, the gradient at
their first weights. A model that disagrees, or fails, works on full sequences from then on, after one warning. A
sliding window that a group exceeds, a length from which positions are turned by other frequencies, and a prompt with
images are checked separately. The verdict depends on the model and not on which group came first, except for bugs that
only some groups show. The second compares two groups in one pass with each of them alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from purld.errors import PlainWarning, reason_of
from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.out_of_memory import is_out_of_memory
from purld.model.prefix import FullSequences, Prefixes, Rows, SharedPrefixes
from purld.model.vision import EncodedPrompt, vision_modules

Item = TypeVar("Item")

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # in configurations; the last is GPT-Neo's

# By model, then by the number of exceeded windows and whether there are images.
_verdicts: WeakKeyDictionary[CausalLM, dict[tuple[int, bool], bool]] = WeakKeyDictionary()
# By model, then by whether the prefixes differ in length.
_joint_verdicts: WeakKeyDictionary[CausalLM, dict[bool, bool]] = WeakKeyDictionary()
_refused: WeakSet[CausalLM] = WeakSet()  # models whose cache could not be used after all


def can_share_prefix(model: CausalLM, prompt: EncodedPrompt, rows: Rows, pad: int) -> bool:
    """Return whether `SharedPrefixes` gives this model's numbers and gradients.

    Args:
        model: a causal language model, in evaluation mode.
        prompt: the prefix.
        rows: its continuations.
        pad: a token id to pad with.
    """
    causal = unwrap_adapters(model)
    if causal in _refused:
        return False
    verdicts = _verdicts.setdefault(causal, {})
    case = count_exceeded_windows(model, len(prompt) + max(map(len, rows))), bool(prompt.images)
    if case not in verdicts:
        problem = _within_memory(partial(_sharing_problem, model, prompt, _shortest_and_longest(rows, len), pad))
        verdicts[case] = problem is None
        if problem is not None:
            _warn_of_sharing(causal, problem)
    return verdicts[case]


def can_join(model: CausalLM, groups: Sequence[tuple[EncodedPrompt, Rows]], pad: int) -> bool:
    """Return whether groups give the numbers and gradients in one pass that each gives alone.

    Args:
        model: a causal language model, in evaluation mode.
        groups: prefixes without images, each with its continuations; where prefixes are shared, no window counts the
            padding between them (`windows_count_padding`).
        pad: a token id to pad with.
    """
    sharing = {can_share_prefix(model, prompt, rows, pad) for prompt, rows in groups}
    if sharing != {True}:
        return len(sharing) == 1  # full sequences are padded at their end alone
    is_padded = _is_padded(groups)
    causal = unwrap_adapters(model)
    verdicts = _joint_verdicts.setdefault(causal, {})
    if is_padded not in verdicts:
        some = [(p, _shortest_and_longest(rows, len)) for p, rows in _shortest_and_longest(groups, lambda g: len(g[0]))]
        problem = _within_memory(partial(_joining_problem, model, some, pad))
        verdicts[is_padded] = problem is None
        if problem is not None:
            _warn(causal, f"every group takes a pass of its own, because several in one do not work: {problem}")
    return verdicts[is_padded]


def windows_count_padding(model: CausalLM, groups: Sequence[tuple[EncodedPrompt, Rows]]) -> bool:
    """Return whether groups in one pass outgrow a window that would count the padding between them.

    It is put between a shorter prefix and its continuations. No position counts it, but a window does.
    """
    longest = max(len(prompt) for prompt, _ in groups) + max(len(row) for _, rows in groups for row in rows)
    return _is_padded(groups) and count_exceeded_windows(model, longest) > 0


def _is_padded(groups: Sequence[tuple[EncodedPrompt, Rows]]) -> bool:
    return len({len(prompt) for prompt, _ in groups}) > 1


def refuse_sharing(model: CausalLM, problem: str) -> None:
    """Let a model work on full sequences from now on, after one warning that says why; `problem` is a clause."""
    causal = unwrap_adapters(model)
    if causal not in _refused:
        _refused.add(causal)
        _warn_of_sharing(causal, problem)


def _warn_of_sharing(causal: CausalLM, problem: str) -> None:
    _warn(
        causal,
        "a group's prompt is computed anew for every candidate, because sharing it does not work with this model: "
        f"{problem}",
    )


def _warn(causal: CausalLM, consequence: str) -> None:
    warnings.warn(f"{type(causal).__name__}: {consequence}.", PlainWarning, stacklevel=4)


def _shortest_and_longest(items: Sequence[Item], length: Callable[[Item], int]) -> list[Item]:
    return sorted(items, key=length)[:: max(1, len(items) - 1)]


def count_exceeded_windows(model: CausalLM, length: int) -> int:
    """Return how many of the sizes from which a model's attention is another one are exceeded by `length` tokens."""
    config = unwrap_adapters(model).config.get_text_config()
    sizes = [*(getattr(config, name, None) for name in _WINDOWS), _length_of_other_positions(config)]
    return sum(length > size for size in sizes if isinstance(size, int) and size > 0)  # 0: there is none


def _length_of_other_positions(config: PreTrainedConfig) -> int | None:
    """Return from which length on rotary embeddings take other frequencies; None for those that never do."""
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *(value for value in found.values() if isinstance(value, dict))):  # of all layers, or by kind
        if rope.get("rope_type") == "dynamic":
            return getattr(config, "max_position_embeddings", None)
        if rope.get("rope_type") == "longrope":
            inside = rope.get("original_max_position_embeddings")
            return inside or getattr(config, "original_max_position_embeddings", None)
    return None


def _within_memory(problem: Callable[[bool], str | None]) -> str | None:
    """Make a check, and again with recomputed layers if the device's memory is too small for it.

    Whole sequences with a graph through all layers take more than an update that recomputes them. The check does not
    begin with that, so that a model whose layers cannot be recomputed is not taken for one that cannot share.
    """
    try:
        return problem(False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return problem(True)  # out here, where nothing holds what the first try had made


def _sharing_problem(model: CausalLM, prompt: EncodedPrompt, rows: Rows, pad: int, recompute: bool) -> str | None:
    """Return what is wrong with sharing a prefix, as a clause; None if nothing is."""
    group = [(prompt, rows)]
    plain = _numbers(model, partial(FullSequences, model, [prompt], pad, recompute), group)
    shared = partial(SharedPrefixes, model, [prompt], pad, recompute=recompute)
    return _disagreement(model, lambda: _numbers(model, shared, group), plain)


def _joining_problem(
    model: CausalLM, groups: Sequence[tuple[EncodedPrompt, Rows]], pad: int, recompute: bool
) -> str | None:
    """Return what is wrong with one pass for several groups, as a clause; None if nothing is."""

    def prefixes(prompts: Sequence[EncodedPrompt]) -> Callable[[], Prefixes]:
        return partial(SharedPrefixes, model, prompts, pad, recompute=recompute)

    alone = [_numbers(model, prefixes([prompt]), [(prompt, rows)]) for prompt, rows in groups]
    expected = tuple(torch.cat(parts) for parts in zip(*alone))
    together = prefixes([prompt for prompt, _ in groups])
    return _disagreement(model, lambda: _numbers(model, together, groups), expected)


def _disagreement(
    model: CausalLM, numbers: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...]
) -> str | None:
    """Return in what numbers differ from those that are expected, as a clause; None if in nothing."""
    try:
        found = numbers()
    except Exception as error:  # an unknown architecture may raise anything
        if is_out_of_memory(error):
            raise
        return reason_of(error)
    # Rounding differs where shapes do, and grows in the backward pass; a cache that is misread, or cut off from its
    # gradient, is off by about 1. The precision is that of the weights or of autocast.
    tolerance = max(torch.finfo(_precision(model)).eps ** 0.5, 1e-3)
    names = ("log-probabilities", "gradients", "gradients of its vision weights")
    for name, actual, right, allowed in zip(names, found, expected, (tolerance, 4 * tolerance, 4 * tolerance)):
        off_by = ((actual - right).norm() / right.norm().clamp(min=1e-12)).item()
        if not off_by <= allowed:
            return f"its {name} are off by {off_by:.1e} of their size"
    return None


@torch.enable_grad()
def _numbers(
    model: CausalLM, make_prefixes: Callable[[], Prefixes], groups: Sequence[tuple[EncodedPrompt, Rows]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probs of the groups' rows, flat, and gradients of their sum.

    The gradients are those at the prompts' embeddings, flat, and those at the first two weights of vision modules that
    are trained, flat; the latter are empty for prompts without images.
    """
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())  # the graph begins here, whatever is frozen below
        return embedded[-1]

    rows = [row for _, own in groups for row in own]
    owners = [index for index, (_, own) in enumerate(groups) for _ in own]
    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        log_probs, mask = make_prefixes().token_log_probs(rows, owners)
    finally:
        handle.remove()
    # The first embeddings contain the prompts: (G, P, H), or with every continuation of one of them (R, P + C, H).
    # Two, because an adapter's first factor has no gradient while its second is zero, as in a new one.
    vision_weights = _trained_vision_weights(model)[:2] if any(prompt.images for prompt, _ in groups) else []
    inputs = [embedded[0], *vision_weights]
    gradient, *others = torch.autograd.grad(log_probs.sum(), inputs, allow_unused=True)
    vision_gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(vision_weights, others)]
    flat = torch.cat([g.float().flatten() for g in vision_gradients]) if vision_gradients else torch.zeros(0)
    of_groups = gradient.float() if len(groups) == len(gradient) else gradient.float().sum(dim=0, keepdim=True)
    of_prompts = [found[: len(prompt)].flatten() for found, (prompt, _) in zip(of_groups, groups, strict=True)]
    return log_probs.detach()[mask.bool()], torch.cat(of_prompts), flat


def _trained_vision_weights(model: CausalLM) -> list[Tensor]:
    modules = vision_modules(model).values()
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _precision(model: CausalLM) -> torch.dtype:
    device = model_device(model).type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return cast(Tensor, model.get_input_embeddings().weight).dtype

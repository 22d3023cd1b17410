"""The check whether a model may share a prefix: on the first group it meets, against full sequences.

It compares the log-probs of two of the group's rows and their gradient at the prompt's embeddings, which passes
through every key and value of the cache; and, if vision modules are trained, the gradient at their first weights. A
model that disagrees, or fails, works on full sequences from then on, after one warning. A sliding window that a group
exceeds and a prompt with images are checked separately. The verdict depends on the model and not on which group came
first, except for bugs that only some groups show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from purld.errors import PlainWarning, reason_of
from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.prefix import FullSequences, Prefix, SharedPrefix
from purld.model.vision import EncodedPrompt, vision_modules

# By model, then by the number of exceeded windows and whether there are images.
_verdicts: WeakKeyDictionary[CausalLM, dict[tuple[int, bool], bool]] = WeakKeyDictionary()
_refused: WeakSet[CausalLM] = WeakSet()  # models whose cache could not be used after all


def can_share_prefix(model: CausalLM, prompt: EncodedPrompt, rows: Sequence[Sequence[int]], pad: int) -> bool:
    """Return whether `SharedPrefix` gives this model's numbers and gradients.

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
        problem = _disagreement(model, prompt, sorted(rows, key=len)[:: max(1, len(rows) - 1)], pad)
        verdicts[case] = problem is None
        if problem is not None:
            _warn(causal, problem)
    return verdicts[case]


def refuse_sharing(model: CausalLM, problem: str) -> None:
    """Let a model work on full sequences from now on, after one warning that says why; `problem` is a clause."""
    causal = unwrap_adapters(model)
    if causal not in _refused:
        _refused.add(causal)
        _warn(causal, problem)


def _warn(causal: CausalLM, problem: str) -> None:
    warnings.warn(
        f"{type(causal).__name__}: a group's prompt is computed anew for every candidate, because sharing "
        f"it does not work with this model: {problem}.",
        PlainWarning,
        stacklevel=3,
    )


def count_exceeded_windows(model: CausalLM, length: int) -> int:
    """Return how many of the sizes that may limit a model's attention are exceeded by `length` tokens."""
    config = unwrap_adapters(model).config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return sum(length > size for size in sizes if isinstance(size, int))


def _disagreement(model: CausalLM, prompt: EncodedPrompt, rows: Sequence[Sequence[int]], pad: int) -> str | None:
    """Return what is wrong with sharing, as a clause; None if nothing is."""
    plain = _numbers(model, lambda: FullSequences(model, prompt, pad), rows, prompt)
    try:
        shared = _numbers(model, lambda: SharedPrefix(model, prompt, pad), rows, prompt)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an unknown architecture may raise anything
        return reason_of(error)
    # Rounding differs where shapes do, and grows in the backward pass; a cache that is misread, or cut off from its
    # gradient, is off by about 1. The precision is that of the weights or of autocast.
    tolerance = max(torch.finfo(_precision(model)).eps ** 0.5, 1e-3)
    names = ("log-probabilities", "gradients", "gradients of its vision weights")
    for name, actual, expected, allowed in zip(names, shared, plain, (tolerance, 4 * tolerance, 4 * tolerance)):
        off_by = ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        if not off_by <= allowed:
            return f"its {name} are off by {off_by:.1e} of their size"
    return None


@torch.enable_grad()
def _numbers(
    model: CausalLM, make_prefix: Callable[[], Prefix], rows: Sequence[Sequence[int]], prompt: EncodedPrompt
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (R, C) log-probs of rows, and gradients of their mean.

    The gradients are (P, H) at the prompt's embeddings, and those at the first weights of vision modules that are
    trained, flat; the latter are empty for a prompt without images.
    """
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())  # the graph begins here, whatever is frozen below
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        log_probs, mask = make_prefix().token_log_probs(rows)
    finally:
        handle.remove()
    # The first embeddings contain the prompt: alone (1, P, H), or with every continuation (R, P + C, H).
    vision_weights = _trained_vision_weights(model)[:1] if prompt.images else []
    inputs = [embedded[0], *vision_weights]
    gradient, *others = torch.autograd.grad(log_probs.sum() / mask.sum(), inputs, allow_unused=True)
    vision_gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(vision_weights, others)]
    flat = torch.cat([g.float().flatten() for g in vision_gradients]) if vision_gradients else torch.zeros(0)
    return log_probs.detach(), gradient[:, : len(prompt)].float().sum(dim=0), flat


def _trained_vision_weights(model: CausalLM) -> list[Tensor]:
    modules = vision_modules(model).values()
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _precision(model: CausalLM) -> torch.dtype:
    device = model_device(model).type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return cast(Tensor, model.get_input_embeddings().weight).dtype

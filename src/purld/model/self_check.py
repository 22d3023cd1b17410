"""Whether a model may share a head: tried out on the first group it meets, against full sequences.

Compared are the log-probabilities of two of the group's rows and their gradient at the prompt's embeddings, which
passes through every key and value of the cache; and, where a vision is trained, the gradient at its first weights. A
model that disagrees, or cannot do it at all, works on full sequences from then on, and says so once. A sliding window
that a group outgrows and a head with pictures are other cases and are tried out again. The verdict depends on the model
and not on which group came first, short of a bug that only some groups show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from purld.errors import PlainWarning, reason_of
from purld.model.body_and_head import unwrap_adapters
from purld.model.prefix import FullSequences, Prefix, SharedPrefix
from purld.model.vision import EncodedPrompt, vision_modules

_verdicts: WeakKeyDictionary[Any, dict[tuple[int, bool], bool]] = WeakKeyDictionary()


def can_share_prefix(model: Any, head: EncodedPrompt, rows: Sequence[Sequence[int]], pad: int) -> bool:
    """Whether `SharedPrefix` gives this model's numbers and gradients.

    Args:
        model: a causal language model, in evaluation mode.
        head: the head in question.
        rows: its continuations.
        pad: a token id to pad with.
    """
    causal = unwrap_adapters(model)
    verdicts = _verdicts.setdefault(causal, {})
    case = exceeded_windows(model, len(head) + max(map(len, rows))), bool(head.images)
    if case not in verdicts:
        problem = _disagreement(model, head, sorted(rows, key=len)[:: max(1, len(rows) - 1)], pad)
        verdicts[case] = problem is None
        if problem is not None:
            warnings.warn(
                f"{type(causal).__name__}: a group's prompt is computed anew for every candidate, because sharing "
                f"it does not work with this model: {problem}.",
                PlainWarning,
                stacklevel=2,
            )
    return verdicts[case]


def exceeded_windows(model: Any, length: int) -> int:
    """How many of the sizes that may limit a model's attention are exceeded by `length` tokens."""
    config = unwrap_adapters(model).config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return sum(length > size for size in sizes if isinstance(size, int))


def _disagreement(model: Any, head: EncodedPrompt, rows: Sequence[Sequence[int]], pad: int) -> str | None:
    """What is wrong with sharing, in a clause; None if nothing is."""
    plain = _numbers(model, lambda: FullSequences(model, head, pad), rows, head)
    try:
        shared = _numbers(model, lambda: SharedPrefix(model, head, pad), rows, head)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an unknown architecture may raise
        return reason_of(error)
    # Rounding differs where shapes do, and grows on its way back; a cache that is read wrongly, or cut off from its
    # gradient, is off by about 1. The precision is that of the weights or of autocast.
    tolerance = max(torch.finfo(_precision(model)).eps ** 0.5, 1e-3)
    names = ("log-probabilities", "gradients", "gradients of what it sees pictures with")
    for name, found, expected, allowed in zip(names, shared, plain, (tolerance, 4 * tolerance, 4 * tolerance)):
        off_by = ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        if not off_by <= allowed:
            return f"its {name} are off by {off_by:.1e} of their size"
    return None


@torch.enable_grad()
def _numbers(
    model: Any, prefix: Callable[[], Prefix], rows: Sequence[Sequence[int]], head: EncodedPrompt
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, C) log-probabilities of rows, and the gradients of their mean: (P, H) at the head's embeddings, and at the
    first weights of a vision that is trained and has something to see, else none.
    """
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())  # the graph begins here, whatever is frozen below
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        log_probs, mask = prefix().token_log_probs(rows)
    finally:
        handle.remove()
    # The first embeddings hold the head: alone (1, P, H), or with every continuation (R, P + C, H).
    seeing = _seeing(model)[:1] if head.images else []
    gradient, *others = torch.autograd.grad(log_probs.sum() / mask.sum(), [embedded[0], *seeing], allow_unused=True)
    seen = [torch.zeros_like(p) if g is None else g for p, g in zip(seeing, others)]
    flat = torch.cat([g.float().flatten() for g in seen]) if seen else torch.zeros(0)
    return log_probs.detach(), gradient[:, : len(head)].float().sum(dim=0), flat


def _seeing(model: Any) -> list[Tensor]:
    """The weights that only pictures pass through, as far as they are trained."""
    modules = vision_modules(model).values()
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _precision(model: Any) -> torch.dtype:
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.get_input_embeddings().weight.dtype

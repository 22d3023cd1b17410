"""A group's shared head is computed once: sequence log-likelihoods and closing logits of K continuations.

The head (a prompt, or everything of a self-evaluation prompt before the candidate) runs once at batch size 1
into the ordinary key-value cache, with or without gradients; the cache is repeated K times and the K
continuations run on top of it. Log-probabilities are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from purld.student.encode import pad_left, pad_right


def token_log_probs(
    model: Any, head: Sequence[int], completions: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor]:
    """log p(y_kt | x, y_k<t) in nats of K completions of one prompt: (K, C), float32, and its (K, C) mask.

    Args:
        model: a causal language model; gradients flow if they are enabled.
        head: token ids of the prompt.
        completions: K non-empty completions as token ids, end-of-turn included where it was sampled.
        pad: a token id to pad with.

    Returns:
        The log-probabilities, 0 after a completion's end, and a mask that is 1 on its tokens and 0 after them.
    """
    device = next(model.parameters()).device
    # A completion's last token is predicted but predicts nothing.
    inputs, mask = pad_right([c[:-1] for c in completions], pad, device)  # (K, C-1)
    targets, counted = pad_right(completions, pad, device)  # (K, C)
    cache, last = _prefill(model, head, len(completions), device)
    first = last.expand(len(completions), 1, -1)  # (K, 1, V): predicts the first token
    if inputs.shape[1] == 0:
        logits = first
    else:
        output = _continue(model, cache, inputs, mask, len(head))
        logits = torch.cat([first, output], dim=1)  # (K, C, V)
    logits = logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (K, C)
    return (chosen - torch.logsumexp(logits, dim=-1)) * counted, counted


def sequence_log_probs(model: Any, head: Sequence[int], completions: Sequence[Sequence[int]], pad: int) -> Tensor:
    """log p(y_k | x) in nats of K completions of one prompt: (K,), `token_log_probs` summed over tokens."""
    log_probs, _ = token_log_probs(model, head, completions, pad)
    return log_probs.sum(dim=1)


def closing_logits(model: Any, head: Sequence[int], tails: Sequence[Sequence[int]], count: int, pad: int) -> Tensor:
    """The logits at the last `count` positions of head + tail, for B tails: (B, count, V), float32."""
    device = next(model.parameters()).device
    inputs, mask = pad_left(tails, pad, device)
    cache, _ = _prefill(model, head, len(tails), device)
    return _continue(model, cache, inputs, mask, len(head), logits_to_keep=count).float()


def micro_batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _prefill(model: Any, head: Sequence[int], copies: int, device: torch.device) -> tuple[Any, Tensor]:
    """The cache of `head`, repeated, and the logits (1, 1, V) after its last token."""
    ids = torch.tensor([list(head)], dtype=torch.long, device=device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(copies)
    return cache, output.logits


def _continue(
    model: Any, cache: Any, inputs: Tensor, mask: Tensor, head_length: int, logits_to_keep: int = 0
) -> Tensor:
    """Logits (B, L, V) of continuations (B, L) on a repeated cache; `mask` is 0 where they are padded."""
    past = torch.ones(mask.shape[0], head_length, dtype=mask.dtype, device=mask.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + head_length
    output = model(
        input_ids=inputs,
        attention_mask=torch.cat([past, mask], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logits_to_keep,
    )
    logits: Tensor = output.logits
    return logits

"""Log-probs of several continuations of one prefix, which is computed once for models where that is exact.

Log-probs are float32 whatever the weights are. `purld.model.self_check` decides on the first group that a model meets
whether it may share a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from purld.model.causal_lm import CausalLM
from purld.model.prefix import FullSequences, Prefix, SharedPrefix
from purld.model.self_check import can_share_prefix
from purld.model.vision import EncodedPrompt


def make_prefix(
    model: CausalLM,
    prompt: EncodedPrompt,
    rows: Sequence[Sequence[int]],
    pad: int,
    cut: bool = False,
    recompute: bool = False,
) -> Prefix:
    """Return the prefix of a group, shared if the model allows it.

    Args:
        model: see `SharedPrefix`.
        prompt: see `SharedPrefix`.
        rows: the group's continuations, to check with; all or some of them are then given to the prefix.
        pad: see `SharedPrefix`.
        cut: see `SharedPrefix`.
        recompute: see `SharedPrefix`.
    """
    if can_share_prefix(model, prompt, rows, pad):
        return SharedPrefix(model, prompt, pad, cut, recompute)
    return FullSequences(model, prompt, pad, recompute)


def token_log_probs(
    model: CausalLM, prompt: EncodedPrompt, completions: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor]:
    """Return log p(y_kt | x, y_k<t) in nats of every token of K completions of one prompt.

    Args:
        model: a causal language model; gradients flow if they are enabled.
        prompt: the prompt x.
        completions: K non-empty completions as token ids, with end-of-turn where it was sampled.
        pad: a token id to pad with.

    Returns:
        (K, C) log-probs, float32, 0 on padding, and their (K, C) mask, 0 on padding and 1 elsewhere.
    """
    return make_prefix(model, prompt, completions, pad).token_log_probs(completions)


def micro_batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

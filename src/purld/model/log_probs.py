"""Log-likelihoods and closing logits of K continuations of one head, the head computed once where that is sound.

Log-probabilities are float32 whatever the weights are. Whether a model's head may be shared is found out by
`purld.model.self_check` on the first group that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from purld.model.prefix import FullSequences, Prefix, SharedPrefix
from purld.model.self_check import can_share_prefix
from purld.model.vision import EncodedPrompt


def make_prefix(model: Any, head: EncodedPrompt, rows: Sequence[Sequence[int]], pad: int, cut: bool = False) -> Prefix:
    """The head of a group, to put some or all of its `rows` to; see `SharedPrefix` for the other arguments."""
    if can_share_prefix(model, head, rows, pad):
        return SharedPrefix(model, head, pad, cut)
    return FullSequences(model, head, pad)


def token_log_probs(
    model: Any, head: EncodedPrompt, completions: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor]:
    """log p(y_kt | x, y_k<t) in nats of every token of K completions of one prompt.

    Args:
        model: a causal language model; gradients flow if they are enabled.
        head: the prompt.
        completions: K non-empty completions as token ids, end-of-turn included where it was sampled.
        pad: a token id to pad with.

    Returns:
        (K, C) log-probabilities, float32, 0 where padded, and the (K, C) mask of ones where they are not.
    """
    return make_prefix(model, head, completions, pad).token_log_probs(completions)


def sequence_log_probs(model: Any, head: EncodedPrompt, completions: Sequence[Sequence[int]], pad: int) -> Tensor:
    """log p(y_k | x) in nats: `token_log_probs` summed over tokens, (K,), float32."""
    return token_log_probs(model, head, completions, pad)[0].sum(dim=1)


def micro_batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

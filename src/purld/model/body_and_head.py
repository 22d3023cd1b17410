"""A causal language model in two halves: the body yields hidden states, the head turns them into logits.

Logits are as wide as the vocabulary, so they are made for the tokens that need them and for a few tokens at a
time, and made again on the way back instead of being kept. Whatever an architecture does to its logits (a scale,
a soft cap) is done by its own `forward`, run on hidden states that are already there.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens whose logits are in memory together: enough to keep a GPU's matrix units busy, and at a vocabulary of
# 150,000 still only 150 MB in float32.
_CHUNK = 256
# Models that give pictures positions in three dimensions keep this of the last head they ran, as a state of theirs.
_SHIFT = "rope_deltas"


def unwrap_adapters(model: Any) -> Any:
    """The model under its adapters, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class BodyAndHead:
    """The two halves of a model, with adapters as they are switched when a half is used.

    Args:
        model: a causal language model, bare or under adapters.
    """

    def __init__(self, model: Any) -> None:
        self.causal = unwrap_adapters(model)
        self.body = self.causal.base_model
        if self.body is self.causal:
            raise TypeError(f"{type(self.causal).__name__} does not keep its body apart from its head")

    def hidden_states(
        self, ids: Tensor, cache: Any | None = None, shift: Tensor | None = None, beside: Mapping[str, Any] = {}
    ) -> Any:
        """The body's output for (B, L) token ids, on top of `cache` if there is one; with a new cache if not.

        Args:
            ids: token ids.
            cache: keys and values of what comes before.
            shift: what `shift` said after that had been run.
            beside: what the body takes beside token ids.
        """
        if hasattr(self.body, _SHIFT):
            setattr(self.body, _SHIFT, shift)
        return self.body(input_ids=ids, past_key_values=cache, use_cache=True, **beside)

    @property
    def shift(self) -> Tensor | None:
        """By how much positions go on from another number than that of the tokens, after a head with pictures."""
        shift: Tensor | None = getattr(self.body, _SHIFT, None)
        return shift

    def logits(self, output: Any, hidden: Tensor) -> Tensor:
        """(N, V) logits in float32 of (N, H) hidden states that come from the body's `output`."""
        given = copy.copy(output)
        given.last_hidden_state = hidden.unsqueeze(0)
        placeholder = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
        with _instead_of(self.body, given):
            logits: Tensor = self.causal(input_ids=placeholder).logits
        return logits.squeeze(0).float()

    def log_probs(self, output: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) log-probabilities in float32 of N target tokens at (N, H) hidden states."""

        def of_chunk(states: Tensor, chosen: Tensor) -> Tensor:
            logits = self.logits(output, states)
            return logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)

        chunks = zip(hidden.split(_CHUNK), targets.split(_CHUNK))
        return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks])


@contextlib.contextmanager
def _instead_of(body: Any, output: Any) -> Iterator[None]:
    """While it lasts, calling `body` returns `output`."""
    own = vars(body).get("forward")  # usually none: `forward` is the class's
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own

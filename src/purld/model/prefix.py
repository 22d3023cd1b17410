"""Two ways to the same numbers for K continuations of one head: share the head, or repeat it K times.

The head is a prompt, or everything of a self-evaluation prompt before the candidate. `SharedPrefix` runs it once,
at batch size 1, into the ordinary key-value cache, and the continuations read from that cache; this is exact,
gradients included, because under a causal mask a position's keys and values depend on nothing that comes later.
Its pictures are looked at once with it.
For the same reason continuations are padded on the right and need no mask. `FullSequences` takes nothing for
granted but the model's own `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from purld.model.body_and_head import BodyAndHead
from purld.model.cache import ReadOnlyCache, plain_kv_layers
from purld.model.encode import pad_right
from purld.model.vision import EncodedPrompt, pixel_inputs, vision_features


class Prefix(Protocol):
    """A head that continuations can be put to."""

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities in nats (K, C), float32, 0 where padded, and the (K, C) mask of what is not."""
        ...

    def closing_logits(self, tails: Sequence[Sequence[int]], count: int) -> Tensor:
        """The logits at the last `count` positions of head + tail: (B, count, V), float32."""
        ...

    def backward(self) -> None:
        """Send what the continuations' backward passes left at the head on into the weights."""
        ...


class SharedPrefix:
    """The head, computed once.

    Args:
        model: a causal language model; gradients flow through the head, pictures included, if they are enabled.
        head: what all continuations begin with.
        pad: a token id to pad with.
        cut: stop the continuations' gradients at the head and hold them there until `backward`, so that the head
            is run and differentiated once however many backward passes the continuations are split into.

    Raises:
        TypeError: the model's cache is not a plain one.
    """

    def __init__(self, model: Any, head: EncodedPrompt, pad: int, cut: bool = False) -> None:
        self._halves = BodyAndHead(model)
        self._pad = pad
        self._device = next(model.parameters()).device
        ids = torch.tensor([head.ids], device=self._device)
        output = self._halves.hidden_states(ids, beside=vision_features(model, [head], ids))
        self._shift = self._halves.shift
        self._layers = plain_kv_layers(output.past_key_values)
        self._last = output.last_hidden_state[:, -1:]  # (1, 1, H): predicts the first token
        self._output = copy.copy(output)  # what the head needs of it, and not the whole prompt's hidden states
        self._output.last_hidden_state = self._last.detach()  # in its place: some models ask for it by number
        self._output.past_key_values = None
        self._cuts: list[tuple[Tensor, Tensor]] = []
        if cut and torch.is_grad_enabled():
            self._last = self._cut(self._last)
            for layer in self._layers:
                layer.keys, layer.values = self._cut(layer.keys), self._cut(layer.values)

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """See `Prefix`."""
        targets, mask = pad_right(completions, self._pad, self._device)  # (K, C)
        # A completion's last token is predicted but predicts nothing.
        hidden = torch.cat([self._last.expand(len(targets), -1, -1), self._continued(targets[:, :-1])], dim=1)
        counted = mask.bool()
        values = self._halves.log_probs(self._output, hidden[counted], targets[counted])
        return torch.zeros(mask.shape, device=self._device).masked_scatter(counted, values), mask

    def closing_logits(self, tails: Sequence[Sequence[int]], count: int) -> Tensor:
        """See `Prefix`."""
        hidden = self._continued(pad_right(tails, self._pad, self._device)[0])  # (B, L, H)
        rows, columns = _closing_positions(tails, count, self._device)
        logits = self._halves.logits(self._output, hidden[rows, columns].flatten(0, 1))
        return logits.unflatten(0, (len(tails), count))

    def backward(self) -> None:
        """See `Prefix`."""
        reached = [(whole, leaf.grad) for whole, leaf in self._cuts if leaf.grad is not None]
        if reached:
            wholes, gradients = zip(*reached)
            torch.autograd.backward(wholes, gradients)
        self._cuts = []

    def _continued(self, ids: Tensor) -> Tensor:
        """Hidden states (B, L, H) of right-padded continuations (B, L)."""
        if ids.shape[1] == 0:
            return self._last.new_empty(ids.shape[0], 0, self._last.shape[-1])
        hidden: Tensor = self._halves.hidden_states(ids, ReadOnlyCache(self._layers), self._shift).last_hidden_state
        return hidden

    def _cut(self, whole: Tensor) -> Tensor:
        if not whole.requires_grad:  # the first layer's keys, when only an adapter further up is trained
            return whole
        leaf = whole.detach().requires_grad_()
        self._cuts.append((whole, leaf))
        return leaf


class FullSequences:
    """The head, repeated for every continuation; see `SharedPrefix` for the arguments."""

    def __init__(self, model: Any, head: EncodedPrompt, pad: int) -> None:
        self._model = model
        self._head = head
        self._pad = pad
        self._device = next(model.parameters()).device

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """See `Prefix`."""
        targets, counted = pad_right(completions, self._pad, self._device)  # (K, C)
        logits = self._logits([c[:-1] for c in completions])[:, -targets.shape[1] :]  # (K, C, V)
        values = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
        return values * counted, counted

    def closing_logits(self, tails: Sequence[Sequence[int]], count: int) -> Tensor:
        """See `Prefix`."""
        rows, columns = _closing_positions(tails, count, self._device)
        return self._logits(tails)[rows, columns + 1]

    def backward(self) -> None:
        """Nothing was held back."""

    def _logits(self, tails: Sequence[Sequence[int]]) -> Tensor:
        """(B, 1 + L, V) logits at the head's last position and the tails', which are right-padded."""
        ids, mask = pad_right([[*self._head.ids, *tail] for tail in tails], self._pad, self._device)
        kept = ids.shape[1] - len(self._head) + 1
        beside = pixel_inputs([self._head] * len(tails), ids)
        logits: Tensor = self._model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept, **beside
        ).logits
        return logits[:, -kept:].float()


def _closing_positions(tails: Sequence[Sequence[int]], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row (B, 1) and column (B, count) indices of the last `count` tokens of right-padded tails."""
    ends = torch.tensor([len(tail) for tail in tails], device=device).unsqueeze(1)
    columns = ends + torch.arange(-count, 0, device=device)
    return torch.arange(len(tails), device=device).unsqueeze(1), columns

"""Two ways to the same numbers for several continuations of one prefix: compute it once, or with each of them.

The prefix is a prompt, or a self-evaluation prompt up to the candidate. `SharedPrefix` runs it once, at batch size 1,
into the ordinary key-value cache, and the continuations read that cache. This is exact, gradients included, because
under a causal mask the keys and values of a position depend on nothing that comes later. For the same reason
continuations are padded on the right and need no attention mask. `FullSequences` relies on nothing but the model's
own `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from purld.model.body_and_head import BodyAndHead, chosen_log_probs
from purld.model.cache import ReadOnlyCache, keys_and_values, plain_kv_layers
from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.encode import pad_right
from purld.model.recompute import recomputed_layers
from purld.model.vision import EncodedPrompt, pixel_inputs, vision_features


class Prefix(Protocol):
    """A prefix that continuations can be appended to."""

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (K, C) log-probs in nats, float32, 0 on padding, and their (K, C) mask, 0 on padding."""
        ...

    def closing_logits(self, suffixes: Sequence[Sequence[int]], count: int) -> Tensor:
        """Return the logits at the last `count` positions of prefix + suffix: (B, count, V), float32."""
        ...

    def backward(self) -> None:
        """Propagate the gradients that the continuations' backward passes left at the prefix into the weights."""
        ...


class SharedPrefix:
    """A prefix that is computed once.

    Args:
        model: a causal language model; gradients flow through the prefix, images included, if they are enabled.
        prompt: what all continuations begin with.
        pad: a token id to pad with.
        cut: stop the continuations' gradients at the prefix and hold them there until `backward`, so that the prefix
            is run and differentiated once however many backward passes the continuations are split into.
        recompute: compute the layers again in the backward passes, of the continuations and of the prefix, instead of
            keeping what is in them; the prefix's keys and values stay.

    Raises:
        TypeError: the model's cache is not a plain one, or its body cannot be separated from its LM head.
    """

    def __init__(
        self, model: CausalLM, prompt: EncodedPrompt, pad: int, cut: bool = False, recompute: bool = False
    ) -> None:
        self._parts = BodyAndHead(model, recompute)
        self._pad = pad
        self._device = model_device(model)
        ids = torch.tensor([prompt.ids], device=self._device)
        output = self._parts.hidden_states(ids, extra_inputs=vision_features(model, [prompt], ids))
        self._position_shift = self._parts.position_shift
        self._layers = plain_kv_layers(output.past_key_values)
        self._last = output.last_hidden_state[:, -1:]  # (1, 1, H): predicts the first token
        self._output = copy.copy(output)  # what the LM head needs of it, without the prompt's hidden states
        self._output.last_hidden_state = self._last.detach()  # kept in its position: some models index the output
        self._output.past_key_values = None
        self._cuts: list[tuple[Tensor, Tensor]] = []
        if cut and torch.is_grad_enabled():
            self._last = self._cut(self._last)
            for layer in self._layers:
                layer.keys, layer.values = map(self._cut, keys_and_values(layer))

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """See `Prefix`."""
        targets, mask = pad_right(completions, self._pad, self._device)  # (K, C)
        # A completion's last token is predicted but predicts nothing.
        hidden = torch.cat([self._last.expand(len(targets), -1, -1), self._continue(targets[:, :-1])], dim=1)
        counted = mask.bool()
        values = self._parts.log_probs(self._output, hidden[counted], targets[counted])
        return torch.zeros(mask.shape, device=self._device).masked_scatter(counted, values), mask

    def closing_logits(self, suffixes: Sequence[Sequence[int]], count: int) -> Tensor:
        """See `Prefix`."""
        hidden = self._continue(pad_right(suffixes, self._pad, self._device)[0])  # (B, L, H)
        rows, columns = _closing_positions(suffixes, count, self._device)
        logits = self._parts.logits(self._output, hidden[rows, columns].flatten(0, 1))
        return logits.view(len(suffixes), count, -1)

    def backward(self) -> None:
        """See `Prefix`."""
        with_gradient = [(whole, leaf.grad) for whole, leaf in self._cuts if leaf.grad is not None]
        if with_gradient:
            wholes, gradients = zip(*with_gradient)
            torch.autograd.backward(wholes, gradients)
        self._cuts = []

    def _continue(self, ids: Tensor) -> Tensor:
        """Return hidden states (B, L, H) of right-padded continuations (B, L)."""
        if ids.shape[1] == 0:
            return self._last.new_empty(ids.shape[0], 0, self._last.shape[-1])
        cache = ReadOnlyCache([*self._layers])
        return self._parts.hidden_states(ids, cache, self._position_shift).last_hidden_state

    def _cut(self, whole: Tensor) -> Tensor:
        if not whole.requires_grad:  # the first layer's keys, when only an adapter in later layers is trained
            return whole
        leaf = whole.detach().requires_grad_()
        self._cuts.append((whole, leaf))
        return leaf


class FullSequences:
    """A prefix that is computed with every continuation; see `SharedPrefix` for the arguments."""

    def __init__(self, model: CausalLM, prompt: EncodedPrompt, pad: int, recompute: bool = False) -> None:
        self._model = model
        self._layers: Callable[[], AbstractContextManager[None]] = nullcontext
        if recompute and torch.is_grad_enabled():
            self._layers = partial(recomputed_layers, unwrap_adapters(model).base_model)
        self._prompt = prompt
        self._pad = pad
        self._device = model_device(model)

    def token_log_probs(self, completions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """See `Prefix`."""
        targets, mask = pad_right(completions, self._pad, self._device)  # (K, C)
        logits = self._logits([c[:-1] for c in completions])[:, -targets.shape[1] :]  # (K, C, V)
        values = chosen_log_probs(lambda chunk: chunk, logits.flatten(0, 1), targets.flatten())
        values = values.view(targets.shape)
        return values * mask, mask

    def closing_logits(self, suffixes: Sequence[Sequence[int]], count: int) -> Tensor:
        """See `Prefix`."""
        rows, columns = _closing_positions(suffixes, count, self._device)
        return self._logits(suffixes)[rows, columns + 1].float()

    def backward(self) -> None:
        """Do nothing: no gradient is held back."""

    def _logits(self, suffixes: Sequence[Sequence[int]]) -> Tensor:
        """Return (B, 1 + L, V) logits at the prompt's last position and those of the right-padded suffixes."""
        ids, mask = pad_right([[*self._prompt.ids, *suffix] for suffix in suffixes], self._pad, self._device)
        kept = ids.shape[1] - len(self._prompt) + 1
        extra_inputs = pixel_inputs([self._prompt] * len(suffixes), ids)
        with self._layers():
            logits = self._model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept, **extra_inputs
            ).logits
        return logits[:, -kept:]


def _closing_positions(suffixes: Sequence[Sequence[int]], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row (B, 1) and column (B, count) indices of the last `count` tokens of right-padded suffixes."""
    ends = torch.tensor([len(suffix) for suffix in suffixes], device=device).unsqueeze(1)
    columns = ends + torch.arange(-count, 0, device=device)
    return torch.arange(len(suffixes), device=device).unsqueeze(1), columns

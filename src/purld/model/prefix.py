"""Two ways to the same numbers for continuations of prefixes: compute a prefix once, or with each continuation.

A prefix is a prompt, or a self-evaluation prompt up to the candidate. `SharedPrefixes` runs each once into the ordinary
key-value cache, and the continuations read that cache. This is exact, gradients included, because under a causal mask
the keys and values of a position depend on nothing that comes later. For the same reason prefixes and continuations are
padded on the right, and a mask is needed only to hide the padding between a shorter prefix and its continuations.
`FullSequences` relies on nothing but the model's own `forward`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from purld.model.body_and_head import BodyAndHead, chosen_log_probs
from purld.model.cache import ReadOnlyCache, keys_and_values, plain_kv_layers, repeat_rows
from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.encode import pad_right
from purld.model.recompute import recomputed_layers
from purld.model.vision import EncodedPrompt, pixel_inputs, vision_features

Rows = Sequence[Sequence[int]]
"""Token ids of several sequences."""


class Prefixes(Protocol):
    """Prefixes that continuations can be appended to.

    `owners` are the indices of the rows' prefixes, in ascending order; the first prefix for all if there are none.
    """

    def token_log_probs(self, rows: Rows, owners: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return (B, C) log-probs in nats, float32, 0 on padding, and their (B, C) mask, 0 on padding."""
        ...

    def closing_logits(self, rows: Rows, count: int, owners: Sequence[int] = ()) -> Tensor:
        """Return the logits at the last `count` positions of prefix + row: (B, count, V), float32."""
        ...

    def backward(self) -> None:
        """Propagate the gradients that the continuations' backward passes left at the prefixes into the weights."""
        ...


class SharedPrefixes:
    """Prefixes that are computed once, in one pass.

    Args:
        model: a causal language model; gradients flow through the prefixes, images included, if they are enabled.
        prompts: what the continuations begin with.
        pad: a token id to pad with.
        cut: stop the continuations' gradients at the prefixes and hold them there until `backward`, so that these are
            run and differentiated once however many backward passes the continuations are split into.
        recompute: compute the layers again in the backward passes, of the continuations and of the prefixes, instead of
            keeping what is in them; the prefixes' keys and values stay.

    Raises:
        TypeError: the model's cache is not a plain one, or its body cannot be separated from its LM head.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[EncodedPrompt],
        pad: int,
        cut: bool = False,
        recompute: bool = False,
    ) -> None:
        self._parts = BodyAndHead(model, recompute)
        self._takes_positions = (
            "position_ids" in inspect.signature(unwrap_adapters(model).base_model.forward).parameters
        )
        self._pad = pad
        self._device = model_device(model)
        ids, self._mask = pad_right([prompt.ids for prompt in prompts], pad, self._device)
        output = self._parts.hidden_states(ids, extra_inputs=vision_features(model, prompts, ids))
        self._position_shift = self._parts.position_shift
        self._layers = plain_kv_layers(output.past_key_values)
        self._is_padded = len({len(prompt) for prompt in prompts}) > 1
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        # (G, 1, H): predicts the first token
        self._last = output.last_hidden_state[torch.arange(len(prompts), device=self._device), self._lengths - 1, None]
        self._output = copy.copy(output)  # what the LM head needs of it, without the prompts' hidden states
        self._output.last_hidden_state = self._last.detach()  # kept in its position: some models index the output
        self._output.past_key_values = None
        self._cuts: list[tuple[Tensor, Tensor]] = []
        if cut and torch.is_grad_enabled():
            self._last = self._cut(self._last)
            for layer in self._layers:
                layer.keys, layer.values = map(self._cut, keys_and_values(layer))

    def token_log_probs(self, rows: Rows, owners: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """See `Prefixes`."""
        owners = owners or [0] * len(rows)
        targets, mask = pad_right(rows, self._pad, self._device)  # (B, C)
        # A row's last token is predicted but predicts nothing.
        hidden = torch.cat([repeat_rows(self._last, owners), self._continue(targets[:, :-1], owners)], dim=1)
        counted = mask.bool()
        values = self._parts.log_probs(self._output, hidden[counted], targets[counted])
        return torch.zeros(mask.shape, device=self._device).masked_scatter(counted, values), mask

    def closing_logits(self, rows: Rows, count: int, owners: Sequence[int] = ()) -> Tensor:
        """See `Prefixes`."""
        hidden = self._continue(pad_right(rows, self._pad, self._device)[0], owners or [0] * len(rows))  # (B, L, H)
        indices, columns = _closing_positions(rows, count, self._device)
        logits = self._parts.logits(self._output, hidden[indices, columns].flatten(0, 1))
        return logits.view(len(rows), count, -1)

    def backward(self) -> None:
        """See `Prefixes`."""
        with_gradient = [(whole, leaf.grad) for whole, leaf in self._cuts if leaf.grad is not None]
        if with_gradient:
            wholes, gradients = zip(*with_gradient)
            torch.autograd.backward(wholes, gradients)
        self._cuts = []

    def _continue(self, ids: Tensor, owners: Sequence[int]) -> Tensor:
        """Return hidden states (B, L, H) of right-padded continuations (B, L)."""
        if ids.shape[1] == 0:
            return self._last.new_empty(ids.shape[0], 0, self._last.shape[-1])
        cache = ReadOnlyCache([*self._layers], owners)
        places = self._places(ids, owners) if len(self._lengths) > 1 else {}
        return self._parts.hidden_states(ids, cache, self._position_shift, places).last_hidden_state

    def _places(self, ids: Tensor, owners: Sequence[int]) -> dict[str, Any]:
        """Return the positions of (B, L) tokens, and the mask of what they may attend to if prefixes are padded."""
        places: dict[str, Any] = {}
        of_rows = torch.tensor(owners, device=self._device)
        if self._takes_positions:
            steps = torch.arange(ids.shape[1], device=self._device)
            places["position_ids"] = self._lengths[of_rows].unsqueeze(1) + steps
        if self._is_padded:
            places["attention_mask"] = torch.cat([self._mask[of_rows], torch.ones_like(ids)], dim=1)
        return places

    def _cut(self, whole: Tensor) -> Tensor:
        if not whole.requires_grad:  # the first layer's keys, when only an adapter in later layers is trained
            return whole
        leaf = whole.detach().requires_grad_()
        self._cuts.append((whole, leaf))
        return leaf


class FullSequences:
    """Prefixes that are computed with every continuation; see `SharedPrefixes` for the arguments."""

    def __init__(self, model: CausalLM, prompts: Sequence[EncodedPrompt], pad: int, recompute: bool = False) -> None:
        self._model = model
        self._layers: Callable[[], AbstractContextManager[None]] = nullcontext
        if recompute and torch.is_grad_enabled():
            self._layers = partial(recomputed_layers, unwrap_adapters(model).base_model)
        self._prompts = prompts
        self._pad = pad
        self._device = model_device(model)

    def token_log_probs(self, rows: Rows, owners: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """See `Prefixes`."""
        targets, mask = pad_right(rows, self._pad, self._device)  # (B, C)
        logits = self._logits([row[:-1] for row in rows], owners)  # (B, C, V)
        values = chosen_log_probs(lambda chunk: chunk, logits.flatten(0, 1), targets.flatten())
        values = values.view(targets.shape)
        return values * mask, mask

    def closing_logits(self, rows: Rows, count: int, owners: Sequence[int] = ()) -> Tensor:
        """See `Prefixes`."""
        indices, columns = _closing_positions(rows, count, self._device)
        return self._logits(rows, owners)[indices, columns + 1].float()

    def backward(self) -> None:
        """Do nothing: no gradient is held back."""

    def _logits(self, rows: Rows, owners: Sequence[int]) -> Tensor:
        """Return (B, 1 + L, V) logits at the prompts' last positions and those of the right-padded rows."""
        prompts = [self._prompts[owner] for owner in owners or [0] * len(rows)]
        ids, mask = pad_right([[*p.ids, *row] for p, row in zip(prompts, rows)], self._pad, self._device)
        starts = [len(prompt) - 1 for prompt in prompts]
        kept = ids.shape[1] - min(starts)
        extra_inputs = pixel_inputs(prompts, ids)
        with self._layers():
            logits = self._model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept, **extra_inputs
            ).logits[:, -kept:]
        if len(set(starts)) == 1:
            return logits
        firsts = torch.tensor(starts, device=self._device).unsqueeze(1) - min(starts)
        columns = firsts + torch.arange(1 + max(map(len, rows)), device=self._device)
        return logits[torch.arange(len(rows), device=self._device).unsqueeze(1), columns.clamp(max=kept - 1)]


def _closing_positions(rows: Rows, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row (B, 1) and column (B, count) indices of the last `count` tokens of right-padded rows."""
    ends = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    columns = ends + torch.arange(-count, 0, device=device)
    return torch.arange(len(rows), device=device).unsqueeze(1), columns

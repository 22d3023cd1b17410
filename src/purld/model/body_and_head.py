"""A causal language model in two parts: the body returns hidden states, the LM head turns them into logits.

Logits are as wide as the vocabulary, so they are computed only for the tokens that need them, in chunks, and
recomputed in the backward pass instead of being kept. They are computed by the model's own `forward`, with the body
replaced by a stand-in that returns the given hidden states: whatever an architecture does to its logits (a scale, a
soft cap) is kept, and so are the hooks on the model. Hooks on the body run once per pass through the body.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from purld.model.cache import cache_argument
from purld.model.causal_lm import BodyOutput, CausalLM, unwrap_adapters
from purld.model.recompute import PromptCache, recomputed_layers

# Tokens whose logits are in memory at once: enough to keep a GPU's matrix units busy, and with a vocabulary of
# 150,000 still only 150 MB in float32.
CHUNK_TOKENS = 256
# Models that give images positions in three dimensions keep the position shift of their last input here.
_POSITION_SHIFT = "rope_deltas"


class BodyAndHead:
    """The body and the LM head of a model, each run with the adapters as they are switched at that moment.

    Args:
        model: a causal language model, bare or under adapters.
        recompute: compute the body's layers again in the backward pass instead of keeping what is in them.

    Raises:
        TypeError: the body is not a module of its own inside the model.
    """

    def __init__(self, model: CausalLM, recompute: bool = False) -> None:
        causal = unwrap_adapters(model)
        self._causal: CausalLM = getattr(causal, "_orig_mod", causal)  # what `torch.compile` wraps
        self._body = self._causal.base_model
        self._owner, self._name = _find_owner(self._causal, self._body)
        self._recompute = recompute
        self._cache_argument = cache_argument(self._body.forward)

    def hidden_states(
        self,
        ids: Tensor,
        cache: Any | None = None,
        position_shift: Tensor | None = None,
        extra_inputs: Mapping[str, Any] = {},
    ) -> BodyOutput:
        """Return the body's output for (B, L) token ids.

        Args:
            ids: token ids.
            cache: keys and values of the tokens before; a new cache if there is none.
            position_shift: the value of `position_shift` after those tokens were run.
            extra_inputs: further arguments of the body, such as pixels.
        """
        if hasattr(self._body, _POSITION_SHIFT):
            setattr(self._body, _POSITION_SHIFT, position_shift)
        recompute = self._recompute and torch.is_grad_enabled()
        if recompute and cache is None:
            cache = PromptCache(self._causal.config)
        with recomputed_layers(self._body) if recompute else contextlib.nullcontext():
            known = {self._cache_argument: cache}
            output: BodyOutput = self._body(input_ids=ids, use_cache=True, **known, **extra_inputs)
        return output

    @property
    def position_shift(self) -> Tensor | None:
        """By how much the positions of the last input differ from the number of its tokens, if it had images."""
        shift: Tensor | None = getattr(self._body, _POSITION_SHIFT, None)
        return shift

    def repeat_position_shift(self, copies: int) -> None:
        """Repeat each row's position shift, for a cache whose rows are repeated alike."""
        if (shift := self.position_shift) is not None:
            setattr(self._body, _POSITION_SHIFT, shift.repeat_interleave(copies, dim=0))

    def logits(self, output: BodyOutput, hidden: Tensor) -> Tensor:
        """Return (N, V) float32 logits of (N, H) hidden states.

        Args:
            output: the body's output that the hidden states were taken from.
            hidden: hidden states.

        Raises:
            TypeError: the model's `forward` does not call its body.
        """
        given = copy.copy(output)
        given.last_hidden_state = hidden.unsqueeze(0)
        placeholder = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
        # Compiled code would be compiled again for every stand-in.
        with self._replaced_body(given) as stand_in, torch.compiler.set_stance("force_eager"):
            logits = self._causal(input_ids=placeholder).logits
        if not stand_in.was_called:
            raise TypeError(f"the forward of {type(self._causal).__name__} does not call its body")
        return logits.squeeze(0).float()

    def log_probs(self, output: BodyOutput, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return (N,) float32 log-probs of N target tokens at (N, H) hidden states; for `output` see `logits`."""

        return chosen_log_probs(partial(self.logits, output), hidden, targets)

    @contextlib.contextmanager
    def _replaced_body(self, output: BodyOutput) -> Iterator[_StandIn]:
        """Replace the body inside the model by a stand-in that returns `output`."""
        stand_in = _StandIn(self._body, output)
        self._owner._modules[self._name] = stand_in
        try:
            yield stand_in
        finally:
            self._owner._modules[self._name] = self._body


@contextlib.contextmanager
def body_states_at(model: CausalLM, positions: Tensor) -> Iterator[None]:
    """Let the body return the hidden states at some positions only, (1, N, H), so that no others get logits.

    Args:
        model: a causal language model, bare or under adapters.
        positions: (B, L) bool.
    """

    def choose(_body: nn.Module, _inputs: Any, output: BodyOutput) -> BodyOutput:
        output.last_hidden_state = output.last_hidden_state[positions].unsqueeze(0)
        return output

    hook = unwrap_adapters(model).base_model.register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def chosen_log_probs(logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """Return (N,) float32 log-probs of N targets, a few tokens at a time, computed again in the backward pass.

    Args:
        logits: makes (n, V) logits of a chunk of the states.
        states: (N, H) hidden states, or logits themselves.
        targets: (N,) token ids.
    """

    def chunk_log_probs(chunk: Tensor, chosen: Tensor) -> Tensor:
        values = logits(chunk).float()
        return values.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - values.logsumexp(dim=-1)

    chunks = zip(torch.split(states, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS))
    return torch.cat(
        [checkpoint(chunk_log_probs, s, t, use_reentrant=False, preserve_rng_state=False) for s, t in chunks]
    )


class _StandIn(nn.Module):
    """A module that returns an output computed before, and otherwise has the attributes of the body it replaces."""

    def __init__(self, body: nn.Module, output: BodyOutput) -> None:
        super().__init__()
        self.__dict__.update(_body=body, _output=output)  # not as a submodule
        self.was_called = False

    def forward(self, *_: Any, **__: Any) -> BodyOutput:
        """Return the output, whatever the inputs."""
        self.was_called = True
        output: BodyOutput = self._output
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_body"], name)


def _find_owner(causal: CausalLM, body: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that has the body as a child, and the child's name."""
    for owner in causal.modules():
        for name, child in owner.named_children():
            if child is body:
                return owner, name
    raise TypeError(f"{type(causal).__name__} does not keep its body apart from its head")

"""Candidates and answers drawn from the student.

The decoding is what a run's configuration says and nothing else: a model directory's own generation defaults
(a repetition penalty, a top-k) are set aside, because Stage II's estimators take candidates to be draws from
the policy. Another engine can take this one's place behind `Sampler`.

What sequences have in common is computed once and its cache repeated; then all of them decode together.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from purld.model.body_and_head import unwrap_adapters
from purld.model.cache import repeat_with_capacity
from purld.model.encode import Encoder, pad_left
from purld.model.self_check import can_share_prefix, exceeded_windows
from purld.model.vision import EncodedPrompt, pixel_inputs, vision_features

EMPTY_PROMPT = EncodedPrompt([])
_STAND_IN_TOKENS = 32


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """Token ids of one completion, its end-of-turn token included if it came before the limit."""

    ids: list[int]
    finished: bool


class Sampler(Protocol):
    """Draws `count` completions for each prompt, the same ones for the same seed."""

    def __call__(
        self, model: Any, prompts: Sequence[EncodedPrompt], count: int, seed: int
    ) -> list[list[Completion]]: ...


class GenerateSampler:
    """The sampler on transformers' `generate_completions`."""

    def __init__(self, encoder: Encoder, decoding: Decoding) -> None:
        self._encoder = encoder
        self._decoding = decoding

    def __call__(self, model: Any, prompts: Sequence[EncodedPrompt], count: int, seed: int) -> list[list[Completion]]:
        """`count` completions for each of the prompts."""
        with seeded_torch(seed):
            return generate_completions(model, self._encoder, prompts, count, self._decoding)


@torch.no_grad()
def generate_completions(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    count: int,
    decoding: Decoding,
    head: EncodedPrompt = EMPTY_PROMPT,
) -> list[list[Completion]]:
    """`count` completions for each of the prompts, from torch's global random state.

    Args:
        model: a causal language model.
        encoder: the run's encoder.
        prompts: what is completed; without pictures where there is a head.
        count: completions per prompt; 1 where there is a head.
        decoding: how they are drawn.
        head: what comes before each of the prompts.
    """
    # Padding goes between the head and a shorter prompt. No position counts it, but a sliding window would.
    width = len(head) + max(map(len, prompts)) + decoding.max_new_tokens
    if head and (
        exceeded_windows(model, width) or not can_share_prefix(model, head, [p.ids for p in prompts], encoder.pad)
    ):
        prompts, head = [head.followed_by(prompt.ids) for prompt in prompts], EMPTY_PROMPT
    ids, mask = pad_left([p.ids for p in prompts], encoder.pad, next(model.parameters()).device)
    ids, mask = _before(ids, head.ids), _before(mask, [1] * len(head))
    if head:
        ready = _prefilled(model, encoder, [head], ids[:1, : len(head)], mask[:1, : len(head)], len(ids), width)
    elif count > 1 and can_share_prefix(model, *_stand_in(prompts, encoder), encoder.pad):
        # All but the last token, which `generate_completions` wants to see for itself.
        ready = _prefilled(model, encoder, prompts, ids[:, :-1], mask[:, :-1], count, width)
    else:
        # Repeated here, because with some models `generate` mixes up the pictures of a prompt that has several.
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        ready = pixel_inputs([prompt for prompt in prompts for _ in range(count)], ids)
    with _plain_generation_config(model, encoder, decoding) as (inner, ends):
        inner.generation_config.num_return_sequences = len(prompts) * count // len(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, **ready)
    rows = [_completion(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def _before(rows: Tensor, head: Sequence[int]) -> Tensor:
    """(B, P + L): the same P numbers put before each of B rows."""
    return torch.cat(
        [torch.tensor([list(head)], dtype=rows.dtype, device=rows.device).expand(len(rows), -1), rows], dim=1
    )


def _prefilled(
    model: Any, encoder: Encoder, heads: Sequence[EncodedPrompt], ids: Tensor, mask: Tensor, copies: int, width: int
) -> dict[str, Any]:
    """The cache of left-padded rows, as an argument of `generate`: each row's repeated, room for `width` tokens."""
    beside = vision_features(model, heads, ids)
    with _plain_generation_config(model, encoder, Decoding(temperature=0.0, max_new_tokens=1)):
        output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **beside)
    return {"past_key_values": repeat_with_capacity(output.past_key_values, copies, width - ids.shape[1])}


def _stand_in(prompts: Sequence[EncodedPrompt], encoder: Encoder) -> tuple[EncodedPrompt, list[list[int]]]:
    """A head and continuations to try sharing on before there are any completions."""
    longest = max([prompt for prompt in prompts if prompt.images] or prompts, key=len)
    words = [token for token in longest.ids if token not in encoder.placeholders]
    return longest, [words[:1], words[:_STAND_IN_TOKENS]]


def seed_from_content(*parts: object) -> int:
    """A seed from content: the same parts give the same draws, in whatever order work is done or resumed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _completion(row: list[int], ends: set[int]) -> Completion:
    for position, token in enumerate(row):
        if token in ends:
            return Completion(row[: position + 1], finished=True)
    return Completion(row, finished=False)


@contextlib.contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """torch draws from `seed` here, and goes on afterwards as if nothing had been drawn."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _plain_generation_config(model: Any, encoder: Encoder, decoding: Decoding) -> Iterator[tuple[Any, set[int]]]:
    """The model with nothing but `decoding` in force, and the tokens that end a turn.

    `generate_completions` fills whatever a configuration leaves open from the model's own, so that one is set aside.
    """
    inner = unwrap_adapters(model)
    own = inner.generation_config
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {encoder.end, *(token for token in listed if token is not None)}
    draws: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        draws = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    inner.generation_config = GenerationConfig(
        **draws,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=encoder.pad,
        suppress_tokens=encoder.placeholders or None,
    )
    was_training = model.training
    model.eval()
    try:
        yield inner, ends
    finally:
        inner.generation_config = own
        model.train(was_training)

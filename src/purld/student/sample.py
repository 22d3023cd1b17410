"""Candidates and answers drawn from the student.

The decoding is what a run's configuration says and nothing else: a model directory's own generation defaults
(a repetition penalty, a top-k) are set aside, because Stage II's estimators take candidates to be draws from
the policy. Another engine can take this one's place behind `Sampler`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from purld.student.encode import Encoder, pad_left


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
        self, model: Any, prompts: Sequence[Sequence[int]], count: int, seed: int
    ) -> list[list[Completion]]: ...


class GenerateSampler:
    """The sampler on transformers' `generate`."""

    def __init__(self, encoder: Encoder, decoding: Decoding) -> None:
        self._encoder = encoder
        self._decoding = decoding

    def __call__(self, model: Any, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[Completion]]:
        """`count` completions for each of the prompts (token ids)."""
        with _seeded(seed):
            return generate(model, self._encoder, prompts, count, self._decoding)


@torch.no_grad()
def generate(
    model: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], count: int, decoding: Decoding
) -> list[list[Completion]]:
    """`count` completions for each of the prompts (token ids), from torch's global random state."""
    device = next(model.parameters()).device
    ids, mask = pad_left(prompts, encoder.pad, device)
    with _plain_generation_config(model, encoder, decoding) as (inner, ends):
        inner.generation_config.num_return_sequences = count
        output = model.generate(input_ids=ids, attention_mask=mask)
    rows = [_completion(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def seed_from(*parts: object) -> int:
    """A seed from content: the same parts give the same draws, in whatever order work is done or resumed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _completion(row: list[int], ends: set[int]) -> Completion:
    for position, token in enumerate(row):
        if token in ends:
            return Completion(row[: position + 1], finished=True)
    return Completion(row, finished=False)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _plain_generation_config(model: Any, encoder: Encoder, decoding: Decoding) -> Iterator[tuple[Any, set[int]]]:
    """The model with nothing but `decoding` in force, and the tokens that end a turn.

    `generate` fills whatever a configuration leaves open from the model's own, so that one is set aside.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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
    )
    was_training = model.training
    model.eval()
    try:
        yield inner, ends
    finally:
        inner.generation_config = own
        model.train(was_training)

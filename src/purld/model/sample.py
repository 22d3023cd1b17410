"""Sampling of candidates and answers from the student.

Decoding follows the run's configuration and nothing else: a model directory's own generation defaults (a repetition
penalty, a top-k) are ignored, because Stage II's estimators assume that candidates are drawn from the policy. Another
engine can replace transformers' `generate` behind `Sampler`.

What sequences have in common is computed once and its cache repeated; then all of them decode together. Each has its
own random numbers, so a completion depends on its prompt's seed and not on what it is drawn beside.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from purld.errors import NotFiniteError, PlainWarning, reason_of
from purld.model.at_once import AtOnce, release_memory
from purld.model.body_and_head import BodyAndHead
from purld.model.cache import cache_argument, repeat_with_capacity
from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.encode import Encoder, pad_left
from purld.model.merged_layers import has_room_to_merge, merged_layers
from purld.model.out_of_memory import is_out_of_memory
from purld.model.processor import listed_ends
from purld.model.self_check import can_share_prefix, count_exceeded_windows, refuse_sharing
from purld.model.vision import EncodedPrompt, pixel_inputs, vision_features

EMPTY_PROMPT = EncodedPrompt([])
_TRIAL_TOKENS = 32


@dataclass(frozen=True)
class Decoding:
    """The settings of sampling; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """The token ids of one completion, with its end-of-turn token if it finished before the limit.

    `log_probs` are those of the engine that drew it, in nats and at temperature 1; None if that is the model itself.
    """

    ids: list[int]
    finished: bool
    log_probs: list[float] | None = None


class Sampler(Protocol):
    """A function that draws `count` completions for each prompt, from a seed per prompt.

    A completion depends on the seed of its prompt and on its place among the `count`, and not on the other prompts.
    """

    def __call__(
        self, model: Any, prompts: Sequence[EncodedPrompt], count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]: ...


class GenerateSampler:
    """The sampler that uses transformers' `generate`, for fewer prompts at once where a device runs out of memory."""

    def __init__(self, encoder: Encoder, decoding: Decoding) -> None:
        self._encoder = encoder
        self._decoding = decoding
        self._merges = True
        self._at_once = AtOnce(
            None,
            "answers are drawn for fewer prompts at once",
            "to draw the answers to one prompt at once; lower align.candidates or align.max_new_tokens (in the "
            "evaluation evaluate.samples or evaluate.max_new_tokens)",
        )

    def __call__(
        self, model: CausalLM, prompts: Sequence[EncodedPrompt], count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Draw `count` completions for each prompt; see `Sampler`.

        Raises:
            UserError: the device's memory is too small for one prompt.
        """

        def draw(size: int) -> list[list[Completion]]:
            parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
            return [
                completions
                for part in parts
                for completions in generate_completions(
                    model, self._encoder, prompts[part], count, self._decoding, seeds=seeds[part]
                )
            ]

        if self._merges and prompts and has_room_to_merge(model):
            if count > 1:
                # Before the adapters are merged: what the check finds serves the updates too, where they are not.
                can_share_prefix(model, *_trial_group(prompts, self._encoder), self._encoder.pad)
            try:
                with merged_layers(model):
                    return draw(len(prompts))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # The copy of the weights goes first, before fewer prompts.
            release_memory()
            self._merges = False
            told = "out of the device's memory: from here on candidates are drawn with the adapters beside the weights."
            warnings.warn(told, PlainWarning, stacklevel=2)
        return self._at_once(draw, len(prompts))


@torch.no_grad()
def generate_completions(
    model: CausalLM,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    count: int,
    decoding: Decoding,
    prefix: EncodedPrompt = EMPTY_PROMPT,
    seeds: Sequence[int] = (),
) -> list[list[Completion]]:
    """Draw `count` completions for each prompt; torch's global random state is neither read nor changed.

    Args:
        model: a causal language model.
        encoder: the run's encoder.
        prompts: what to complete; without images if there is a prefix.
        count: completions per prompt; 1 if there is a prefix.
        decoding: the settings of sampling.
        prefix: what comes before each prompt.
        seeds: a seed per prompt; not used at temperature 0.

    Raises:
        NotFiniteError: the model's logits are NaN or infinite.
    """
    try:
        return _generate(model, encoder, prompts, count, decoding, prefix, seeds)
    except _UnusableCacheError as error:
        refuse_sharing(model, str(error))
        return _generate(model, encoder, prompts, count, decoding, prefix, seeds)


class _UnusableCacheError(Exception):
    """A cache that cannot be filled or repeated, as under another version of transformers."""


def _generate(
    model: CausalLM,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    count: int,
    decoding: Decoding,
    prefix: EncodedPrompt,
    seeds: Sequence[int],
) -> list[list[Completion]]:
    """See `generate_completions`."""
    # Padding is put between the prefix and a shorter prompt. No position counts it, but a sliding window would.
    width = len(prefix) + max(map(len, prompts)) + decoding.max_new_tokens
    if prefix and not _can_prefill(model, encoder, prefix, prompts, width):
        prompts, prefix = [prefix.followed_by(prompt.ids) for prompt in prompts], EMPTY_PROMPT
    ids, mask = pad_left([p.ids for p in prompts], encoder.pad, model_device(model))
    ids, mask = _prepend(ids, prefix.ids), _prepend(mask, [1] * len(prefix))
    if prefix:
        shared = slice(None, 1), slice(None, len(prefix))
        inputs = _prefill_cache(model, encoder, [prefix], ids[shared], mask[shared], len(ids), width)
    elif count > 1 and can_share_prefix(model, *_trial_group(prompts, encoder), encoder.pad):
        # All but the last token, which `generate` needs to process itself.
        inputs = _prefill_cache(model, encoder, prompts, ids[:, :-1], mask[:, :-1], count, width)
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
    else:
        # Rows are repeated here, because with some models `generate` mixes up the images of a prompt that has several.
        ids, mask = ids.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)
        inputs = pixel_inputs([prompt for prompt in prompts for _ in range(count)], ids)
    watch = _FiniteLogits()
    processors = LogitsProcessorList([watch])
    if decoding.temperature > 0:
        numbers = _uniform_numbers(seeds, len(prompts), count, decoding.max_new_tokens)
        processors.append(_SeededChoice(numbers.to(ids.device), ids.shape[1], decoding))
    with _plain_generation_config(model, encoder, decoding.max_new_tokens) as ends:
        output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **inputs)
    watch.check()
    rows = [_cut_completion(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


class _FiniteLogits(LogitsProcessor):
    """A watch on the logits that sampling reads: notes, without waiting for the device, whether all were finite.

    Drawing from others raises an error on a CPU, and on a GPU ends every later computation of the process.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores; a row that holds NaN or infinity, or no possible token, becomes zeros."""
        finite = scores.amax(dim=-1, keepdim=True).isfinite()  # NaN is larger than everything
        self._finite = finite.all() if self._finite is None else self._finite & finite.all()
        return scores.where(finite, 0.0)

    def check(self) -> None:
        """Raise an error if a row was not finite."""
        if self._finite is not None and not self._finite:
            raise NotFiniteError("the distribution that the student's tokens are drawn from")


class _SeededChoice(LogitsProcessor):
    """Chooses each row's next token by inverting the cumulative distribution at a number of the row's own.

    `generate` then takes the token as the greedy one. Its own sampling uses one stream for the whole batch, so that
    what is drawn for a prompt would depend on its neighbours; it also draws V numbers a token where this needs one.

    Args:
        numbers: (B, T) numbers in [0, 1), float64, for B rows of up to T tokens.
        start: the rows' length before the first token is drawn.
        decoding: the settings of sampling.
    """

    def __init__(self, numbers: Tensor, start: int, decoding: Decoding) -> None:
        self._numbers = numbers
        self._start = start
        self._temperature = decoding.temperature
        self._nucleus = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores that are -inf but for one token per row."""
        scores = scores / self._temperature
        if self._nucleus is not None:
            scores = self._nucleus(input_ids, scores)
        # float64: in float32 the tail of a large vocabulary adds nothing to a sum that is near 1.
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        step = input_ids.shape[1] - self._start
        targets = self._numbers[:, step, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def _uniform_numbers(seeds: Sequence[int], prompts: int, count: int, length: int) -> Tensor:
    """Return (prompts * count, length) numbers in [0, 1), float64, a row's from its prompt's seed and its place."""
    if len(seeds) != prompts:
        raise ValueError(f"{prompts} prompts need as many seeds, not {len(seeds)}")
    generators = [torch.Generator().manual_seed(seed_from_content(s, place)) for s in seeds for place in range(count)]
    return torch.stack([torch.rand(length, generator=g, dtype=torch.float64) for g in generators])


def _can_prefill(
    model: CausalLM, encoder: Encoder, prefix: EncodedPrompt, prompts: Sequence[EncodedPrompt], width: int
) -> bool:
    """Return whether the prefix of all prompts can be run once, for sequences of up to `width` tokens."""
    if count_exceeded_windows(model, width):
        return False
    return can_share_prefix(model, prefix, [prompt.ids for prompt in prompts], encoder.pad)


def _prepend(rows: Tensor, values: Sequence[int]) -> Tensor:
    """Put the same P values before each of B rows: (B, P + L)."""
    prefix = torch.tensor([list(values)], dtype=rows.dtype, device=rows.device)
    return torch.cat([prefix.expand(len(rows), -1), rows], dim=1)


def _prefill_cache(
    model: CausalLM,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    ids: Tensor,
    mask: Tensor,
    copies: int,
    width: int,
) -> dict[str, Any]:
    """Run left-padded rows and return their cache as an argument of `generate`.

    Each row is repeated `copies` times, with capacity for `width` tokens.
    """
    extra_inputs = vision_features(model, prompts, ids)
    with _plain_generation_config(model, encoder, max_new_tokens=1):
        output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **extra_inputs)
    try:
        cache = repeat_with_capacity(output.past_key_values, copies, width - ids.shape[1])
        BodyAndHead(model).repeat_position_shift(copies)
    except (AttributeError, TypeError, ValueError) as error:
        raise _UnusableCacheError(reason_of(error)) from error
    return {cache_argument(unwrap_adapters(model).base_model.forward): cache}


def _trial_group(prompts: Sequence[EncodedPrompt], encoder: Encoder) -> tuple[EncodedPrompt, list[list[int]]]:
    """Return a prefix and continuations to check sharing with before there are any completions."""
    longest = max([prompt for prompt in prompts if prompt.images] or prompts, key=len)
    words = [token for token in longest.ids if token not in encoder.placeholders]
    return longest, [words[:1], words[:_TRIAL_TOKENS]]


def seed_from_content(*parts: object) -> int:
    """Return a seed that depends on content alone, not on the order in which work is done or resumed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def end_tokens(model: CausalLM, encoder: Encoder) -> set[int]:
    """Return the tokens after which a completion ends."""
    return {*encoder.ends, *listed_ends(unwrap_adapters(model).generation_config)}


def _cut_completion(row: list[int], ends: set[int]) -> Completion:
    """Cut a row of generated token ids after its first end-of-turn token."""
    for index, token in enumerate(row):
        if token in ends:
            return Completion(row[: index + 1], finished=True)
    return Completion(row, finished=False)


@contextlib.contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's random state for the duration of the context, and restore it afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _plain_generation_config(model: CausalLM, encoder: Encoder, max_new_tokens: int) -> Iterator[set[int]]:
    """Give the model a generation configuration that takes the likeliest tokens, and yield the end-of-turn tokens.

    `generate` fills what a configuration passed to it leaves open from the model's own, so that one is replaced.
    """
    inner = unwrap_adapters(model)
    original = inner.generation_config
    ends = end_tokens(model, encoder)
    inner.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=encoder.pad,
        suppress_tokens=encoder.placeholders or None,
    )
    was_training = model.training
    model.eval()
    try:
        yield ends
    finally:
        inner.generation_config = original
        model.train(was_training)

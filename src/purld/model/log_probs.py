"""Log-probs of groups of rows that continue a prompt; prompts are computed once for models where that is exact.

Log-probs are float32 whatever the weights are. `purld.model.self_check` decides on the first groups that a model meets
whether it may share a prefix, and whether several groups may go through it in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from purld.model.causal_lm import CausalLM
from purld.model.prefix import FullSequences, Prefixes, Rows, SharedPrefixes
from purld.model.self_check import can_join, can_share_prefix, windows_count_padding
from purld.model.vision import EncodedPrompt

PASS_TOKENS = 16_384  # of groups that share a pass, with padding: more fill no matrix unit that these leave idle
CPU_ROWS = 16

BatchSize = int | Literal["auto"]
"""Rows per pass; auto chooses by the device."""


@dataclass(frozen=True)
class RowGroup:
    """A prompt, and the rows that continue it."""

    prompt: EncodedPrompt
    rows: Rows


class GroupPass:
    """Groups whose prompts go through a model in one pass, and whose rows do in passes of at most `size` rows.

    Args:
        model: see `SharedPrefixes`.
        groups: the groups; several only if `can_join` allows it.
        pad: see `SharedPrefixes`.
        size: rows per pass.
        cut: see `SharedPrefixes`.
        recompute: see `SharedPrefixes`.

    Attributes:
        rows: the rows of all groups.
        parts: the indices of the rows of each pass.
        slices: the rows of each group.
    """

    def __init__(
        self,
        model: CausalLM,
        groups: Sequence[RowGroup],
        pad: int,
        size: int,
        cut: bool = False,
        recompute: bool = False,
    ) -> None:
        self.rows = [row for group in groups for row in group.rows]
        self._owners = [index for index, group in enumerate(groups) for _ in group.rows]
        self.parts = [range(part.start, part.stop) for part in micro_batches(len(self.rows), size)]
        ends = [*accumulate(len(group.rows) for group in groups)]
        self.slices = [slice(end - len(group.rows), end) for end, group in zip(ends, groups, strict=True)]
        self._prefixes = make_prefixes(model, groups, pad, cut, recompute)

    def log_probs(self, part: Sequence[int]) -> Tensor:
        """Return (B, C) log-probs of the tokens of the rows with these ascending indices, in nats, 0 on padding."""
        return self._prefixes.token_log_probs(*self._chosen(part))[0]

    def row_log_probs(self, part: Sequence[int]) -> list[Tensor]:
        """Return the log-probs of the rows with these ascending indices, each (C,) without padding."""
        return [line[: len(self.rows[index])] for line, index in zip(self.log_probs(part), part, strict=True)]

    def closing_logits(self, part: Sequence[int], count: int) -> Tensor:
        """Return the logits at the last `count` positions of such rows: (B, count, V), float32."""
        rows, owners = self._chosen(part)
        return self._prefixes.closing_logits(rows, count, owners)

    def backward(self) -> None:
        """See `Prefixes`."""
        self._prefixes.backward()

    def _chosen(self, part: Sequence[int]) -> tuple[Rows, Sequence[int]]:
        return [self.rows[index] for index in part], [self._owners[index] for index in part]


def plan_passes(model: CausalLM, groups: Sequence[RowGroup], pad: int, size: int) -> Iterator[Sequence[RowGroup]]:
    """Yield consecutive groups that share a pass: at most `size` rows and `PASS_TOKENS` tokens, and at least one group.

    Groups with images, those that outgrow a sliding window, and those of a model that fails the check take a pass each.
    """
    for together in _consecutive(model, groups, pad, size):
        if len(together) == 1 or can_join(model, _pairs(together), pad):
            yield together
        else:
            yield from ([group] for group in together)


@torch.no_grad()
def group_log_probs(
    model: CausalLM, groups: Sequence[RowGroup], pad: int, size: int, first_apart: bool = False
) -> list[Sequence[Tensor]]:
    """Return the log-probs of each row's tokens, (C,), float32, for each group, without a graph.

    Args:
        model: a causal language model.
        groups: prompts with their continuations.
        pad: a token id to pad with.
        size: rows per pass.
        first_apart: run the groups' first rows in passes of their own.
    """
    found: list[Sequence[Tensor]] = []
    for together in plan_passes(model, groups, pad, size):
        whole = GroupPass(model, together, pad, size)
        parts: Sequence[Sequence[int]] = whole.parts
        if first_apart:
            firsts = [rows.start for rows in whole.slices]
            others = sorted({*range(len(whole.rows))}.difference(firsts))
            parts = [indices[part] for indices in (firsts, others) for part in micro_batches(len(indices), size)]
        lines = {index: line for part in parts for index, line in zip(part, whole.row_log_probs(part), strict=True)}
        found += [[lines[index] for index in range(rows.start, rows.stop)] for rows in whole.slices]
    return found


def token_log_probs(model: CausalLM, prompt: EncodedPrompt, completions: Rows, pad: int) -> tuple[Tensor, Tensor]:
    """Return log p(y_kt | x, y_k<t) in nats of every token of K completions of one prompt.

    Args:
        model: a causal language model; gradients flow if they are enabled.
        prompt: the prompt x.
        completions: K non-empty completions as token ids, with end-of-turn where it was sampled.
        pad: a token id to pad with.

    Returns:
        (K, C) log-probs, float32, 0 on padding, and their (K, C) mask, 0 on padding and 1 elsewhere.
    """
    return make_prefixes(model, [RowGroup(prompt, completions)], pad).token_log_probs(completions)


def make_prefixes(
    model: CausalLM, groups: Sequence[RowGroup], pad: int, cut: bool = False, recompute: bool = False
) -> Prefixes:
    """Return the prefixes of groups, computed once if the model allows it; see `SharedPrefixes` for the arguments."""
    prompts = [group.prompt for group in groups]
    if all(can_share_prefix(model, group.prompt, group.rows, pad) for group in groups):
        return SharedPrefixes(model, prompts, pad, cut, recompute)
    return FullSequences(model, prompts, pad, recompute)


def micro_batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _consecutive(model: CausalLM, groups: Sequence[RowGroup], pad: int, size: int) -> Iterator[Sequence[RowGroup]]:
    """Yield as many groups at a time as may go together, and at least one."""
    together: list[RowGroup] = []
    for group in groups:
        if together and not _may_go_together(model, [*together, group], pad, size):
            yield together
            together = []
        together = [*together, group]
    if together:
        yield together


def _may_go_together(model: CausalLM, groups: Sequence[RowGroup], pad: int, size: int) -> bool:
    """Return whether groups have no more than a pass holds, no images, and fit into the model's windows when padded.

    Full sequences are padded at their end alone, where no window counts it.
    """
    rows = [row for group in groups for row in group.rows]
    tokens = len(groups) * max(len(group.prompt) for group in groups) + len(rows) * max(map(len, rows), default=0)
    if len(rows) > size or tokens > PASS_TOKENS or any(group.prompt.images for group in groups):
        return False
    if not windows_count_padding(model, _pairs(groups)):
        return True
    return not can_share_prefix(model, groups[0].prompt, groups[0].rows, pad)


def _pairs(groups: Sequence[RowGroup]) -> list[tuple[EncodedPrompt, Rows]]:
    return [(group.prompt, group.rows) for group in groups]

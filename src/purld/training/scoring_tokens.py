"""Count the tokens that a score of Stage II sends through the student, without running it.

A count is exact for candidates of the given length whose texts encode to as many tokens, with padding and with what a
group computes once; it holds for a model that shares prefixes. The padding of groups that share a pass is not counted.
Every function here mirrors one scorer, and a test compares it with the tokens that go through a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from purld.model.encode import Encoder
from purld.model.likelihood import SEPARATOR
from purld.model.log_probs import micro_batches
from purld.model.self_evaluation import SCORE_OPENING, VERBAL_TOKENS
from purld.records import Prompt


@dataclass(frozen=True)
class GroupSize:
    """The size of a group that has not been drawn yet.

    Attributes:
        prompt: the prompt.
        anchor: the anchor's text; None if it is not known yet, which counts as one of `max_anchor_tokens`.
        candidates: the number K of candidates.
        length: tokens per candidate.
        anchored: whether the scorer reads the anchor.
    """

    prompt: Prompt
    anchor: str | None
    candidates: int
    length: int
    anchored: bool = True


CountTokens = Callable[[Encoder, GroupSize, int], int]
"""(encoder, group, rows per forward pass) -> tokens."""


def in_context_tokens(encoder: Encoder, group: GroupSize, batch_size: int) -> int:
    """Count the tokens of `purld.model.likelihood.in_context_scores`."""
    of_anchor, candidates = _target_tokens(encoder, group.anchor) - 1, [group.length - 1] * group.candidates
    anchored = _anchored_prompt_tokens(encoder, group) + _padded([of_anchor, *candidates], batch_size)
    bare = len(encoder.encode_prompt(group.prompt, direct=True)) + of_anchor + _padded(candidates, batch_size)
    return anchored + bare


def reference_tokens(encoder: Encoder, group: GroupSize, batch_size: int) -> int:
    """Count the tokens of `purld.model.likelihood.reference_scores`."""
    after = len(encoder.encode_literal(SEPARATOR)) + _target_tokens(encoder, group.anchor)
    rows = [body + after - 1 for body in (_body_tokens(encoder, group.anchor), *[group.length] * group.candidates)]
    return len(encoder.encode_prompt(group.prompt, direct=True)) + _padded(rows, batch_size)


def expected_tokens(encoder: Encoder, group: GroupSize, batch_size: int) -> int:
    """Count the tokens of a `SelfEvaluator` of the kind `expected`."""
    prefix, rows = _evaluation_tokens(encoder, group)
    opening = len(encoder.encode_literal(SCORE_OPENING))
    return prefix + _padded([row + opening for row in rows], batch_size)


def verbal_tokens(encoder: Encoder, group: GroupSize, batch_size: int) -> int:
    """Count the tokens of a `SelfEvaluator` of the kind `verbal`, every reply at its limit."""
    prefix, rows = _evaluation_tokens(encoder, group)
    batches = len(list(micro_batches(len(rows), batch_size)))
    # A reply's last token is written and not read.
    return batches * prefix + _padded(rows, batch_size) + len(rows) * (VERBAL_TOKENS - 1)


def anchored_reference_tokens(encoder: Encoder, group: GroupSize, batch_size: int) -> int:
    """Count the tokens of the reference log-probs of a method whose reference reads the anchor."""
    prompt = _anchored_prompt_tokens(encoder, group, direct=False)
    return prompt + _padded([group.length - 1] * group.candidates, batch_size)


def _evaluation_tokens(encoder: Encoder, group: GroupSize) -> tuple[int, list[int]]:
    """Return the tokens of a self-evaluation's prefix, and of its rows up to the score."""
    frame = encoder.evaluation_frame(group.prompt, (group.anchor or "") if group.anchored else None)
    prefix, rows, limit = len(frame.prefix), [group.length] * group.candidates, encoder.max_anchor_tokens
    if group.anchored:
        rows.insert(0, limit if group.anchor is None else len(encoder.encode_quoted_anchor(group.anchor)))
        prefix += limit if group.anchor is None else 0
    return prefix, [row + len(frame.suffix) for row in rows]


def _anchored_prompt_tokens(encoder: Encoder, group: GroupSize, direct: bool = True) -> int:
    if group.anchor is not None:
        return len(encoder.encode_anchored_prompt(group.prompt, group.anchor, direct))
    return len(encoder.encode_anchored_prompt(group.prompt, "", direct)) + encoder.max_anchor_tokens


def _target_tokens(encoder: Encoder, anchor: str | None) -> int:
    """Return the tokens of an anchor as a target, its end-of-turn token included."""
    return encoder.max_anchor_tokens if anchor is None else len(encoder.encode_answer(anchor).ids)


def _body_tokens(encoder: Encoder, anchor: str | None) -> int:
    """Return the tokens of an anchor as a target, without those that end a turn."""
    if anchor is None:
        return encoder.max_anchor_tokens
    return sum(token not in encoder.ends for token in encoder.encode_answer(anchor).ids)


def _padded(rows: Sequence[int], batch_size: int) -> int:
    """Return the tokens of rows of these lengths, each batch padded to its longest row."""
    return sum(len(rows[part]) * max(rows[part]) for part in micro_batches(len(rows), batch_size))

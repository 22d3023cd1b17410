"""Score candidates by the student's own likelihoods, with the anchor in its context or after the candidate.

A small student that cannot write down a score still knows how well a candidate fits the anchor: the anchor changes how
likely it finds the candidate's tokens. No decoding and no parsing; every score is a function of log-probs of one or two
forward passes, and only differences between scores of one group mean anything (section 3.3 uses relative magnitudes of
g alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import RowGroup, group_log_probs
from purld.model.prefix import Rows
from purld.model.self_evaluation import GroupScores
from purld.records import Prompt

MAX_GAIN = 2.0  # nats per token
SEPARATOR = "\n\n"  # between a candidate and the anchor that is read after it


@dataclass(frozen=True)
class AnchoredRows:
    """A group to score.

    Attributes:
        prompt: the prompt x, images included.
        anchor: the anchor a, which is scored too; cut like a training target.
        candidates: token ids of the K candidates y.
        anchor_cut: whether the teacher's reply broke off, so that the anchor has no end-of-turn token.
    """

    prompt: Prompt
    anchor: str
    candidates: Rows
    anchor_cut: bool = False


@torch.no_grad()
def in_context_scores(
    model: CausalLM, encoder: Encoder, groups: Sequence[AnchoredRows], batch_size: int
) -> list[GroupScores]:
    """Score by what the anchor adds: the mean over tokens of log p(y_t | x, a, y_<t) - log p(y_t | x, y_<t), in nats.

    Each token's gain is clipped to `MAX_GAIN` nats, so that no single surprising token decides, such as a rare word
    that the anchor has too; docs/probe.md compares the forms that were tried. The prompt with the anchor is one shared
    prefix, the bare prompt another. The candidates' log-probs on the bare prompt come back with the scores.

    Args:
        model: the frozen p_sft.
        encoder: the run's encoder.
        groups: the groups.
        batch_size: rows per forward pass, of one group or of several.
    """
    rows = [[encoder.encode_answer(group.anchor, group.anchor_cut).ids, *group.candidates] for group in groups]
    anchored = [
        RowGroup(encoder.encode_anchored_prompt(group.prompt, group.anchor), own) for group, own in zip(groups, rows)
    ]
    bare = [RowGroup(encoder.encode_prompt(group.prompt, direct=True), own) for group, own in zip(groups, rows)]
    with_anchor = group_log_probs(model, anchored, encoder.pad, batch_size)
    # The anchors in a pass of their own: where the update takes the same groups together, candidates then run in its
    # shapes and get its log-probs to the bit.
    without = group_log_probs(model, bare, encoder.pad, batch_size, first_apart=True)
    return [_gain_scores(*pair) for pair in zip(with_anchor, without, strict=True)]


def _gain_scores(with_anchor: Sequence[Tensor], bare: Sequence[Tensor]) -> GroupScores:
    gains = [(given - alone).clamp(-MAX_GAIN, MAX_GAIN).mean() for given, alone in zip(with_anchor, bare, strict=True)]
    anchor, *candidates = torch.stack(gains).tolist()
    return GroupScores(anchor, candidates, bare[1:])


@torch.no_grad()
def reference_scores(
    model: CausalLM, encoder: Encoder, groups: Sequence[AnchoredRows], batch_size: int
) -> list[GroupScores]:
    """Score by the anchor's mean token probability after an answer (RLPR's reward, Yu et al., 2025), in [0, 1].

    An answer's end-of-turn token is left out, so that the anchor continues the same turn. See `in_context_scores` for
    the arguments.
    """
    separator = encoder.encode_literal(SEPARATOR)
    targets = [encoder.encode_answer(group.anchor, group.anchor_cut).ids for group in groups]
    rows = []
    for group, target in zip(groups, targets, strict=True):
        bodies = [[token for token in row if token not in encoder.ends] for row in (target, *group.candidates)]
        sequences = [[*body, *separator, *target] for body in bodies]
        rows.append(RowGroup(encoder.encode_prompt(group.prompt, direct=True), sequences))
    scores = []
    for target, log_probs in zip(targets, group_log_probs(model, rows, encoder.pad, batch_size), strict=True):
        anchor, *candidates = torch.stack([line[-len(target) :] for line in log_probs]).exp().mean(dim=1).tolist()
        scores.append(GroupScores(anchor, candidates))
    return scores

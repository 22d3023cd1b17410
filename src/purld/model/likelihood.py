"""Score candidates by the student's own likelihoods, with the anchor in its context or after the candidate.

A small student that cannot write down a score still knows how well a candidate fits the anchor: the anchor changes how
likely it finds the candidate's tokens. No decoding and no parsing; every score is a function of log-probs of one or two
forward passes, and only differences between scores of one group mean anything (section 3.3 uses relative magnitudes of
g alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.self_evaluation import GroupScores
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

Rows = Sequence[Sequence[int]]
"""Token ids of K sequences, each with its end-of-turn token where it has one."""

MAX_GAIN = 2.0  # nats per token
SEPARATOR = "\n\n"  # between a candidate and the anchor that is read after it


@torch.no_grad()
def in_context_scores(
    model: CausalLM, encoder: Encoder, prompt: Prompt, anchor: str, candidates: Rows, batch_size: int
) -> GroupScores:
    """Score by what the anchor adds: the mean over tokens of log p(y_t | x, a, y_<t) - log p(y_t | x, y_<t), in nats.

    Each token's gain is clipped to `MAX_GAIN` nats, so that no single surprising token decides, such as a rare word
    that the anchor has too; docs/probe.md compares the forms that were tried. The prompt with the anchor is one shared
    prefix, the bare prompt another. The candidates' log-probs on the bare prompt come back with the scores.

    Args:
        model: the frozen p_sft.
        encoder: the run's encoder.
        prompt: the prompt x, images included.
        anchor: the anchor a, which is scored too; cut like a training target.
        candidates: token ids of the K candidates y.
        batch_size: candidates per forward pass.
    """
    rows = [encoder.encode_answer(anchor).ids, *candidates]
    with_anchor = _token_log_probs(model, encoder.encode_anchored_prompt(prompt, anchor), rows, encoder.pad, batch_size)
    # The anchor's row alone: candidates then run in the update's shapes and get its log-probs to the bit.
    bare_prompt = encoder.encode_prompt(prompt, direct=True)
    bare = _token_log_probs(model, bare_prompt, rows, encoder.pad, batch_size, first_alone=True)
    scores = [
        float((given - alone).clamp(-MAX_GAIN, MAX_GAIN).mean()) for given, alone in zip(with_anchor, bare, strict=True)
    ]
    return GroupScores(scores[0], [*scores[1:]], bare[1:])


@torch.no_grad()
def reference_scores(
    model: CausalLM, encoder: Encoder, prompt: Prompt, anchor: str, candidates: Rows, batch_size: int
) -> GroupScores:
    """Score by the anchor's mean token probability after an answer (RLPR's reward, Yu et al., 2025), in [0, 1].

    An answer's end-of-turn token is left out, so that the anchor continues the same turn. See `in_context_scores` for
    the arguments.
    """
    separator, target = encoder.encode_literal(SEPARATOR), encoder.encode_answer(anchor).ids
    bodies = [[token for token in row if token not in encoder.ends] for row in (target, *candidates)]
    sequences = [[*body, *separator, *target] for body in bodies]
    prompt_ids = encoder.encode_prompt(prompt, direct=True)
    log_probs = _token_log_probs(model, prompt_ids, sequences, encoder.pad, batch_size)
    scores = [float(values[-len(target) :].exp().mean()) for values in log_probs]
    return GroupScores(scores[0], [*scores[1:]])


def _token_log_probs(
    model: CausalLM, prompt: EncodedPrompt, rows: Rows, pad: int, batch_size: int, first_alone: bool = False
) -> list[Tensor]:
    """Return the log-probs of each row's tokens, float32, without padding; the first row in a pass alone if asked."""
    prefix = make_prefix(model, prompt, rows, pad)
    values: list[Tensor] = []
    for part in (rows[:1], rows[1:]) if first_alone else (rows,):
        for batch in micro_batches(len(part), batch_size):
            log_probs, _ = prefix.token_log_probs(part[batch])
            values += [line[: len(row)] for line, row in zip(log_probs, part[batch], strict=True)]
    return values

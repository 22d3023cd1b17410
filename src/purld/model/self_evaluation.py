"""Anchor-conditioned self-evaluation: s = g(x, a, y), the frozen p_sft's score of a candidate (section 3.3).

Without an anchor it is the bare self-reward of Self-PPO.
Two kinds. `verbal` lets the evaluator write the number and reads it; a reply without a number leaves the
candidate unscored, never zero. `expected` reads the number off the evaluator's own distribution in one forward
pass: with "0." appended to the prompt, the logits before "0" weigh 0 against 1 and the logits after "0." weigh
the digits that follow, so the score is the mean of what the evaluator would have said to one decimal group.
No decoding, no parse failures, no ties.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.sample import Decoding, generate_completions
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

_NUMBER = re.compile(r"\s*(1(?:\.0+)?|0(?:\.\d+)?|\.\d+)(?![\d.]*\d)")
_VERBAL_TOKENS = 8


@dataclass(frozen=True)
class GroupScores:
    """The anchor's own score s* and the K candidates' scores; None where there is none."""

    anchor: float | None
    candidates: list[float | None]


class SelfEvaluator:
    """Scores groups with whatever weights it is handed; `model` is p_sft at the time of the call.

    Args:
        encoder: the run's encoder.
        kind: `expected` or `verbal`.
        batch_size: evaluations per forward pass.

    Raises:
        UserError: the tokenizer does not spell "0." as a zero and a point, which `expected` needs.
    """

    def __init__(self, encoder: Encoder, kind: Literal["expected", "verbal"], batch_size: int) -> None:
        self._encoder = encoder
        self._kind = kind
        self._batch_size = batch_size
        self._reader = _ScoreReader(encoder) if kind == "expected" else None

    @torch.no_grad()
    def score(self, model: Any, prompt: Prompt, anchor: str | None, candidates: Sequence[str]) -> GroupScores:
        """Score the anchor against itself, then every candidate, in [0, 1] (appendix C.4).

        Without an anchor, candidates are rated on their own.
        """
        frame = self._encoder.evaluation_frame(prompt, anchor)
        texts = candidates if anchor is None else (anchor, *candidates)
        tails = [self._encoder.literal(text) + frame.tail for text in texts]
        if self._reader is not None:
            scores = self._expected(model, frame.head, tails, self._reader)
        else:
            scores = self._verbal(model, frame.head, tails)
        return GroupScores(None, scores) if anchor is None else GroupScores(scores[0], scores[1:])

    def _expected(
        self, model: Any, head: EncodedPrompt, tails: list[list[int]], reader: _ScoreReader
    ) -> list[float | None]:
        scores: list[float | None] = []
        tails = [tail + reader.opening for tail in tails]
        prefix = make_prefix(model, head, tails, self._encoder.pad)
        for rows in micro_batches(len(tails), self._batch_size):
            scores += reader.expectation(prefix.closing_logits(tails[rows], 3)).tolist()
        return scores

    def _verbal(self, model: Any, head: EncodedPrompt, tails: list[list[int]]) -> list[float | None]:
        scores: list[float | None] = []
        greedy = Decoding(temperature=0.0, max_new_tokens=_VERBAL_TOKENS)
        for rows in micro_batches(len(tails), self._batch_size):
            replies = generate_completions(
                model, self._encoder, [EncodedPrompt(tail) for tail in tails[rows]], 1, greedy, head
            )
            scores += [parse_score(self._encoder.text(reply.ids)) for (reply,) in replies]
        return scores


def parse_score(reply: str) -> float | None:
    """The score that a reply opens with, or None if it does not open with a number in [0, 1]."""
    match = _NUMBER.match(reply)
    return float(match.group(1)) if match else None


class _ScoreReader:
    """Turns logits at the score's position into its expectation."""

    def __init__(self, encoder: Encoder) -> None:
        zero, one = encoder.literal("0"), encoder.literal("1")
        self.opening = encoder.literal("0.")
        # Some tokenizers open every text with a token of its own, which then comes before either digit.
        alike = len(zero) == len(one) and zero[:-1] == one[:-1]
        if not zero or not alike or self.opening[:-1] != zero:
            raise UserError(
                f"{encoder.tokenizer.name_or_path}: the tokenizer does not spell '0.' as the tokens "
                "'0' and '.'; use align.score=verbal with this model."
            )
        self._zero, self._one = zero[-1], one[-1]
        # Sorted, because a vocabulary's order differs between processes and so would the last bit of a sum.
        vocabulary = sorted((i, t) for t, i in encoder.tokenizer.get_vocab().items())
        digits = [(i, t) for i, t in vocabulary if re.fullmatch(r"[0-9]{1,3}", t)]
        self._digits = torch.tensor([i for i, _ in digits])
        self._values = torch.tensor([float(f"0.{t}") for _, t in digits])

    def expectation(self, logits: Tensor) -> Tensor:
        """(B,) expected scores from (B, 3, V) logits: before "0", before ".", after "0."."""
        device = logits.device
        leading = logits[:, 0, [self._zero, self._one]].softmax(dim=-1)  # (B, 2)
        following = logits[:, 2, :][:, self._digits.to(device)].softmax(dim=-1)  # (B, digits)
        fraction = following @ self._values.to(device)
        return leading[:, 1] + leading[:, 0] * fraction

"""Anchor-conditioned self-evaluation: s = g(x, a, y), the frozen p_sft's score of a candidate (section 3.3).

Without an anchor it is the bare self-reward of Self-PPO. There are two kinds:

- `verbal`: the evaluator writes a number, which is parsed. A reply without a number leaves the candidate unscored,
  never zero.
- `expected`: the score is read off the evaluator's own distribution in one forward pass. With "0." appended to the
  prompt, the logits before "0" weigh 0 against 1 and the logits after "0." weigh the digits that follow, so the score
  is the mean of what the evaluator would have said, to one group of digits. There is nothing to decode or to parse,
  and there are no ties.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from purld.errors import UserError
from purld.model.at_once import AtOnce
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.sample import Decoding, generate_completions
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

_NUMBER = re.compile(r"\s*(1(?:\.0+)?|0(?:\.\d+)?|\.\d+)(?![\d.]*\d)")
VERBAL_TOKENS = 8
SCORE_OPENING = "0."  # the beginning of a score that `expected` puts into the evaluator's mouth


@dataclass(frozen=True)
class GroupScores:
    """The scores of a group: the anchor's own s* and those of the K candidates; None where there is none.

    `log_probs` are log p_sft(y_kt | x, y_k<t) in nats of every candidate's tokens, float32, without padding, if a
    scorer computed them: the update then needs no pass of its own for them.
    """

    anchor: float | None
    candidates: list[float | None]
    log_probs: Sequence[Tensor] | None = field(default=None, compare=False, repr=False)


class SelfEvaluator:
    """A scorer of groups by the model that each call is given: p_sft at the time of the call.

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
        self._at_once = score_rows_at_once(batch_size)
        self._reader = _ScoreReader(encoder) if kind == "expected" else None

    @torch.no_grad()
    def score(self, model: CausalLM, prompt: Prompt, anchor: str | None, candidates: Sequence[str]) -> GroupScores:
        """Score the anchor against itself, then every candidate, in [0, 1] (appendix C.4).

        The anchor is cut like a training target, in both places. Without one, candidates are rated on their own.
        """
        frame = self._encoder.evaluation_frame(prompt, anchor)
        rows = [self._encoder.encode_literal(text) for text in candidates]
        if anchor is not None:
            rows.insert(0, self._encoder.encode_quoted_anchor(anchor))
        suffixes = [row + frame.suffix for row in rows]
        reader = self._reader
        if reader is not None:
            scores = self._at_once(lambda size: self._expected(model, frame.prefix, suffixes, reader, size), len(rows))
        else:
            scores = self._at_once(lambda size: self._verbal(model, frame.prefix, suffixes, size), len(rows))
        return GroupScores(None, scores) if anchor is None else GroupScores(scores[0], scores[1:])

    def _expected(
        self, model: CausalLM, shared: EncodedPrompt, suffixes: list[list[int]], reader: _ScoreReader, size: int
    ) -> list[float | None]:
        scores: list[float | None] = []
        suffixes = [suffix + reader.opening for suffix in suffixes]
        prefix = make_prefix(model, shared, suffixes, self._encoder.pad)
        for rows in micro_batches(len(suffixes), size):
            scores += reader.expected_scores(prefix.closing_logits(suffixes[rows], 3)).tolist()
        return scores

    def _verbal(
        self, model: CausalLM, shared: EncodedPrompt, suffixes: list[list[int]], size: int
    ) -> list[float | None]:
        scores: list[float | None] = []
        greedy = Decoding(temperature=0.0, max_new_tokens=VERBAL_TOKENS)
        for rows in micro_batches(len(suffixes), size):
            prompts = [EncodedPrompt(suffix) for suffix in suffixes[rows]]
            replies = generate_completions(model, self._encoder, prompts, 1, greedy, shared)
            scores += [parse_score(self._encoder.decode_text(reply.ids)) for (reply,) in replies]
        return scores


def score_rows_at_once(batch_size: int) -> AtOnce:
    """Return how many rows of a group a scorer reads at once, `batch_size` of them at first."""
    return AtOnce(
        batch_size,
        "fewer candidates are scored at once",
        "to score one candidate at a time; lower student.max_prompt_tokens, student.max_anchor_tokens or "
        "align.max_new_tokens",
    )


def parse_score(reply: str) -> float | None:
    """Return the score that a reply begins with, or None if it does not begin with a number in [0, 1]."""
    match = _NUMBER.match(reply)
    return float(match.group(1)) if match else None


class _ScoreReader:
    """The token ids of digits, to turn logits at the score's positions into an expected score."""

    def __init__(self, encoder: Encoder) -> None:
        zero, one = encoder.encode_literal("0"), encoder.encode_literal("1")
        self.opening = encoder.encode_literal(SCORE_OPENING)
        # Some tokenizers begin every text with a special token, which then comes before either digit.
        same_beginning = len(zero) == len(one) and zero[:-1] == one[:-1]
        if not zero or not same_beginning or self.opening[:-1] != zero:
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

    def expected_scores(self, logits: Tensor) -> Tensor:
        """Return (B,) expected scores of (B, 3, V) logits: before "0", before ".", after "0."."""
        device = logits.device
        leading = logits[:, 0, [self._zero, self._one]].softmax(dim=-1)  # (B, 2)
        following = logits[:, 2, :][:, self._digits.to(device)].softmax(dim=-1)  # (B, digits)
        fraction = following @ self._values.to(device)
        return leading[:, 1] + leading[:, 0] * fraction

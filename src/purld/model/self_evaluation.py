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
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from purld.errors import UserError
from purld.model.at_once import AtOnce
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import CPU_ROWS, BatchSize, GroupPass, RowGroup, micro_batches, plan_passes
from purld.model.sample import Decoding, generate_completions
from purld.model.vision import EncodedPrompt
from purld.records import Prompt

_EMPHASIS = r"[\s*_`]*"
_LABEL = rf"(?:(?:final|overall|scalar)\s+)?(?:score|rating){_EMPHASIS}[:=]"
# On another scale, with a decimal comma, or followed by a second number a number is no score.
_OTHER_SCALE = r"%|(?:/|(?:out\s+)?of\b)(?!\s*1(?:\.0+)?(?![\d.]*\d))"
_SECOND_NUMBER = r"(?:[-–]|(?:to|or|and)\b)[ \t]*\.?\d"
_SCORE = re.compile(
    rf"{_EMPHASIS}(?P<label>{_LABEL}{_EMPHASIS})?(?P<number>1(?:\.0+)?|0(?:\.\d+)?|\.\d+)"
    rf"(?![\d.]*\d|,\d|e[-+]?\d|[ \t*_`(]*(?:{_OTHER_SCALE}|{_SECOND_NUMBER}))",
    re.IGNORECASE,
)
# A 0 or 1 without a label can be a list's mark or a count ("1. The answer", "0 errors"): it has its line to itself, and
# the next line does not begin with a number, or a reason follows it ("1, because"), or it names its scale ("1/1").
_CLOSING = r"[ \t*_`.!]*"
_LINE_MARKS = r"[\r\n][\s*_`#-]*"
_REASON = r"[ \t*_`]*(?:[,;—–(][ \t]*[^\W\d_]|because\b)"
_STANDS_ALONE = re.compile(
    rf"{_CLOSING}(?:{_LINE_MARKS}(?:\Z|[^\s*_`#\d-])|\Z)|{_REASON}|[ \t*_`(]*(?:/|(?:out\s+)?of\b)", re.IGNORECASE
)
_UNDECIDED_LINE = re.compile(rf"{_CLOSING}(?:{_LINE_MARKS})?")
# What may stand behind a number while it can still turn out longer, on another scale or the first of two.
_UNDECIDED = re.compile(
    r"[.,]+|e[-+]?|[ \t*_`(]*(?:(?:[-–/\ufffd]|out?|(?:out\s+)?of?|to?|or|an?d?)\s*[\d.]*)?",  # U+FFFD: half of a dash
    re.IGNORECASE,
)
VERBAL_TOKENS = 16  # a label, emphasis around it, the number and the beginning of what follows
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


@dataclass(frozen=True)
class GroupTexts:
    """A prompt, its anchor if the evaluator is shown one, and the texts of its candidates."""

    prompt: Prompt
    anchor: str | None
    candidates: Sequence[str]


class SelfEvaluator:
    """A scorer of groups by the model that each call is given: p_sft at the time of the call.

    Args:
        encoder: the run's encoder.
        kind: `expected` or `verbal`.
        batch_size: evaluations per forward pass, of one group or of several; see `score_rows_at_once`.

    Raises:
        UserError: the tokenizer does not spell "0." as a zero and a point, which `expected` needs.
    """

    def __init__(self, encoder: Encoder, kind: Literal["expected", "verbal"], batch_size: BatchSize) -> None:
        self._encoder = encoder
        self._kind = kind
        self._at_once = score_rows_at_once(batch_size)
        self._reader = _ScoreReader(encoder) if kind == "expected" else None

    def score(self, model: CausalLM, prompt: Prompt, anchor: str | None, candidates: Sequence[str]) -> GroupScores:
        """Score one group; see `score_groups`."""
        return self.score_groups(model, [GroupTexts(prompt, anchor, candidates)])[0]

    @torch.no_grad()
    def score_groups(self, model: CausalLM, groups: Sequence[GroupTexts]) -> list[GroupScores]:
        """Score each group's anchor against itself, then every candidate, in [0, 1] (appendix C.4).

        The anchor is cut like a training target, in both places. Without one, candidates are rated on their own.
        """
        rows = [self._evaluations(group) for group in groups]
        scored = self._verbal(model, rows) if self._reader is None else self._expected(model, rows, self._reader)
        return [
            GroupScores(None, scores) if group.anchor is None else GroupScores(scores[0], scores[1:])
            for group, scores in zip(groups, scored, strict=True)
        ]

    def _evaluations(self, group: GroupTexts) -> RowGroup:
        """Return a group's evaluations: their shared prefix, and the rest of each, up to the score."""
        frame = self._encoder.evaluation_frame(group.prompt, group.anchor)
        rows = [self._encoder.encode_literal(text) for text in group.candidates]
        if group.anchor is not None:
            rows.insert(0, self._encoder.encode_quoted_anchor(group.anchor))
        opening = [] if self._reader is None else self._reader.opening
        return RowGroup(frame.prefix, [[*row, *frame.suffix, *opening] for row in rows])

    def _expected(self, model: CausalLM, groups: Sequence[RowGroup], reader: _ScoreReader) -> list[list[float | None]]:
        def read(size: int) -> list[list[float | None]]:
            found: list[list[float | None]] = []
            for together in plan_passes(model, groups, self._encoder.pad, size):
                whole = GroupPass(model, together, self._encoder.pad, size)
                scores: list[float | None] = []
                for part in whole.parts:
                    scores += reader.expected_scores(whole.closing_logits(part, 3)).tolist()
                found += [scores[own] for own in whole.slices]
            return found

        return self._at_once(read, sum(len(group.rows) for group in groups))

    def _verbal(self, model: CausalLM, groups: Sequence[RowGroup]) -> list[list[float | None]]:
        return [self._at_once(partial(self._verbal_scores, model, group), len(group.rows)) for group in groups]

    def _verbal_scores(self, model: CausalLM, group: RowGroup, size: int) -> list[float | None]:
        scores: list[float | None] = []
        greedy = Decoding(temperature=0.0, max_new_tokens=VERBAL_TOKENS)
        for part in micro_batches(len(group.rows), size):
            prompts = [EncodedPrompt([*row]) for row in group.rows[part]]
            replies = generate_completions(model, self._encoder, prompts, 1, greedy, group.prompt)
            scores += [parse_score(self._encoder.decode_text(r.ids), cut=not r.finished) for (r,) in replies]
        return scores


def score_rows_at_once(batch_size: BatchSize) -> AtOnce:
    """Return how many rows, of one group or of several, a scorer reads at once: `batch_size` of them at first.

    auto: `CPU_ROWS` on a CPU; on a GPU all, where several groups share a pass of at most `PASS_TOKENS` tokens.
    """
    of_device = None if torch.cuda.is_available() else CPU_ROWS
    return AtOnce(
        of_device if batch_size == "auto" else batch_size,
        "fewer candidates are scored at once",
        "to score one candidate at a time; lower student.max_prompt_tokens, student.max_anchor_tokens or "
        "align.max_new_tokens",
    )


def parse_score(reply: str, cut: bool = False) -> float | None:
    """Return the score that a reply begins with, or None if it does not begin with a number in [0, 1].

    A label ("Score: 0.8") or emphasis ("**0.85**") may stand before it. A number on another scale ("1/10", "0,85") or
    one of several ("0.8 or 0.9") is none, and so is a 0 or 1 without a label that may be a list's mark ("1. The
    answer") or a count ("0 errors", "1 star").

    Args:
        reply: the reply.
        cut: whether the reply met its limit. What is missing could then be more of the number or its scale, so it has
            a score only if what follows the number rules that out ("0.8" and "1 out of 1" are none, "0.8 because" is).
    """
    match = _SCORE.match(reply)
    if match is None:
        return None
    number, end = match["number"], match.end("number")
    bare = match["label"] is None and "." not in number
    if bare and not _STANDS_ALONE.match(reply, end):
        return None
    if cut and (_UNDECIDED.fullmatch(reply, end) or (bare and _UNDECIDED_LINE.fullmatch(reply, end))):
        return None
    return float(number)


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

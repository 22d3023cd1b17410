"""Find out whether a fine-tuned student ends its answers when it samples.

A base model may never have learned the token that a chat template ends turns with. That token's weights are then nearly
those of all other tokens that the model has not learned, and these share its probability: greedy answers end, sampled
ones run on to the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch

from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.prefix import FullSequences
from purld.model.sample import end_tokens
from purld.model.vision import EncodedPrompt

_MEASURED = 16  # answers
_MOSTLY = 0.5  # of the answers: after fewer the student is undecided whether to end, which long answers may explain
_IMPROBABLE = 0.2  # the likeliest token of a learned vocabulary is mostly far above it


@dataclass(frozen=True)
class TurnEnd:
    """What follows the end of answers that the student was trained on.

    Attributes:
        token: the token that ends a turn.
        probabilities: how probable the end is after each answer after which it is the likeliest token.
        answers: how many answers were measured.
    """

    token: str
    probabilities: Sequence[float]
    answers: int

    @property
    def warning(self) -> str | None:
        """Return a sentence if sampled answers will not end although greedy ones do; None otherwise."""
        if len(self.probabilities) < _MOSTLY * self.answers or fmean(self.probabilities) > _IMPROBABLE:
            return None
        return (
            f"after {len(self.probabilities)} of {self.answers} anchors {self.token!r} is p_sft's likeliest token, but "
            f"with a mean probability of only {fmean(self.probabilities):.2f}, so most sampled answers will not end. "
            "The base model has probably never learned that token: take a chat template that ends turns with one it "
            "knows, such as its own eos token (student.chat_template)."
        )


@torch.no_grad()
def measure_turn_end(
    model: CausalLM, encoder: Encoder, examples: Sequence[tuple[EncodedPrompt, Sequence[int]]]
) -> TurnEnd | None:
    """Measure what follows the first whole answers; None if all were cut or are empty.

    Args:
        model: the student, without dropout.
        encoder: the run's encoder.
        examples: prompts and the token ids of their answers, with the end-of-turn token unless they were cut.
    """
    ends = sorted(end_tokens(model, encoder))
    whole = ((prompt, answer) for prompt, answer in examples if len(answer) > 1 and answer[-1] == encoder.end)
    measured, likely = list(islice(whole, _MEASURED)), []
    for prompt, answer in measured:
        before = FullSequences(model, [prompt.followed_by(answer[:-1])], encoder.pad)
        logits = before.closing_logits([[]], 1).squeeze()
        if logits.argmax().item() in ends:
            likely.append(logits.softmax(-1)[ends].sum().item())
    token = str(encoder.tokenizer.convert_ids_to_tokens(encoder.end))
    return TurnEnd(token, likely, len(measured)) if measured else None

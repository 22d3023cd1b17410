"""Find out whether a fine-tuned student ends its answers when it samples.

A base model may never have learned the token that a chat template ends turns with. That token's weights are then nearly
those of all other tokens that the model has not learned, and these share its probability: greedy answers end, sampled
ones run on to the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.prefix import FullSequences
from purld.model.vision import EncodedPrompt

_LIKELIEST = 0.5  # of the answers: after fewer the student is undecided whether to end, which long answers may explain
_IMPROBABLE = 0.2  # the likeliest token of a learned vocabulary is mostly far above it


@dataclass(frozen=True)
class TurnEnd:
    """What follows the end of answers that the student was trained on.

    Attributes:
        token: the token that ends a turn.
        likeliest: the share of the answers after which it is the likeliest token.
        probability: its mean probability there.
    """

    token: str
    likeliest: float
    probability: float

    @property
    def warning(self) -> str | None:
        """Return a sentence if sampled answers will not end although greedy ones do; None otherwise."""
        if self.likeliest < _LIKELIEST or self.probability > _IMPROBABLE:
            return None
        return (
            f"after an anchor {self.token} is mostly p_sft's likeliest token, but with a probability of only "
            f"{self.probability:.2f}, so most sampled answers will not end; the base model has probably never learned "
            "that token. Take a chat template that ends turns with a token it has learned, such as its own eos token "
            "(student.chat_template)."
        )


@torch.no_grad()
def measure_turn_end(
    model: CausalLM, encoder: Encoder, examples: Sequence[tuple[EncodedPrompt, Sequence[int]]]
) -> TurnEnd | None:
    """Measure what follows the answers of some prompts; None if all of them were cut, or are empty.

    Args:
        model: the student.
        encoder: the run's encoder.
        examples: prompts and the token ids of their answers, with the end-of-turn token.
    """
    found = []
    for prompt, answer in examples:
        if len(answer) > 1 and answer[-1] == encoder.end:
            logits = FullSequences(model, [prompt], encoder.pad).closing_logits([answer[:-1]], 1).squeeze()
            found.append((logits.argmax().item() == encoder.end, logits.softmax(-1)[encoder.end].item()))
    if not found:
        return None
    likeliest, probabilities = zip(*found)
    token = str(encoder.tokenizer.convert_ids_to_tokens(encoder.end))
    return TurnEnd(token, fmean(likeliest), fmean(probabilities))

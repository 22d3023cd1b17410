"""A tiny student in training: lessons in, losses and gradients out, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from purld.records import IMAGE
from purld.testbed.lessons import Kind, Lesson
from purld.testbed.students import Design

# Next to the reply the user turn is read too, at this weight: predicting words that are copied from the question
# teaches copying many times faster than the reply alone. A bare comparison is of random words, and a caption's turn
# is always the same: nothing to predict.
READING: dict[Kind, float] = {"answer": 1.0, "judgement": 0.3, "comparison": 0.0, "caption": 0.0}


@dataclass(frozen=True)
class Turn:
    """A lesson in tokens; the reply starts at `start`."""

    ids: list[int]
    start: int
    kind: Kind
    picture: Image | None = None


class Learner:
    """A model with what makes its tensors.

    Args:
        design: what the student is made of.
        model: the model in training.
        tokenizer: its tokenizer.
    """

    def __init__(self, design: Design, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.design, self.model, self.tokenizer = design, model, tokenizer
        self._eyes = design.image_processor() if design.image_processor else None
        self.image_id = tokenizer.convert_tokens_to_ids(design.image_token) if design.image_token else None

    def render(self, prompt: str) -> list[int]:
        """One user turn, ready for the reply, as token ids; a picture takes nine."""
        content: Any = prompt
        if IMAGE in prompt:
            before, _, after = prompt.partition(IMAGE)
            texts = ({"type": "text", "text": text} for text in (before, after))
            parts = [next(texts), {"type": "image"}, next(texts)]
            content = [part for part in parts if part.get("text") != ""]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        if self.design.image_token:
            text = text.replace(self.design.image_token, self.design.image_token * 9)
        return list(self.tokenizer(text)["input_ids"])

    def encode(self, lesson: Lesson) -> Turn:
        """The lesson as the student will see it, closed by the end of the turn."""
        prompt = self.render(lesson.prompt)
        reply = self.tokenizer(lesson.reply)["input_ids"]
        return Turn([*prompt, *reply, self.tokenizer.eos_token_id], len(prompt), lesson.kind, lesson.picture)

    def pixels(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """What the model takes of some pictures."""
        assert self._eyes is not None
        return dict(self._eyes(images=list(pictures), return_tensors="pt"))

    def features(self, pictures: Sequence[Image]) -> Tensor:
        """(P, cells, H): pictures as the language model sees them."""
        found = self.model.model.get_image_features(**self.pixels(pictures), return_dict=True)
        return torch.stack(list(found.pooler_output))

    def losses(self, turns: Sequence[Turn], features: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of each turn in nats, shape (B,): twice the mean over an answer's tokens, the sum over a
        score's, and the mean over the user turn at its READING weight.

        A score's tokens but one or two are always the same, and a mean would thin out the one that matters.

        Args:
            turns: what to learn.
            features: (cells, H) of the picture of each turn; none where turns have no pictures.
        """
        width = max(len(t.ids) for t in turns)
        ids = torch.zeros(len(turns), width, dtype=torch.long)
        weights = torch.zeros(len(turns), width)
        for row, turn in enumerate(turns):
            ids[row, : len(turn.ids)] = torch.tensor(turn.ids)
            length = len(turn.ids) - turn.start
            weights[row, : turn.start] = READING[turn.kind] / turn.start
            weights[row, turn.start : len(turn.ids)] = 1.0 if turn.kind in ("judgement", "comparison") else 2.0 / length
        if self.image_id is not None:
            weights[ids == self.image_id] = 0.0
        # Padding on the right needs no mask: nothing that counts attends to it.
        hidden = self._hidden(ids[:, :-1], features)
        weights, targets = weights[:, 1:], ids[:, 1:]
        counted = weights > 0
        logits = self.model.lm_head(hidden[counted])
        losses = torch.nn.functional.cross_entropy(logits, targets[counted], reduction="none")
        return torch.zeros_like(weights).masked_scatter(counted, losses * weights[counted]).sum(1)

    def _hidden(self, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """(B, L, H) last hidden states."""
        seen: dict[str, Any] = {}
        if len(features):
            seen["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(features))}
            if self.design.grid:
                seen["image_grid_thw"] = torch.tensor([self.design.grid] * len(ids))
                seen["mm_token_type_ids"] = (ids == self.image_id).int()
        return self.model.model(input_ids=ids, use_cache=False, **seen).last_hidden_state

    def backward(self, lessons: Iterable[Lesson], parts: int) -> tuple[float, float]:
        """Gradients of the mean loss of a batch; returns the mean loss of its answers and of its judgements.

        The batch is computed in `parts` from the shorter to the longer lessons: less padding.
        """
        turns = sorted((self.encode(lesson) for lesson in lessons), key=lambda t: len(t.ids))
        pictures = list({id(t.picture): t.picture for t in turns if t.picture is not None}.values())
        features = self.features(pictures) if pictures else torch.empty(0)
        # The tower is passed once: the parts leave their gradients at its features.
        leaf = features.detach().requires_grad_()
        place = {id(picture): index for index, picture in enumerate(pictures)}
        total, size = [0.0, 0.0], -(-len(turns) // parts)
        for start in range(0, len(turns), size):
            part = turns[start : start + size]
            loss = self.losses(part, [leaf[place[id(t.picture)]] for t in part if t.picture is not None])
            (loss.sum() / len(turns)).backward()
            for turn, value in zip(part, loss.tolist()):
                total[turn.kind in ("judgement", "comparison")] += value
        if pictures:
            features.backward(leaf.grad)
        judged = sum(t.kind in ("judgement", "comparison") for t in turns)
        return total[0] / max(1, len(turns) - judged), total[1] / max(1, judged)

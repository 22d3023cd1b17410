"""A tiny student in training: lessons in, losses and gradients out, whatever its architecture."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image as Picture
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from purld.data.images import read_image
from purld.model.encode import Encoder, pad_right
from purld.model.vision import PIXELS, EncodedPrompt, pixel_inputs
from purld.records import IMAGE, Image, Prompt
from purld.testbed.students.lessons import Kind, Lesson
from purld.testbed.world import scene_image
from purld.testbed.world.scenes import Scene

# Next to the reply the user turn is read too, at this weight: predicting words that are copied from the question
# teaches copying many times faster than the reply alone. A bare comparison is of random words, and a caption's turn
# is always the same: nothing to predict.
READING: dict[Kind, float] = {"answer": 1.0, "judgement": 0.3, "comparison": 0.0, "caption": 0.0, "lookup": 0.0}


@dataclass(frozen=True)
class EncodedLesson:
    """A lesson in tokens; the reply starts after the head."""

    head: EncodedPrompt
    reply: list[int]
    lesson: Lesson

    @property
    def ids(self) -> list[int]:
        """Head and reply."""
        return [*self.head.ids, *self.reply]


class Learner:
    """A model in training with what makes its tensors.

    Args:
        model: the model.
        encoder: of the processor that its directory will be loaded with, so that lessons have the tokens of a run.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        # All pictures are of one size and take the same places: one stands in for all where only tokens are meant.
        (self._any,) = as_images([scene_image.draw(Scene(()), random.Random(0))])

    def encode(self, lesson: Lesson) -> EncodedLesson:
        """The lesson as the student will see it, closed by the end of the turn."""
        prompt = Prompt.from_text(lesson.prompt, images=(self._any,) * lesson.prompt.count(IMAGE))
        return EncodedLesson(
            self.encoder.encode_prompt(prompt), [*self.encoder.encode_literal(lesson.reply), self.encoder.end], lesson
        )

    def features(self, shown: Sequence[Picture]) -> Tensor:
        """(P, cells, H): pictures as the language model sees them."""
        pixels = self.encoder.processor.image_processor(images=list(shown), return_tensors="pt")
        found = self.model.model.get_image_features(**pixels, return_dict=True)
        return torch.stack(list(found.pooler_output))

    def embedding(self, word: str) -> Tensor:
        """(H,): the vector of a word inside a sentence, without gradient.

        Raises:
            ValueError: the tokenizer has no piece of its own for it.
        """
        ids = self.encoder.encode_literal(f" {word}")
        if len(ids) != 1:
            raise ValueError(f"{word!r} is no single token")
        weight = cast(Tensor, self.model.get_input_embeddings().weight)
        return weight[ids[0]].detach().clone()

    def losses(self, turns: Sequence[EncodedLesson], seen: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of each turn in nats, shape (B,): twice the mean over an answer's tokens, the sum over a
        bare reply's, and the mean over the user turn at its READING weight.

        A score's tokens but one or two are always the same, and a mean would thin out the one that matters.

        Args:
            turns: what to learn.
            seen: the features (cells, H) of the pictures of those turns that have one.
        """
        ids, _ = pad_right([turn.ids for turn in turns], 0, torch.device("cpu"))
        weights = torch.zeros(ids.shape)
        for row, turn in enumerate(turns):
            start, length = len(turn.head), len(turn.reply)
            weights[row, :start] = READING[turn.lesson.kind] / start
            weights[row, start : start + length] = 1.0 if turn.lesson.bare else 2.0 / length
        weights[torch.isin(ids, torch.tensor(self.encoder.placeholders, dtype=torch.long))] = 0.0
        # Padding on the right needs no mask: nothing that counts attends to it.
        hidden = self._hidden(turns, ids[:, :-1], seen)
        weights, targets = weights[:, 1:], ids[:, 1:]
        counted = weights > 0
        logits = self.model.lm_head(hidden[counted])
        losses = torch.nn.functional.cross_entropy(logits, targets[counted], reduction="none")
        return torch.zeros_like(weights).masked_scatter(counted, losses * weights[counted]).sum(1)

    def backward(self, lessons: Iterable[Lesson], parts: int) -> tuple[float, float]:
        """Gradients of the mean loss of a batch; returns the mean loss of its answers and of its judgements.

        The batch is computed in `parts` from the shorter to the longer lessons: less padding. The tower is passed
        once, a picture once: the parts leave their gradients at its features.
        """
        turns = sorted((self.encode(lesson) for lesson in lessons), key=lambda turn: len(turn.ids))
        shown = list({id(t.lesson.picture): t.lesson.picture for t in turns if t.lesson.picture is not None}.values())
        features = self.features(shown) if shown else torch.empty(0)
        leaf = features.detach().requires_grad_()
        place = {id(picture): index for index, picture in enumerate(shown)}
        total, size = [0.0, 0.0], -(-len(turns) // parts)
        for start in range(0, len(turns), size):
            part = turns[start : start + size]
            loss = self.losses(part, [leaf[place[id(t.lesson.picture)]] for t in part if t.lesson.picture is not None])
            (loss.sum() / len(turns)).backward()
            for turn, value in zip(part, loss.tolist()):
                total[turn.lesson.judging] += value
        if shown:
            features.backward(leaf.grad)
        judged = sum(turn.lesson.judging for turn in turns)
        return total[0] / max(1, len(turns) - judged), total[1] / max(1, judged)

    def _hidden(self, turns: Sequence[EncodedLesson], ids: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """(B, L, H) last hidden states."""
        given: dict[str, Any] = {}
        if seen:
            given = pixel_inputs([turn.head for turn in turns], ids)
            # Not the pixels of the picture that stands in, but what was made of those that are meant.
            del given[PIXELS]
            given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=cast(Tensor, list(seen)))}
        hidden: Tensor = self.model.model(input_ids=ids, use_cache=False, **given).last_hidden_state
        return hidden


def as_images(shown: Sequence[Picture]) -> list[Image]:
    """Pictures as prompts carry them; one that comes several times is encoded once."""
    distinct = {id(picture): picture for picture in shown}
    found = {key: read_image(scene_image.encode(picture), Path()) for key, picture in distinct.items()}
    return [found[id(picture)] for picture in shown]

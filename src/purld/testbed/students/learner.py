"""Turn lessons into losses and gradients for a tiny student of any architecture. Optimizers are in `build`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image as PilImage
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

# Weight of the mean loss over the prompt's tokens. Predicting words that are copied from the question teaches copying
# many times faster than the reply alone. The prompt of a bare comparison is random words and that of a caption is
# always the same, so both have nothing to predict.
PROMPT_LOSS_WEIGHTS: dict[Kind, float] = {
    "answer": 1.0,
    "judgement": 0.3,
    "comparison": 0.0,
    "caption": 0.0,
    "lookup": 0.0,
}


@dataclass(frozen=True)
class EncodedLesson:
    """A lesson in tokens: the reply follows the prompt."""

    prompt: EncodedPrompt
    reply: list[int]
    lesson: Lesson

    @property
    def ids(self) -> list[int]:
        """The token ids of prompt and reply."""
        return [*self.prompt.ids, *self.reply]


class Learner:
    """A model in training with what makes its tensors.

    Args:
        model: the model to train.
        encoder: uses the processor that the student's directory is loaded with, so that lessons have the token ids of
            a run.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        # All images have the same size and take the same token positions, so any one of them gives the token ids.
        (self._any_image,) = to_prompt_images([scene_image.render_scene(Scene(()), random.Random(0))])

    def encode_lesson(self, lesson: Lesson) -> EncodedLesson:
        """Encode a lesson as the student reads it, closed by the end of the turn."""
        prompt = Prompt.from_text(lesson.prompt, images=(self._any_image,) * lesson.prompt.count(IMAGE))
        return EncodedLesson(
            self.encoder.encode_prompt(prompt), [*self.encoder.encode_literal(lesson.reply), self.encoder.end], lesson
        )

    def image_features(self, images: Sequence[PilImage]) -> Tensor:
        """Compute the vectors that the language model reads for each image, shape (images, cells, hidden)."""
        pixels = self.encoder.processor.image_processor(images=list(images), return_tensors="pt")
        encoded = self.model.model.get_image_features(**pixels, return_dict=True)
        return torch.stack(list(encoded.pooler_output))

    def word_embedding(self, word: str) -> Tensor:
        """Return the input embedding (hidden,) of a word inside a sentence, without gradient.

        Raises:
            ValueError: the word is not a single token.
        """
        ids = self.encoder.encode_literal(f" {word}")
        if len(ids) != 1:
            raise ValueError(f"{word!r} is not a single token")
        weight = cast(Tensor, self.model.get_input_embeddings().weight)
        return weight[ids[0]].detach().clone()

    def compute_losses(self, batch: Sequence[EncodedLesson], features: Sequence[Tensor]) -> Tensor:
        """Compute the loss of each lesson, shape (B,): weighted cross-entropy in nats.

        An answer counts twice its mean over tokens, a bare reply the sum over its tokens, and the prompt its mean
        times PROMPT_LOSS_WEIGHTS. All but one or two tokens of a score are always the same, so a mean would thin out
        the one that matters.

        Args:
            batch: encoded lessons.
            features: image features (cells, hidden) of those lessons that have an image, in order.
        """
        ids, _ = pad_right([encoded.ids for encoded in batch], 0, torch.device("cpu"))
        weights = torch.zeros(ids.shape)
        for row, encoded in enumerate(batch):
            start, length = len(encoded.prompt), len(encoded.reply)
            weights[row, :start] = PROMPT_LOSS_WEIGHTS[encoded.lesson.kind] / start
            weights[row, start : start + length] = 1.0 if encoded.lesson.bare else 2.0 / length
        weights[torch.isin(ids, torch.tensor(self.encoder.placeholders, dtype=torch.long))] = 0.0
        # Right padding needs no attention mask: no weighted position attends to it.
        hidden = self._hidden(batch, ids[:, :-1], features)
        weights, targets = weights[:, 1:], ids[:, 1:]
        weighted = weights > 0
        logits = self.model.lm_head(hidden[weighted])
        losses = torch.nn.functional.cross_entropy(logits, targets[weighted], reduction="none")
        return torch.zeros_like(weights).masked_scatter(weighted, losses * weights[weighted]).sum(1)

    def accumulate_gradients(self, lessons: Iterable[Lesson], micro_batches: int) -> tuple[float, float]:
        """Add the gradients of the mean loss of a batch; return the mean losses of its answers and its judgements.

        Micro-batches go from shorter to longer lessons, which saves padding. The tower encodes each distinct image
        once: micro-batches accumulate gradients at the image features, and one backward pass takes them through the
        tower.
        """
        batch = sorted((self.encode_lesson(lesson) for lesson in lessons), key=lambda encoded: len(encoded.ids))
        lesson_images = [encoded.lesson.image for encoded in batch if encoded.lesson.image is not None]
        images = list({id(image): image for image in lesson_images}.values())
        features = self.image_features(images) if images else torch.empty(0)
        leaf = features.detach().requires_grad_()
        image_index = {id(image): index for index, image in enumerate(images)}
        totals, size = [0.0, 0.0], -(-len(batch) // micro_batches)
        for start in range(0, len(batch), size):
            micro_batch = batch[start : start + size]
            micro_batch_images = [e.lesson.image for e in micro_batch if e.lesson.image is not None]
            losses = self.compute_losses(micro_batch, [leaf[image_index[id(image)]] for image in micro_batch_images])
            (losses.sum() / len(batch)).backward()
            for encoded, loss in zip(micro_batch, losses.tolist()):
                totals[encoded.lesson.judging] += loss
        if images:
            features.backward(leaf.grad)
        judgements = sum(encoded.lesson.judging for encoded in batch)
        return totals[0] / max(1, len(batch) - judgements), totals[1] / max(1, judgements)

    def _hidden(self, batch: Sequence[EncodedLesson], ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return the last hidden states, shape (B, L, hidden)."""
        extra_inputs: dict[str, Any] = {}
        if features:
            extra_inputs = pixel_inputs([encoded.prompt for encoded in batch], ids)
            # The pixels are those of the stand-in image; the features are those of the lessons' own images.
            del extra_inputs[PIXELS]
            output = BaseModelOutputWithPooling(pooler_output=cast(Tensor, list(features)))
            extra_inputs["mm_encoder_outputs"] = {"image": output}
        hidden: Tensor = self.model.model(input_ids=ids, use_cache=False, **extra_inputs).last_hidden_state
        return hidden


def to_prompt_images(images: Sequence[PilImage]) -> list[Image]:
    """Convert images to the form that prompts carry; an image that occurs several times is encoded once."""
    distinct = {id(image): image for image in images}
    encoded = {key: read_image(scene_image.encode_png(image), Path()) for key, image in distinct.items()}
    return [encoded[id(image)] for image in images]

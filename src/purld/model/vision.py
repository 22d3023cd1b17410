"""The inputs of a model besides token ids: images as its processor prepares them, and their vision features.

An encoded prompt carries its images unprepared; they become pixels when a forward pass needs them. While a model's
vision modules are frozen, their features of an image are cached, so that sampler, reference, evaluator and policy
compute them once between them. While they are trained, every forward pass computes them again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image as Pil
from torch import Tensor, nn

from purld.data.images import open_image
from purld.errors import UserError, reason_of
from purld.model.causal_lm import CausalLM, unwrap_adapters
from purld.model.tensor_lru import TensorLRU
from purld.records import Image

PIXELS = "pixel_values"
_INTERMEDIATE = ("last_hidden_state", "hidden_states", "attentions")
# The pixels of a hundred photographs, and a hundred times a 7B model's features of one: more than most steps have.
_PIXEL_CACHE_BYTES, _FEATURE_CACHE_BYTES = 2 * 2**30, 2**30
_SAMPLE_SIZE = (64, 64)  # of the image that a processor is tried on


class ImagePreparer:
    """The image part of a processor: what its own call returns for a chat's images, apart from the text around them.

    The processor is tried on one image first. If it turned an image into anything but placeholder tokens and tensors,
    the model would be given prompts that it was not trained on.

    Args:
        processor: a processor of transformers, with an image processor and an image token.
        max_pixels: larger images are scaled down first; None leaves that to the image processor.

    Attributes:
        placeholder: the text that stands for an image before it is expanded.
        marks: all texts that the model reads as part of an image.

    Raises:
        UserError: the processor is not one of that kind.
    """

    def __init__(self, processor: Any, max_pixels: int | None = None) -> None:
        self._processor = processor
        self._max_pixels = max_pixels
        try:
            self.placeholder: str = self._processor.image_token
            self._types_name = self._try_processor()
            tokens = [token for token in self._processor.image_token_ids if token is not None]
            self.marks = {self.placeholder, *self._processor.tokenizer.convert_ids_to_tokens(tokens)}
        except Exception as error:  # an unknown processor may raise anything
            raise UserError(
                f"{self._processor.tokenizer.name_or_path}: {type(processor).__name__} does not handle images the way "
                f"processors of transformers commonly do, so that purld cannot train this model ({reason_of(error)})."
            ) from None
        self._tokens = torch.tensor(tokens)
        self._text_inputs = {*self._processor.tokenizer.model_input_names, self._types_name}
        self._image_texts: dict[tuple[tuple[int, int], ...], list[str]] = {}
        self._prepared = TensorLRU[dict[str, Tensor]](_PIXEL_CACHE_BYTES)

    def image_texts(self, images: tuple[Image, ...]) -> list[str]:
        """Return the text that stands for each image of a prompt: as many placeholders as the model takes tokens.

        It depends only on the sizes of the prompt's images, so of many images of one size only one is opened.
        """
        sizes = tuple(image.size for image in images)
        if sizes not in self._image_texts:
            self._image_texts[sizes] = self._process(map(self._open, images))[0]
        return self._image_texts[sizes]

    def pixels(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        """Return the tensors that the model's `forward` takes for the images of a prompt, on the CPU."""
        return self._prepared.get(tuple(image.digest for image in images), lambda: self._prepare(images))

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Return 1 where a token of `ids` belongs to an image, for models with such an input; else nothing."""
        if self._types_name is None:
            return {}
        return {self._types_name: torch.isin(ids, self._tokens.to(ids.device)).long()}

    def _try_processor(self) -> str | None:
        """Return the name of the model's input that says which tokens belong to an image, if it has one.

        Raises:
            ValueError: the processor puts more than image texts into a text.
        """
        image_texts, inputs = self._process([Pil.new("RGB", _SAMPLE_SIZE)])
        expected = self._processor.tokenizer.encode("".join(image_texts), add_special_tokens=False)
        if inputs["input_ids"].tolist() != [expected]:
            raise ValueError("it puts more into the text than what stands for images")
        return next((name for name, value in inputs.items() if name.endswith("token_type_ids") and value.any()), None)

    def _prepare(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        _, inputs = self._process(map(self._open, images))
        return {name: value for name, value in inputs.items() if name not in self._text_inputs}

    def _process(self, opened: Iterable[Pil.Image]) -> tuple[list[str], Any]:
        """Return the text that stands for each of a prompt's images, and all inputs that the processor makes."""
        images = list(opened)
        inputs = self._processor(
            text=[self.placeholder * len(images)],
            images=[images],
            add_special_tokens=False,
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        (replaced,) = inputs.pop("text_replacement_offsets")
        return [piece["replacement"] for piece in replaced], inputs

    def _open(self, image: Image) -> Pil.Image:
        opened = open_image(image)
        pixels = opened.width * opened.height
        if self._max_pixels is None or pixels <= self._max_pixels:
            return opened
        scale = (self._max_pixels / pixels) ** 0.5
        smaller = (max(1, int(opened.width * scale)), max(1, int(opened.height * scale)))
        return opened.resize(smaller, Pil.Resampling.LANCZOS)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, or a self-evaluation prompt up to the candidate.

    Attributes:
        ids: its token ids, those of its images included.
        images: its images, in the order of their tokens.
        preparer: prepares the images; None if there are none.
    """

    ids: list[int]
    images: tuple[Image, ...] = ()
    preparer: ImagePreparer | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> EncodedPrompt:
        """Return the prompt with more tokens at its end, none of which belongs to an image."""
        return EncodedPrompt([*self.ids, *ids], self.images, self.preparer)


def pixel_inputs(prompts: Iterable[EncodedPrompt], ids: Tensor) -> dict[str, Any]:
    """Return what a model's `forward` takes besides token ids, with images as pixels.

    Args:
        prompts: what the rows of `ids` begin with, in their order.
        ids: (B, L) token ids.
    """
    with_images = [prompt for prompt in prompts if prompt.images]
    if not with_images:
        return {}
    prepared = _merge_inputs([_preparer_of(prompt).pixels(prompt.images) for prompt in with_images])
    moved = {name: value.to(ids.device) for name, value in prepared.items()}
    return moved | _preparer_of(with_images[0]).token_types(ids)


def vision_features(model: CausalLM, prompts: Iterable[EncodedPrompt], ids: Tensor) -> dict[str, Any]:
    """Return the same with images as vision features, which are cached while the vision modules are frozen.

    Falls back to `pixel_inputs` for models whose `forward` takes no features.

    Args:
        model: a model, bare or under adapters.
        prompts: what the rows of `ids` begin with, in their order.
        ids: (B, L) token ids.
    """
    with_images = [prompt for prompt in prompts if prompt.images]
    body = unwrap_adapters(model).base_model
    if not with_images or not _takes_features(body):
        return pixel_inputs(with_images, ids)
    features = [_cached_features(body, prompt, ids.device) for prompt in with_images]
    extra_inputs = _merge_inputs([part.extra_inputs for part in features])
    moved = {name: value.to(ids.device) for name, value in extra_inputs.items()}
    output = _concatenate_outputs([part.output for part in features])
    return moved | _preparer_of(with_images[0]).token_types(ids) | {"mm_encoder_outputs": {"image": output}}


def vision_modules(model: CausalLM) -> dict[str, nn.Module]:
    """Return the children of a model's body that only images pass through, by name; none for a model of text."""
    return _vision_children(unwrap_adapters(model).base_model)


def _vision_children(body: Any) -> dict[str, nn.Module]:
    if not hasattr(body, "get_image_features"):
        return {}
    decoder = body.get_decoder()
    return {name: module for name, module in body.named_children() if module is not decoder}


class _ImageFeatures(NamedTuple):
    """The vision output for the images of one prompt, and the model's other inputs for them."""

    output: Any
    extra_inputs: dict[str, Tensor]


# The last features of each frozen vision tower.
_feature_caches: WeakKeyDictionary[nn.Module, TensorLRU[_ImageFeatures]] = WeakKeyDictionary()


def _cached_features(body: nn.Module, prompt: EncodedPrompt, device: torch.device) -> _ImageFeatures:
    modules = list(_vision_children(body).values())
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return _compute_features(body, prompt, device)
    key = _preparer_of(prompt), tuple(image.digest for image in prompt.images)
    with torch.no_grad():
        cache = _feature_caches.setdefault(modules[0], TensorLRU(_FEATURE_CACHE_BYTES))
        return cache.get(key, lambda: _compute_features(body, prompt, device))


def _compute_features(body: Any, prompt: EncodedPrompt, device: torch.device) -> _ImageFeatures:
    prepared = _preparer_of(prompt).pixels(prompt.images)
    parameters = inspect.signature(body.get_image_features).parameters
    output = body.get_image_features(
        **{name: value.to(device) for name, value in prepared.items() if name in parameters}, return_dict=True
    )
    # The intermediate states of the tower are several times as large, and nothing reads them.
    features = type(output)(**{name: value for name, value in output.items() if name not in _INTERMEDIATE})
    return _ImageFeatures(features, {name: value for name, value in prepared.items() if name != PIXELS})


def _concatenate_outputs(outputs: Sequence[Any]) -> Any:
    """Return the vision outputs of several prompts as one output for all their images."""
    whole = copy.copy(outputs[0])  # the model's forward may write on what it is given
    whole.pooler_output = _concatenate_images([output.pooler_output for output in outputs])
    if getattr(whole, "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        whole.deepstack_features = [_concatenate_images(layer) for layer in layers]
    return whole


def _concatenate_images(parts: Sequence[Any]) -> Any:
    """Concatenate tensors of all images, or sequences with a tensor per image."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return [image for part in parts for image in part]


def _merge_inputs(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _concatenate_padded([part[name] for part in parts]) for name in parts[0]}


def _concatenate_padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate (N, ...) tensors, with zeros where others are larger, as image processors pad a batch of images."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
    for rows, part in zip(torch.split(whole, list(map(len, parts))), parts):
        rows[(slice(None), *map(slice, part.shape[1:]))] = part
    return whole


def _preparer_of(prompt: EncodedPrompt) -> ImagePreparer:
    if prompt.preparer is None:
        raise ValueError("an encoded prompt with images needs the preparer of its images")
    return prompt.preparer


def _takes_features(body: nn.Module) -> bool:
    return hasattr(body, "get_image_features") and "mm_encoder_outputs" in inspect.signature(body.forward).parameters

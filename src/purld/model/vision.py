"""What a model is shown beside token ids: pictures as its processor prepares them, and what its vision makes of them.

A head carries its pictures unprepared; they become pixels when a forward pass needs them. Where the vision of a model
is frozen, its features of a picture are kept, so that sampler, reference, evaluator and policy look at it once
between them; where it is trained, every pass looks anew.
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
from torch import Tensor

from purld.data.images import open_image
from purld.errors import UserError, reason_of
from purld.model.body_and_head import unwrap_adapters
from purld.model.tensor_lru import TensorLRU
from purld.records import Image

PIXELS = "pixel_values"
_ON_THE_WAY = ("last_hidden_state", "hidden_states", "attentions")
# The pixels of a hundred photographs, and a hundred times what a 7B model makes of one: more than most steps have.
_PIXEL_ROOM, _FEATURE_ROOM = 2 * 2**30, 2**30
_SAMPLE = (64, 64)  # of the picture that a processor is tried on


class ImagePreparer:
    """A processor's way with pictures: what its own call makes of a chat's pictures, apart from the text around them.

    It is tried on a picture first. A processor that turns a picture into something else than tokens in the text and
    tensors beside it would give a model prompts that it does not know.

    Args:
        processor: a processor of transformers, with an image processor and an image token.
        max_pixels: pictures with more are made smaller first; None leaves that to the image processor.

    Raises:
        UserError: the processor is not one of that kind.
    """

    def __init__(self, processor: Any, max_pixels: int | None = None) -> None:
        self._processor = processor
        self._max_pixels = max_pixels
        try:
            self.placeholder: str = processor.image_token
            self._types = self._tried()
            tokens = [token for token in processor.image_token_ids if token is not None]
            self.marks = {self.placeholder, *processor.tokenizer.convert_ids_to_tokens(tokens)}
        except Exception as error:  # whatever an unknown processor may raise
            raise UserError(
                f"{processor.tokenizer.name_or_path}: {type(processor).__name__} does not take pictures the way "
                f"processors of transformers commonly do, so that purld cannot train this model ({reason_of(error)})."
            ) from None
        self._tokens = torch.tensor(tokens)
        self._text = {*processor.tokenizer.model_input_names, self._types}
        self._expansions: dict[tuple[tuple[int, int], ...], list[str]] = {}
        self._prepared = TensorLRU[dict[str, Tensor]](_PIXEL_ROOM)

    def expansions(self, images: tuple[Image, ...]) -> list[str]:
        """The texts that stand for the pictures of a prompt: placeholders as many as the model takes tokens, and more.

        They follow from the pictures' sizes alone, so for many pictures of a size one is opened.
        """
        sizes = tuple(image.size for image in images)
        if sizes not in self._expansions:
            self._expansions[sizes] = self._shown(map(self._open, images))[0]
        return self._expansions[sizes]

    def pixels(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        """The tensors that the model's own `forward` takes for these pictures of a prompt, on the CPU."""
        return self._prepared.get(tuple(image.digest for image in images), lambda: self._prepare(images))

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """1 where a token of `ids` is a picture's, for models that want to be told."""
        if self._types is None:
            return {}
        return {self._types: torch.isin(ids, self._tokens.to(ids.device)).long()}

    def _tried(self) -> str | None:
        """By which name the model is told which tokens are a picture's, if it is."""
        expansions, given = self._shown([Pil.new("RGB", _SAMPLE)])
        expected = self._processor.tokenizer.encode("".join(expansions), add_special_tokens=False)
        if given["input_ids"].tolist() != [expected]:
            raise ValueError("it puts more into the text than what stands for pictures")
        return next((name for name, value in given.items() if name.endswith("token_type_ids") and value.any()), None)

    def _prepare(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        _, given = self._shown(map(self._open, images))
        return {name: value for name, value in given.items() if name not in self._text}

    def _shown(self, pictures: Iterable[Pil.Image]) -> tuple[list[str], Any]:
        """The text that stands for each of a prompt's pictures, and all that the processor gives the model for them."""
        shown = list(pictures)
        given = self._processor(
            text=[self.placeholder * len(shown)],
            images=[shown],
            add_special_tokens=False,
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        (replaced,) = given.pop("text_replacement_offsets")
        return [piece["replacement"] for piece in replaced], given

    def _open(self, image: Image) -> Pil.Image:
        picture = open_image(image)
        pixels = picture.width * picture.height
        if self._max_pixels is None or pixels <= self._max_pixels:
            return picture
        scale = (self._max_pixels / pixels) ** 0.5
        smaller = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        return picture.resize(smaller, Pil.Resampling.LANCZOS)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, or all of a self-evaluation prompt before the candidate.

    `ids` are its tokens, those of its pictures among them; `images` are the pictures, in their order.
    """

    ids: list[int]
    images: tuple[Image, ...] = ()
    preparer: ImagePreparer | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> EncodedPrompt:
        """The head with more tokens, none of them a picture's."""
        return EncodedPrompt([*self.ids, *ids], self.images, self.preparer)


def pixel_inputs(heads: Iterable[EncodedPrompt], ids: Tensor) -> dict[str, Any]:
    """What a forward pass over rows `ids` (B, L) takes beside them, as the model's own `forward` is called.

    Args:
        heads: what the rows begin with, in their order.
        ids: token ids.
    """
    seen = [head for head in heads if head.images]
    if not seen:
        return {}
    prepared = _merged([_preparer([head]).pixels(head.images) for head in seen])
    return {name: value.to(ids.device) for name, value in prepared.items()} | _preparer(seen).types(ids)


def vision_features(model: Any, heads: Iterable[EncodedPrompt], ids: Tensor) -> dict[str, Any]:
    """The same with each head's pictures already looked at, once while the model's vision is frozen.

    Args:
        model: a model, bare or under adapters.
        heads: what the rows begin with, in their order.
        ids: (B, L) token ids.
    """
    seen = [head for head in heads if head.images]
    body = unwrap_adapters(model).base_model
    if not seen or not _takes_features(body):
        return pixel_inputs(seen, ids)
    looks = [_look(body, head, ids.device) for head in seen]
    beside = {name: value.to(ids.device) for name, value in _merged([look.beside for look in looks]).items()}
    features = _joined([look.features for look in looks])
    return beside | _preparer(seen).types(ids) | {"mm_encoder_outputs": {"image": features}}


def vision_modules(model: Any) -> dict[str, Any]:
    """The parts of a model's body that only pictures pass through, by name; none in a model of text."""
    body = unwrap_adapters(model).base_model
    if not hasattr(body, "get_image_features"):
        return {}
    decoder = body.get_decoder()
    return {name: module for name, module in body.named_children() if module is not decoder}


class _Look(NamedTuple):
    """What a model's vision made of the pictures of one head, and what the model's `forward` takes beside that."""

    features: Any
    beside: dict[str, Tensor]


# Of each vision that is frozen, what it made of the pictures it saw last.
_seen: WeakKeyDictionary[Any, TensorLRU[_Look]] = WeakKeyDictionary()


def _look(body: Any, head: EncodedPrompt, device: torch.device) -> _Look:
    modules = list(vision_modules(body).values())
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return _looked(body, head, device)
    key = _preparer([head]), tuple(image.digest for image in head.images)
    with torch.no_grad():
        return _seen.setdefault(modules[0], TensorLRU(_FEATURE_ROOM)).get(key, lambda: _looked(body, head, device))


def _looked(body: Any, head: EncodedPrompt, device: torch.device) -> _Look:
    prepared = _preparer([head]).pixels(head.images)
    taken = inspect.signature(body.get_image_features).parameters
    output = body.get_image_features(
        **{name: value.to(device) for name, value in prepared.items() if name in taken}, return_dict=True
    )
    # The states of the tower on the way there are several times as large, and nobody reads them.
    features = type(output)(**{name: value for name, value in output.items() if name not in _ON_THE_WAY})
    return _Look(features, {name: value for name, value in prepared.items() if name != PIXELS})


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of a model's vision for several heads as one for all their pictures."""
    whole = copy.copy(outputs[0])  # the model's forward may write on what it is given
    whole.pooler_output = _chained([output.pooler_output for output in outputs])
    if getattr(whole, "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        whole.deepstack_features = [_chained(layer) for layer in layers]
    return whole


def _chained(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return [picture for part in parts for picture in part]


def _merged(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (N, ...) as one, with zeros where others are larger, as image processors pad a batch of pictures."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
    for rows, part in zip(whole.split(list(map(len, parts))), parts):
        rows[(..., *map(slice, part.shape[1:]))] = part
    return whole


def _preparer(heads: Sequence[EncodedPrompt]) -> ImagePreparer:
    preparer = heads[0].preparer
    if preparer is None:
        raise ValueError("a head with pictures needs the processor that prepares them")
    return preparer


def _takes_features(body: Any) -> bool:
    return hasattr(body, "get_image_features") and "mm_encoder_outputs" in inspect.signature(body.forward).parameters

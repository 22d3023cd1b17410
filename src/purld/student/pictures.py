"""What a model is shown beside token ids: pictures as its processor prepares them, and what its vision makes of them.

A head carries its pictures unprepared; they become pixels when a forward pass needs them. Where the vision of a model
is frozen, its features of a picture are kept, so that sampler, reference, evaluator and policy look at it once
between them; where it is trained, every pass looks anew.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image as Pil
from torch import Tensor

from purld.images import open_image
from purld.records import Image

PIXELS = "pixel_values"
_TYPES = "mm_token_type_ids"  # says which tokens are a picture's, for models that give those positions of their own
_PREPARED = 32  # heads whose pixels are kept: more than most steps have, at about 20 MB each
_SEEN = 64  # heads whose features are kept


class Preparer:
    """A processor's way with pictures.

    Args:
        processor: a processor of transformers, with an image processor and an image token.
        max_pixels: pictures with more are made smaller first; None leaves that to the image processor.
    """

    def __init__(self, processor: Any, max_pixels: int | None = None) -> None:
        self.placeholder: str = processor.image_token
        self._processor = processor
        self._max_pixels = max_pixels
        self._tokens = [token for token in processor.image_token_ids if token is not None]
        self._typed: bool = processor.return_mm_token_type_ids
        self._expansions: dict[tuple[int, int], str] = {}
        self._prepared: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()

    def expansion(self, image: Image) -> str:
        """The text that stands for a picture in a prompt: its placeholder, as often as the model takes tokens for it.

        It follows from the picture's size alone, so for many pictures of a size one is opened.
        """
        if image.size not in self._expansions:
            processed = self._processor.image_processor(images=[self._open(image)], return_tensors="pt")
            self._expansions[image.size] = self._processor.replace_image_token(processed, 0)
        return self._expansions[image.size]

    def pixels(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        """The tensors that the model's own `forward` takes for these pictures, on the CPU."""
        return _kept(self._prepared, tuple(image.digest for image in images), _PREPARED, lambda: self._prepare(images))

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """1 where a token of `ids` is a picture's, for models that want to be told."""
        if not self._typed:
            return {}
        return {_TYPES: torch.isin(ids, torch.tensor(self._tokens, device=ids.device)).long()}

    def _prepare(self, images: tuple[Image, ...]) -> dict[str, Tensor]:
        prepared = self._processor.image_processor(images=[self._open(i) for i in images], return_tensors="pt")
        unused = set(self._processor.unused_input_names)
        return {name: value for name, value in prepared.items() if name not in unused}

    def _open(self, image: Image) -> Pil.Image:
        picture = open_image(image)
        pixels = picture.width * picture.height
        if self._max_pixels is None or pixels <= self._max_pixels:
            return picture
        scale = (self._max_pixels / pixels) ** 0.5
        smaller = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        return picture.resize(smaller, Pil.Resampling.LANCZOS)


@dataclass(frozen=True)
class Head:
    """A prompt, or all of a self-evaluation prompt before the candidate.

    `ids` are its tokens, those of its pictures among them; `images` are the pictures, in their order.
    """

    ids: list[int]
    images: tuple[Image, ...] = ()
    preparer: Preparer | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> Head:
        """The head with more tokens, none of them a picture's."""
        return Head([*self.ids, *ids], self.images, self.preparer)


def pixels_of(heads: Iterable[Head], ids: Tensor) -> dict[str, Any]:
    """What a forward pass over rows `ids` (B, L) takes beside them, as the model's own `forward` is called.

    Args:
        heads: what the rows begin with, in their order.
        ids: token ids.
    """
    seen = [head for head in heads if head.images]
    if not seen:
        return {}
    return {name: value.to(ids.device) for name, value in _prepared(seen).items()} | _preparer(seen).types(ids)


def features_of(model: Any, heads: Iterable[Head], ids: Tensor) -> dict[str, Any]:
    """The same with each head's pictures already looked at, once while the model's vision is frozen.

    Args:
        model: a model, bare or under adapters.
        heads: what the rows begin with, in their order.
        ids: (B, L) token ids.
    """
    seen = [head for head in heads if head.images]
    body = _body(model)
    if not seen or not _takes_features(body):
        return pixels_of(seen, ids)
    given = {name: value for name, value in pixels_of(seen, ids).items() if name != PIXELS}
    return given | {"mm_encoder_outputs": {"image": _joined([_features(body, head, ids.device) for head in seen])}}


def vision_modules(model: Any) -> dict[str, Any]:
    """The parts of a model's body that only pictures pass through, by name; none in a model of text."""
    body = _body(model)
    if not hasattr(body, "get_image_features"):
        return {}
    decoder = body.get_decoder()
    return {name: module for name, module in body.named_children() if module is not decoder}


# Of each vision that is frozen, what it made of the pictures it saw last.
_seen: WeakKeyDictionary[Any, OrderedDict[tuple[str, ...], Any]] = WeakKeyDictionary()


def _features(body: Any, head: Head, device: torch.device) -> Any:
    modules = list(vision_modules(body).values())
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return _look(body, head, device)
    key = tuple(image.digest for image in head.images)
    with torch.no_grad():
        return _kept(_seen.setdefault(modules[0], OrderedDict()), key, _SEEN, lambda: _look(body, head, device))


def _look(body: Any, head: Head, device: torch.device) -> Any:
    """The output of a model's vision for the pictures of one head."""
    taken = inspect.signature(body.get_image_features).parameters
    given = {name: value.to(device) for name, value in _prepared([head]).items() if name in taken}
    return body.get_image_features(**given, return_dict=True)


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


def _prepared(heads: Sequence[Head]) -> dict[str, Tensor]:
    parts = [_preparer(heads).pixels(head.images) for head in heads]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _preparer(heads: Sequence[Head]) -> Preparer:
    preparer = heads[0].preparer
    if preparer is None:
        raise ValueError("a head with pictures needs the processor that prepares them")
    return preparer


def _takes_features(body: Any) -> bool:
    return hasattr(body, "get_image_features") and "mm_encoder_outputs" in inspect.signature(body.forward).parameters


def _body(model: Any) -> Any:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model


def _kept(store: OrderedDict[Any, Any], key: Any, most: int, make: Callable[[], Any]) -> Any:
    """What `store` holds for `key`, made if it is not there; the least recently used goes first."""
    if key not in store:
        store[key] = make()
        if len(store) > most:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]

"""The one cell that prompts and answer files share, a text or a chat, and where the row's images stand in it.

Images may be told apart in three ways: `<image>` in a text, a part of a message's content that is a place for one,
or a part that names one itself. Whether what is named can be read is `purld.data.images`' business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from purld.data.files import check_text, json_type_name
from purld.records import IMAGE, Message

MARKER = "<image>"  # what users write where an image stands
ROLES = ("system", "user", "assistant")
_OPENING = re.compile(rf"\A(?:{MARKER}\n?)+")  # a line break after a marker that opens a turn is part of it
_NAMED = ("image", "path", "url")

Words = tuple[tuple[str, str], ...]
"""Roles and texts of a chat."""


@dataclass(frozen=True)
class Chat:
    """The turns of a prompt and, for each IMAGE in them in order, the cell of that image.

    The cell is None where the message only has a place for an image of the row's own column.
    """

    messages: tuple[Message, ...]
    images: tuple[object, ...] = ()


def parse_chat(cell: object) -> Chat:
    """The turns in a prompt cell: a text, or a list of {role, content} that ends with the user's turn.

    Raises:
        ValueError: says what is wrong with the cell, as the end of a sentence.
    """
    if isinstance(cell, str):
        return Chat((Message("user", check_text(cell, "it")),))
    if not isinstance(cell, list | tuple):
        raise ValueError(f"it is {json_type_name(cell)}, not a text or a list of messages")
    if not cell:
        raise ValueError("it has no messages")
    images: list[object] = []
    messages = tuple(_parse_message(turn, number, images) for number, turn in enumerate(cell, 1))
    if messages[-1].role != "user":
        raise ValueError(f"its last message is of the {messages[-1].role}, not of the user")
    return Chat(messages, tuple(images))


def images_in_column(cell: object) -> tuple[object, ...]:
    """The images in a row's column for them: none, one, or a list of them."""
    if cell is None or cell == "":
        return ()
    return tuple(cell) if isinstance(cell, list | tuple) else (cell,)


def place_images(chat: Chat, column: tuple[object, ...]) -> Chat:
    """The chat with the images of the row's column in their places.

    These are the places that parts of messages leave open, or else `<image>` in the texts, or else before the text of
    the user's first turn. Where the row has no images, `<image>` is text like any other.

    Raises:
        ValueError: there are more images than places or fewer, as the end of a sentence.
    """
    open_places = sum(image is None for image in chat.images)
    if open_places:
        _agree(open_places, "place(s) for images", len(column))
        rest = iter(column)
        return replace(chat, images=tuple(next(rest) if image is None else image for image in chat.images))
    if not column:
        return chat
    if chat.images:
        raise ValueError(
            f"its messages name {len(chat.images)} image(s), and the row has {len(column)} more without a place"
        )
    markers = sum(message.content.count(MARKER) for message in chat.messages)
    if markers:
        _agree(markers, f"{MARKER} marker(s)", len(column))
        return Chat(tuple(_marked(message) for message in chat.messages), column)
    first = next(number for number, message in enumerate(chat.messages) if message.role == "user")
    messages = list(chat.messages)
    messages[first] = Message("user", IMAGE * len(column) + messages[first].content)
    return Chat(tuple(messages), column)


def readable_text(text: str) -> str:
    """A text with its images' places as users write them."""
    return text.replace(IMAGE, MARKER)


def turns_without_images(messages: tuple[Message, ...]) -> Words:
    """Roles and texts without the places of images: what prompts that differ in their images alone share."""
    return tuple((m.role, " ".join(readable_text(m.content).replace(MARKER, " ").split())) for m in messages)


def _agree(places: int, what: str, images: int) -> None:
    if places != images:
        raise ValueError(f"it has {places} {what}, and the row has {images} image(s)")


def _marked(message: Message) -> Message:
    opening = _OPENING.match(message.content)
    start = opening.end() if opening else 0
    marks = IMAGE * message.content[:start].count(MARKER)
    return Message(_of_user(message.role, MARKER in message.content), marks + _placed(message.content[start:]))


def _placed(text: str) -> str:
    return text.replace(MARKER, IMAGE)


def _of_user(role: str, pictured: bool) -> str:
    """`role`, if a message of it can hold images: models are trained to read those of the user alone."""
    if pictured and role != "user":
        raise ValueError(f"a message of the {role} holds an image; only the user's can")
    return role


def _parse_message(turn: object, number: int, images: list[object]) -> Message:
    """The message in a turn; the cells of its images are added to `images`."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is {json_type_name(turn)}, not a {{role, content}} object")
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {str(role)[:40]!r}; it can be {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise ValueError(f"message {number} is a system message; only the first can be")
    content = turn.get("content")
    if isinstance(content, list | tuple):
        return _of_parts(role, content, number, images)
    return Message(role, check_text(content, f"the content of message {number}"))


def _of_parts(role: str, parts: list[object] | tuple[object, ...], number: int, images: list[object]) -> Message:
    texts = [_parse_part(part, f"part {place} of message {number}", images) for place, part in enumerate(parts, 1)]
    content = "".join(texts)
    if not content.strip():
        raise ValueError(f"message {number} has no content")
    return Message(_of_user(role, IMAGE in content), content)


def _parse_part(part: object, name: str, images: list[object]) -> str:
    """The text of a part, or an IMAGE whose cell is added to `images`. Tables fill a part's missing keys with null."""
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {json_type_name(part)}, not an object with a type")
    match part.get("type"):
        case "text":
            text = part.get("text")
            return "" if text == "" else check_text(text, name)
        case "image":
            images.append(next((part[key] for key in _NAMED if part.get(key) is not None), None))
            return IMAGE
        case "image_url":
            held = part.get("image_url")
            url = held.get("url") if isinstance(held, Mapping) else held
            if not isinstance(url, str) or not url:
                raise ValueError(f"{name} has no image_url.url")
            images.append(url)
            return IMAGE
        case other:
            raise ValueError(f"{name} has the type {str(other)[:40]!r}; it can be text, image or image_url")

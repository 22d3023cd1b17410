"""Parse the prompt cell of a row, a text or a chat, and insert IMAGE marks for the row's images.

An image's position is given in one of three ways: `<image>` in a text, a part of a message's content that leaves room
for an image, or a part that names one. Image files are read in `purld.data.images`, not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from purld.data.files import check_text, json_type_name
from purld.records import IMAGE, Message

MARKER = "<image>"  # as users write it
ROLES = ("system", "user", "assistant")
_LEADING_MARKERS = re.compile(rf"\A(?:{MARKER}\n?)+")  # a line break after a marker that opens a turn belongs to it
_IMAGE_KEYS = ("image", "path", "url")

TurnTexts = tuple[tuple[str, str], ...]
"""The role and text of every turn of a chat."""


@dataclass(frozen=True)
class Chat:
    """The turns of a prompt and, for each IMAGE in them in order, the cell that holds that image.

    The cell is None if the image comes from the row's image column.
    """

    messages: tuple[Message, ...]
    images: tuple[object, ...] = ()


def parse_chat(cell: object) -> Chat:
    """Parse a prompt cell: a text, or a list of {role, content} that ends with the user's turn.

    Raises:
        ValueError: the cell cannot be used; the message is the end of a sentence.
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
        raise ValueError(f"its last message has the role {messages[-1].role}, not user")
    return Chat(messages, tuple(images))


def images_in_column(cell: object) -> tuple[object, ...]:
    """Return the images in a cell of the image column, which holds none, one, or a list of them."""
    if cell is None or cell == "":
        return ()
    return tuple(cell) if isinstance(cell, list | tuple) else (cell,)


def insert_images(chat: Chat, column: tuple[object, ...]) -> Chat:
    """Assign the images of the row's image column to their positions in the chat.

    The positions are the image parts of messages that name no image; else the `<image>` markers in the texts; else the
    start of the user's first turn. If the row has no images, `<image>` is ordinary text.

    Raises:
        ValueError: the number of images differs from the number of positions; the message is the end of a sentence.
    """
    open_parts = sum(image is None for image in chat.images)
    if open_parts:
        _check_image_count(open_parts, "image part(s) without an image", len(column))
        remaining = iter(column)
        return replace(chat, images=tuple(next(remaining) if image is None else image for image in chat.images))
    if not column:
        return chat
    if chat.images:
        raise ValueError(
            f"its messages name {len(chat.images)} image(s), and the row has {len(column)} more without a position"
        )
    markers = sum(message.content.count(MARKER) for message in chat.messages)
    if markers:
        _check_image_count(markers, f"{MARKER} marker(s)", len(column))
        return Chat(tuple(_replace_markers(message) for message in chat.messages), column)
    first_user = next(index for index, message in enumerate(chat.messages) if message.role == "user")
    messages = list(chat.messages)
    messages[first_user] = Message("user", IMAGE * len(column) + messages[first_user].content)
    return Chat(tuple(messages), column)


def readable_text(text: str) -> str:
    """Replace IMAGE marks by `<image>`, as users write them."""
    return text.replace(IMAGE, MARKER)


def turns_without_images(messages: tuple[Message, ...]) -> TurnTexts:
    """Return roles and texts without image markers: equal for prompts that differ only in their images."""
    return tuple((m.role, " ".join(readable_text(m.content).replace(MARKER, " ").split())) for m in messages)


def _check_image_count(positions: int, kind: str, images: int) -> None:
    if positions != images:
        raise ValueError(f"it has {positions} {kind}, and the row has {images} image(s)")


def _replace_markers(message: Message) -> Message:
    leading = _LEADING_MARKERS.match(message.content)
    start = leading.end() if leading else 0
    marks = IMAGE * message.content[:start].count(MARKER)
    _check_image_role(message.role, MARKER in message.content)
    return Message(message.role, marks + message.content[start:].replace(MARKER, IMAGE))


def _check_image_role(role: str, has_images: bool) -> None:
    """Raise ValueError if a message other than the user's holds images: models are trained on images of the user."""
    if has_images and role != "user":
        raise ValueError(f"a message of the {role} holds an image; only the user's can")


def _parse_message(turn: object, number: int, images: list[object]) -> Message:
    """Parse one turn, and append the cells of its images to `images`."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is {json_type_name(turn)}, not a {{role, content}} object")
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {str(role)[:40]!r}; it can be {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise ValueError(f"message {number} is a system message; only the first can be")
    content = turn.get("content")
    if isinstance(content, list | tuple):
        return _join_parts(role, content, number, images)
    return Message(role, check_text(content, f"the content of message {number}"))


def _join_parts(role: str, parts: list[object] | tuple[object, ...], number: int, images: list[object]) -> Message:
    texts = [_parse_part(part, f"part {index} of message {number}", images) for index, part in enumerate(parts, 1)]
    content = "".join(texts)
    if not content.strip():
        raise ValueError(f"message {number} has no content")
    _check_image_role(role, IMAGE in content)
    return Message(role, content)


def _parse_part(part: object, name: str, images: list[object]) -> str:
    """Return the text of a part, or an IMAGE after appending its cell to `images`.

    Tables store the keys that a part lacks as null.
    """
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {json_type_name(part)}, not an object with a type")
    match part.get("type"):
        case "text":
            text = part.get("text")
            return "" if text == "" else check_text(text, name)
        case "image":
            images.append(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None))
            return IMAGE
        case "image_url":
            value = part.get("image_url")
            url = value.get("url") if isinstance(value, Mapping) else value
            if not isinstance(url, str) or not url:
                raise ValueError(f"{name} has no image_url.url")
            images.append(url)
            return IMAGE
        case other:
            raise ValueError(f"{name} has the type {str(other)[:40]!r}; it can be text, image or image_url")

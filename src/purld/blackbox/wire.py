"""What leaves for a prompt, byte for byte, what it can cost at most, and the key it leaves with.

Sends nothing and knows nothing of the ledger's file: `purld check` and a dry run need no more than this.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purld.blackbox.ledger import Request
from purld.config import OpenAIEndpoint
from purld.errors import UserError
from purld.records import Message, Prompt

# Upper bounds for the worst case of a call. No tokenizer in use makes more tokens of a text than it has bytes;
# a chat template adds a few tokens per message and perhaps a short preamble. The images' bound is a generous guess.
TOKENS_PER_CALL = 64
TOKENS_PER_MESSAGE = 16
TOKENS_PER_IMAGE = 4096


def request_of(endpoint: OpenAIEndpoint, prompt: Prompt) -> Request:
    """Exactly what would leave for `prompt`, and to where.

    Raises:
        UserError: an image of the prompt cannot be read.
    """
    messages = list(prompt.messages)
    if endpoint.system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", endpoint.system))
    first_user = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    turns = [_turn(m, prompt.images if n == first_user else ()) for n, m in enumerate(messages)]
    body: dict[str, Any] = {"model": endpoint.model, "messages": turns}
    if endpoint.temperature is not None:
        body["temperature"] = endpoint.temperature
    body[endpoint.token_limit_field] = endpoint.max_tokens_per_answer
    return Request(
        endpoint.base_url,
        endpoint.model,
        json.dumps(body | endpoint.extra_body, separators=(",", ":")),
        prompt.id,
    )


def worst_case(endpoint: OpenAIEndpoint, prompt: Prompt) -> tuple[int, int]:
    """The most input and output tokens that one call for `prompt` can take."""
    texts = [message.content for message in prompt.messages] + [endpoint.system or ""]
    input_tokens = TOKENS_PER_CALL + TOKENS_PER_MESSAGE * len(texts) + TOKENS_PER_IMAGE * len(prompt.images)
    input_tokens += sum(len(text.encode("utf-8", "replace")) for text in texts)
    if endpoint.extra_body:
        input_tokens += len(json.dumps(endpoint.extra_body, ensure_ascii=False).encode("utf-8", "replace"))  # a schema
    return input_tokens, endpoint.max_tokens_per_answer


def price(endpoint: OpenAIEndpoint, input_tokens: int, output_tokens: int) -> float:
    """What so many tokens cost, in the currency of the endpoint's prices."""
    return (input_tokens * endpoint.input_price + output_tokens * endpoint.output_price) / 1e6


def read_key(endpoint: OpenAIEndpoint) -> str | None:
    """The API key, from where the configuration says it is.

    Raises:
        UserError: it is not there or cannot be a key; never shows what was found.
    """
    if endpoint.api_key_env:
        place, key = f"environment variable {endpoint.api_key_env}", os.environ.get(endpoint.api_key_env, "")
    elif endpoint.api_key_file:
        place = f"file {endpoint.api_key_file}"
        try:
            key = Path(endpoint.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"the key {place} cannot be read.") from None
    else:
        return None
    key = key.strip()
    if not key:
        raise UserError(f"the {place} holds no API key for {endpoint.base_url}.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"what the {place} holds cannot be an API key: it has spaces or special characters.")
    return key


def _turn(message: Message, images: Sequence[str]) -> dict[str, Any]:
    if not images:
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(Path(path))}} for path in images
    ]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.content}]}


def _data_url(path: Path) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}).") from None
    return f"data:{mimetypes.guess_type(path.name)[0] or 'image/png'};base64,{data}"

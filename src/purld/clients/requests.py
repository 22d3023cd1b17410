"""Build requests to an endpoint, compute their worst-case tokens and cost, and read the API key.

Sends nothing and opens no ledger, so it is all that `purld check` and a dry run need.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from purld.api_keys import checked_key
from purld.clients.ledger import Request
from purld.config.clients import OpenAIEndpoint
from purld.data.image_encoding import ImageBounds, bounded_size, encode_for_sending
from purld.data.parallel import map_in_order
from purld.errors import UserError
from purld.records import IMAGE, Image, Message, Prompt

# Upper bounds of a call's tokens. No tokenizer in use produces more tokens than a text has bytes; a chat template adds
# a few tokens per message and perhaps a short preamble.
TOKENS_PER_CALL = 64
TOKENS_PER_MESSAGE = 16
# Tokens of an image in models with a fixed number of tiles: InternVL has 13 of 256 tokens each, which is more than
# LLaVA-NeXT's 5 of 576.
FIXED_IMAGE_TOKENS = 13 * 256
# OpenAI's tiles of 512 pixels: tokens for the whole image, and for each tile.
TILE_TOKENS = {"gpt-4o-mini": (2833, 5667)}
USUAL_TILE_TOKENS = (85, 170)


def build_request(endpoint: OpenAIEndpoint, prompt: Prompt) -> Request:
    """Build the request for `prompt`, with its body exactly as sent.

    Raises:
        UserError: an image's file is missing or has changed since it was read.
    """
    messages = list(prompt.messages)
    if endpoint.system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", endpoint.system))
    urls = iter([_data_url(image, endpoint.max_image_side, endpoint.max_image_bytes) for image in prompt.images])
    turns = [{"role": message.role, "content": _content(message.content, urls)} for message in messages]
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


def build_requests(endpoint: OpenAIEndpoint, prompts: Iterable[Prompt]) -> Iterator[Request]:
    """Yield the requests for `prompts` in order; images are encoded on all cores, shortly before they are needed."""
    return map_in_order(functools.partial(build_request, endpoint), prompts)


def worst_case_tokens(endpoint: OpenAIEndpoint, prompt: Prompt) -> tuple[int, int]:
    """Return upper bounds of the input and output tokens of one call for `prompt`."""
    texts = [message.content for message in prompt.messages] + [endpoint.system or ""]
    input_tokens = TOKENS_PER_CALL + TOKENS_PER_MESSAGE * len(texts)
    input_tokens += sum(max_image_tokens(endpoint, image) for image in prompt.images)
    input_tokens += sum(len(text.encode("utf-8", "replace")) for text in texts)
    if endpoint.extra_body:
        input_tokens += len(json.dumps(endpoint.extra_body, ensure_ascii=False).encode("utf-8", "replace"))  # a schema
    return input_tokens, endpoint.max_tokens_per_answer


def max_image_tokens(endpoint: OpenAIEndpoint, image: Image) -> int:
    """Return the maximum number of input tokens of an image over all models with a published formula.

    The formulas count patches of the image as sent: of 32 pixels at 2.46 tokens (OpenAI's newer models), of 28 pixels
    plus one token per row (Claude; Qwen-VL), of 16 pixels plus one per row after scaling to 1024 pixels (Pixtral); or
    tiles of 512 pixels after scaling the shorter side to 768 within 2048 (OpenAI's older models); or a fixed number.
    """
    size = bounded_size(image.size, endpoint.max_image_side)
    base, per_tile = next((counts for name, counts in TILE_TOKENS.items() if name in endpoint.model), USUAL_TILE_TOKENS)
    scale = min(2048 / max(size), 768 / min(size))
    return max(
        FIXED_IMAGE_TOKENS,
        math.ceil(2.46 * _count_patches(size, 32)),
        _count_patches(size, 28) + math.ceil(size[1] / 28),
        _count_patches(bounded_size(size, 1024), 16) + 64,
        base + per_tile * _count_patches((size[0] * scale, size[1] * scale), 512),
    )


def _count_patches(size: tuple[float, float], edge: int) -> int:
    return math.ceil(size[0] / edge) * math.ceil(size[1] / edge)


def token_cost(endpoint: OpenAIEndpoint, input_tokens: int, output_tokens: int) -> float:
    """Return the cost of tokens in the currency of the endpoint's prices."""
    return (input_tokens * endpoint.input_price + output_tokens * endpoint.output_price) / 1e6


def with_batch_prices(endpoint: OpenAIEndpoint) -> OpenAIEndpoint:
    """Return the endpoint with the prices of its batch API."""
    share = 1 - endpoint.batch_discount
    prices = {"input_price": endpoint.input_price * share, "output_price": endpoint.output_price * share}
    return endpoint.model_copy(update=prices)


def read_api_key(endpoint: OpenAIEndpoint) -> str | None:
    """Read the API key from the configured environment variable or file; None if neither is configured.

    Raises:
        UserError: the key is missing or malformed; the message never shows it.
    """
    if endpoint.api_key_env:
        source, key = f"environment variable {endpoint.api_key_env}", os.environ.get(endpoint.api_key_env, "")
    elif endpoint.api_key_file:
        source = f"file {endpoint.api_key_file}"
        try:
            key = Path(endpoint.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"the key {source} cannot be read.") from None
    else:
        return None
    return checked_key(key, source, endpoint.base_url)


def _content(text: str, urls: Iterator[str]) -> str | list[dict[str, Any]]:
    """Return a message's text, or its text and image parts in order if it has images."""
    if IMAGE not in text:
        return text
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": next(urls)}})
        if piece.strip():  # some endpoints refuse a part that is only white space
            parts.append({"type": "text", "text": piece})
    return parts


@functools.lru_cache(maxsize=32)  # an image is sent with every candidate, and with both orders of a pair
def _data_url(image: Image, side: int, size: int) -> str:
    mime_type, data = encode_for_sending(image, ImageBounds(side, size))
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"

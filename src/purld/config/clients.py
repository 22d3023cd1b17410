"""The sections for models that are only talked to: teacher, judge, opponent, and what becomes of their answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from purld.config.base import (
    MAY_BE_SECRET,
    Count,
    FormatName,
    Fraction,
    KeyVariable,
    NonNegative,
    Positive,
    Retries,
    Seconds,
    Section,
    Temperature,
)


def plain_http(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        ValueError: it is no address over HTTP.
        PydanticCustomError: it holds more than host, port and path; the message does not repeat it.
    """
    before_path = url.partition("://")[2].partition("/")[0] or url
    if "@" in before_path or "?" in url or "#" in url:
        raise PydanticCustomError(
            MAY_BE_SECRET, "the address may hold no user, password or query; name a key by api_key_env"
        )
    parts = urlsplit(url)
    is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not is_http or not url.isprintable() or " " in url:
        raise ValueError("an endpoint's address begins with http:// or https:// and names a host")
    return url.rstrip("/")


class FileColumns(Section):
    """The names of the columns in an answer file; a row matches a prompt by `id`, or by `prompt` and its `images`."""

    answer: str = "answer"
    prompt: str = "prompt"
    id: str = "id"
    images: str = "images"


class OpenAIEndpoint(Section):
    """A model behind an OpenAI-compatible chat-completions endpoint, with hard caps on what it may cost."""

    kind: Literal["openai"]
    base_url: str
    model: str
    api_key_env: KeyVariable | None = None  # the environment variable that holds the key
    api_key_file: str | None = None
    system: str | None = None  # the system turn of prompts that have none
    temperature: NonNegative | None = 0.0  # null: not sent, for models that reject it
    max_tokens_per_answer: Count = 1024
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default_factory=dict)  # further request fields, such as reasoning_effort
    # A larger image is scaled down before it is sent; every image is sent without its metadata.
    max_image_side: Annotated[int, Field(ge=32, le=8000)] = 1536  # pixels of the longer side
    max_image_bytes: Annotated[int, Field(ge=10_000, le=50_000_000)] = 3_500_000  # 4.7 MB as a data URL
    # Hard caps over the whole life of the run's ledger, retries included; reserved before a call is sent.
    max_calls: Count | None = None
    max_tokens: Count | None = None
    max_cost: Positive | None = None
    input_price: NonNegative = 0.0  # per million tokens, in the currency of max_cost
    output_price: NonNegative = 0.0
    batch: bool = False  # ask through the endpoint's batch API: cheaper, and answered within a day
    batch_discount: Fraction = 0.5  # the share of the prices that a batch saves
    concurrency: Count = 8
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    timeout: Seconds = 120.0  # seconds for one call, from connecting to its last byte
    retries: Retries = 5  # only of calls that cannot have been billed
    unusable_retries: Annotated[int, Field(ge=0, le=10)] = 1  # of paid replies that are empty or break off

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> OpenAIEndpoint:
        if self.max_cost is not None and self.input_price == self.output_price == 0:
            raise ValueError("max_cost needs input_price and output_price, or nothing ever counts towards it")
        if self.api_key_env and self.api_key_file:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    @field_validator("base_url")
    @classmethod
    def _plain_http(cls, url: str) -> str:
        url = plain_http(url)
        if url.endswith("/chat/completions"):
            raise ValueError(f"purld adds /chat/completions itself; give {url.removesuffix('/chat/completions')}")
        return url

    @field_validator("extra_body")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "stream", "n", "best_of"}
        if taken := sorted(ours & extra.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it cannot be sent as JSON: {error}") from None
        return extra


class AnswerFile(Section):
    """Answers collected elsewhere, in a file of any format that prompts can have; a teacher's default is that file."""

    kind: Literal["file"]
    path: str
    format: FormatName = "auto"
    image_folder: str | None = None  # where images may lie besides the folder of the file
    columns: FileColumns = FileColumns()


class LocalModel(Section):
    """A transformers model on this machine."""

    kind: Literal["local"]
    model: str
    temperature: Temperature = 0.0
    max_tokens_per_answer: Count = 1024
    max_image_pixels: Count | None = None  # a larger image is scaled down; null: as the model's processor does
    batch_size: Count = 8


CAPS = ("max_calls", "max_tokens", "max_cost")
"""The hard limits on what an endpoint may cost, each the key of a section."""

TRANSPORT = frozenset(
    {
        *CAPS,
        "base_url",
        "api_key_env",
        "api_key_file",
        "input_price",
        "output_price",
        "batch",
        "batch_discount",
        "concurrency",
        "timeout",
        "restart_timeout",
        "retries",
        "unusable_retries",
        "requests_per_minute",
        "tokens_per_minute",
    }
)
"""How a server is reached and what it may cost; no answer depends on these keys, so a begun run may change them."""


Teacher = Annotated[OpenAIEndpoint | AnswerFile | LocalModel, Field(discriminator="kind")]


# A file holds the verdicts A, B or T on the pairs that purld writes out for it.
Judge = Annotated[OpenAIEndpoint | AnswerFile | LocalModel, Field(discriminator="kind")]


class AnchorPolicy(Section):
    """Settings for a prompt whose answer is incomplete, or comes with thinking.

    `failed` covers every prompt without an answer: failed, lost after sending, missing from an answer file, or not
    sent because of a cap.
    """

    refused: Literal["drop", "keep", "fail"] = "drop"
    truncated: Literal["drop", "keep", "fail"] = "drop"
    failed: Literal["drop", "fail"] = "drop"
    # Thinking before an answer, as in <think>…</think>: taken out, trained on, or not accepted.
    thinking: Literal["strip", "keep", "fail"] = "strip"


class TeacherAnchors(Section):
    """The teacher as opponent: its answers to the held-out prompts are bought like anchors."""

    kind: Literal["teacher"]


Opponent = Annotated[TeacherAnchors | AnswerFile, Field(discriminator="kind")]

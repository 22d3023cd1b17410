"""The sections of the engines that draw completions from the student."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from purld.config.base import Count, KeyVariable, Seconds, Section
from purld.config.clients import plain_http


class GenerateEngine(Section):
    """Draw completions with transformers' `generate`, in this process."""

    kind: Literal["generate"] = "generate"


class VllmEngine(Section):
    """Draw completions with a vLLM server that the user starts; see docs/engine.md."""

    kind: Literal["vllm"]
    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None  # the server's name of the student's own weights; null: as student.model says
    api_key_env: KeyVariable | None = None  # the environment variable that holds the key, if the server asks for one
    timeout: Seconds = 600.0  # seconds for one request
    restart_timeout: Seconds = 300.0  # how long to wait for a server that is gone
    concurrency: Count = 64  # requests at a time

    @field_validator("base_url")
    @classmethod
    def _without_version(cls, url: str) -> str:
        return plain_http(url).removesuffix("/v1")


def is_loopback(url: str) -> bool:
    """Return whether an address is one of this machine's own, which no network carries."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


Engine = Annotated[GenerateEngine | VllmEngine, Field(discriminator="kind")]
"""What draws completions from the student."""

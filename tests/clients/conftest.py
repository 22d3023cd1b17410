"""A server that misbehaves, endpoints that point at it, and a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving import SECRET, Server, serving

from purld.clients import rate_limit as pace
from purld.clients.ledger import Ledger
from purld.config.schema import OpenAIEndpoint


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIEndpoint]:
    """Makes endpoints at the server; waits between repeats are a hundred times shorter than in life."""
    monkeypatch.setattr(pace, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("TEST_KEY", SECRET)

    def make(**settings: Any) -> OpenAIEndpoint:
        defaults = {"base_url": server.url, "model": "m", "api_key_env": "TEST_KEY", "timeout": 3.0, "retries": 3}
        return OpenAIEndpoint(kind="openai", **(defaults | settings))

    return make


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger

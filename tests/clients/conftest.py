"""Fixtures: a faulty server, endpoints configured for it, and a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import SECRET, Server, running_server

from purld.clients import rate_limit
from purld.clients.ledger import Ledger
from purld.config.clients import OpenAIEndpoint


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIEndpoint]:
    """Return a factory of endpoints at the server, with waits between retries a hundred times shorter."""
    monkeypatch.setattr(rate_limit, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("TEST_KEY", SECRET)

    def make(**settings: Any) -> OpenAIEndpoint:
        defaults = {"base_url": server.url, "model": "m", "api_key_env": "TEST_KEY", "timeout": 3.0, "retries": 3}
        return OpenAIEndpoint(kind="openai", **(defaults | settings))

    return make


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger

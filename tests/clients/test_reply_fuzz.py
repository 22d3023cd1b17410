"""Replies of any shape: never a traceback, never a paid answer lost, always a state that the ledger can store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faulty_server import SECRET, completion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from purld.clients import endpoint as endpoint_module
from purld.clients.anchors import collect_anchors
from purld.clients.base import reply_from_result
from purld.clients.endpoint import EndpointClient
from purld.clients.faults import CallOutcome, classify_response, decode_body
from purld.clients.ledger import Caps, Ledger, Request
from purld.clients.redaction import KeyRedactor
from purld.config.clients import OpenAIEndpoint
from purld.errors import UserError
from purld.records import Prompt

ENDPOINT = OpenAIEndpoint(kind="openai", base_url="http://127.0.0.1/v1", model="m")
REDACTOR = KeyRedactor(SECRET)
NAMES = (
    "choices", "message", "content", "text", "type", "refusal", "finish_reason", "usage", "prompt_tokens",
    "completion_tokens", "error", "code", "detail", "delta", "tool_calls", "reasoning_content", "thinking",
    "status", "errors", "metadata", "raw", "value", "parts", "id", "index",
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(), max_size=12)
    | st.sampled_from(["stop", "length", "text", "thinking", "refusal", "429", "context_length_exceeded", SECRET, ""])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=15,
)
# Forms in which servers send a text; each must be found among any other fields.
FORMS = (
    lambda text: text,
    lambda text: [text],
    lambda text: [{"type": "text", "text": text}],
    lambda text: [{"type": "thinking", "thinking": "I add."}, {"type": "text", "text": text}],
    lambda text: {"type": "text", "text": text},
    lambda text: [{"type": "output_text", "text": text, "annotations": []}],
    lambda text: [{"text": {"value": text}}],
)
STATUSES = st.sampled_from([200, 200, 200, 201, 204, 302, 400, 401, 404, 413, 422, 429, 451, 500, 503, 504, 529, 599])


def classify(status: int, body: str) -> CallOutcome:
    outcome = classify_response(status, {"retry-after": body[:20]}, body, ENDPOINT, 0.0, REDACTOR)
    check(outcome)
    return outcome


def check(outcome: CallOutcome) -> None:
    """Check what holds for every reply: it is final, can be stored and shown, and has no key in it."""
    result, reply = outcome.result, reply_from_result(outcome.result)
    assert result.state in ("answered", "failed", "unknown")
    assert reply.state == "answered" or (reply.detail.isprintable() and len(reply.detail) < 500)
    for field in (result.text, result.finish_reason, result.error, result.raw, outcome.stop, reply.detail):
        assert field is None or SECRET not in field.encode().decode()
    assert result.error is None or result.error.isprintable()
    assert result.state != "answered" or result.text or result.raw or reply.state in ("truncated", "refused")
    assert result.state == "answered" or outcome.repeat or not result.billable or result.raw is not None


@given(STATUSES, VALUES)
@settings(max_examples=50, deadline=None)
def test_any_json_ends_in_a_state(status, payload):
    classify(status, json.dumps(payload))


@given(STATUSES, st.binary(max_size=200), st.sampled_from(["", "charset=utf-16", "charset=gbk", "charset=x", "é"]))
@settings(max_examples=30, deadline=None)
def test_any_bytes_end_in_a_state(status, content, content_type):
    classify(status, decode_body(content, content_type))


@given(
    st.text(min_size=1, max_size=30).filter(str.strip),
    st.sampled_from(FORMS),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "ascii"]),
)
@settings(max_examples=30, deadline=None)
def test_no_text_is_lost_among_any_other_fields(text, form, in_message, in_choice, in_body, encoding):
    message = in_message | {"content": form(text)}
    payload = in_body | {"choices": [in_choice | {"message": message}]}
    content = json.dumps(payload, ensure_ascii=encoding == "ascii").encode(encoding, "surrogatepass")
    result = classify(200, decode_body(content, "application/json")).result
    assert result.state == "answered"
    assert result.text == REDACTOR.redact_answer(text.encode("utf-8", "replace").decode())


@given(st.lists(st.tuples(STATUSES, VALUES), min_size=1, max_size=6))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ledger_stores_every_result(tmp_path, replies):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for number, (status, payload) in enumerate(replies):
            request = Request("http://127.0.0.1/v1", "m", json.dumps([number, status, repr(payload)]), "p")
            result = classify(status, json.dumps(payload)).result
            ledger.settle(ledger.reserve(request, "teacher", 1, 0.0, Caps()), result)
            found = ledger.find_result(request.key)
            assert found is not None and reply_from_result(found) == reply_from_result(result)
        ledger.export(tmp_path / "export.jsonl")


@pytest.mark.slow
@given(st.lists(st.tuples(STATUSES, VALUES | st.binary(max_size=300)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_replies_over_http_end_in_a_state_and_nothing_paid_is_bought_again(
    server, endpoint, tmp_path_factory, monkeypatch, replies, concurrency
):
    """Every prompt gets an arbitrary reply, then the same again; a second run asks only for what failed."""
    monkeypatch.setattr(endpoint_module, "MAX_CONSECUTIVE_FAILURES", 10**9)
    asked = [Prompt.from_text(f"question {n}") for n in range(len(replies))]
    server.script = {}
    for prompt, (status, payload) in zip(asked, replies, strict=True):
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        server.script[prompt.question] = [lambda h, c=content, s=status: h.reply(c, s)] * 99
    config = endpoint(retries=1, concurrency=concurrency, timeout=20)
    path = Path(tmp_path_factory.mktemp("fuzz")) / "ledger.sqlite"
    paid = set[str]()
    for _ in range(2):
        server.arrived.clear()
        with Ledger(path) as ledger:
            try:
                collect_anchors(asked, EndpointClient(config, ledger, "teacher"))
            except UserError as error:
                assert SECRET not in str(error)
            assert not paid & set(server.arrived), "what was answered or lost was asked again"
            rows: list[dict[str, Any]] = list(ledger.iter_requests())
        assert all(row["state"] in ("answered", "failed", "unknown") for row in rows)
        paid |= {row["request"]["messages"][-1]["content"] for row in rows if row["state"] != "failed"}


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=False)
@given(STATUSES, VALUES, VALUES, VALUES)
def test_many_more_replies(status, content, finish, usage):
    payload: dict[str, Any] = completion(content)
    payload["choices"][0]["finish_reason"] = finish
    classify(status, json.dumps(payload | {"usage": usage}))

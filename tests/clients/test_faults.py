"""What servers say in the bodies of errors, in the words of the providers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from purld.clients.faults import classify_response, decode_body
from purld.clients.redaction import KeyRedactor
from purld.config.clients import OpenAIEndpoint


def endpoint(**settings: Any) -> OpenAIEndpoint:
    return OpenAIEndpoint(**{"kind": "openai", "base_url": "http://127.0.0.1/v1", "model": "m"} | settings)


def classify(status: int, payload: Any, **settings: Any):
    body = payload if isinstance(payload, str) else json.dumps(payload)
    return classify_response(status, {}, body, endpoint(**settings), 0.0)


def openai_error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None} | fields}


CONTEXT = {
    "OpenAI": (400, openai_error("too long", code="context_length_exceeded")),
    "OpenAI, responses": (400, openai_error("Your input exceeds the context window of this model.")),
    "Azure": (400, openai_error("Input tokens exceed the configured limit of 272000 tokens.")),
    "llama.cpp": (
        400,
        openai_error(
            "request (4390 tokens) exceeds the available context size (4096 tokens)", type="exceed_context_size_error"
        ),
    ),
    "vLLM, flat": (
        400,
        {"object": "error", "message": "This model's maximum context length is 4096 tokens.", "code": 400},
    ),
    "vLLM, prompt": (
        400,
        openai_error("The decoder prompt (length 5001) is longer than the maximum model length of 4096."),
    ),
    "vLLM, limit": (
        400,
        openai_error(
            "'max_tokens' or 'max_completion_tokens' is too large: 900. This model's maximum context length is 1024 "
            "tokens and your request has 200 input tokens."
        ),
    ),
    "TGI": (
        422,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` "
            "tokens and 20 `max_new_tokens`",
            "error_type": "validation",
        },
    ),
    "TGI, inputs": (422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 5000"}),
    "Gemini": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "The input token count (1200000) exceeds the maximum number of tokens allowed (104857).",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
    ),
    "DashScope": (
        400,
        openai_error("<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 30720]"),
    ),
    "FastAPI": (400, {"detail": "Prompt is too long: 5000 tokens > 4096 maximum"}),
    "FastAPI, list": (422, {"detail": [{"loc": ["body"], "msg": "Input is too long for requested model."}]}),
    "Anthropic": (400, {"type": "error", "error": {"message": "prompt is too long: 208310 tokens > 200000 maximum"}}),
    "Mistral": (
        400,
        {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"},
    ),
    "xAI": (400, {"error": "This model's maximum prompt length is 131072 but the request contains 150000 tokens."}),
    "Moonshot": (400, openai_error("Invalid request: Your request exceeded model token limit: 8192")),
    "OpenRouter": (
        400,
        openai_error(
            "Provider returned error",
            metadata={"raw": '{"message": "maximum context length is 8192 tokens"}', "provider_name": "x"},
        ),
    ),
    "plain text": (413, "prompt is too long"),
    "as a name": (400, {"error": {"type": "prompt_too_long"}}),
    "sum": (400, {"error": {"message": "input tokens (5000) + max_tokens (100) must be <= 4096"}}),
    "characters": (400, openai_error("string too long", code="string_above_max_length")),
    "status 200": (200, openai_error("This endpoint's maximum context length is 8192 tokens.", code=400)),
    "SGLang": (400, openai_error("The input (5000 tokens) is longer than the model's context length (4096 tokens).")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTEXT)
def test_a_prompt_longer_than_the_context_fails_alone(name):
    outcome = classify(*CONTEXT[name])
    assert (outcome.result.error, outcome.result.billable) == ("context_too_long", False)
    assert not (outcome.suspect or outcome.stop or outcome.repeat)


FILTERED = {
    "OpenAI": (400, openai_error("m", code="content_filter")),
    "Azure": (
        400,
        openai_error(
            "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
            innererror={"code": "ResponsibleAIPolicyViolation"},
        ),
    ),
    "DashScope": (
        400,
        openai_error("Input data may contain inappropriate content.", code="data_inspection_failed"),
    ),
    "DashScope, native": (400, {"code": "DataInspectionFailed", "message": "m", "request_id": "x"}),
    "DeepSeek": (400, openai_error("Content Exists Risk")),
    "Moonshot": (400, openai_error("The request was rejected because it was considered high risk")),
    "OpenRouter": (403, openai_error("Your input was flagged for harassment", code=403)),
    "OpenAI, reasoning": (400, openai_error("Your prompt was flagged as potentially violating our usage policy.")),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERED)
def test_a_prompt_that_a_filter_refuses_fails_alone(name):
    outcome = classify(*FILTERED[name])
    assert outcome.result.error == "content_filter"
    assert not (outcome.suspect or outcome.stop or outcome.repeat)


def test_words_of_the_prompt_in_an_error_classify_nothing():
    echoed = {"detail": [{"msg": "field required", "input": "What is a context length? content_filter"}]}
    outcome = classify(422, echoed)
    assert (outcome.result.error, outcome.suspect) == ("http_422: field required", True)


@pytest.mark.parametrize(
    ("message", "settings", "remedy"),
    [
        (
            "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead.",
            {},
            "set token_limit_field to max_completion_tokens",
        ),
        (
            "Unrecognized request argument supplied: max_completion_tokens",
            {"token_limit_field": "max_completion_tokens"},
            "set token_limit_field to max_tokens",
        ),
        (
            "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported.",
            {},
            "set temperature to null, or to a value that this model accepts",
        ),
        (
            "max_tokens is too large: 9999. This model supports at most 4096 completion tokens.",
            {},
            "lower max_tokens_per_answer",
        ),
        (
            "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the "
            "`context_window` for this model",
            {},
            "lower max_tokens_per_answer",
        ),
        ("Range of max_tokens should be [1, 8192]", {}, "lower max_tokens_per_answer"),
    ],
)  # fmt: skip
def test_a_setting_that_the_model_rejects_stops_the_run_and_names_the_key(message, settings, remedy):
    outcome = classify(400, openai_error(message), **settings)
    assert outcome.stop == f"http://127.0.0.1/v1: {message.rstrip('.')[:200]} (HTTP 400); {remedy}."


@pytest.mark.parametrize("status", [404, 405])
def test_an_address_without_a_version_says_what_to_try(status):
    bare = classify(status, "404 page not found", base_url="http://127.0.0.1:11434")
    assert bare.stop is not None and bare.stop.endswith(
        "404 page not found); base_url usually ends in /v1: try http://127.0.0.1:11434/v1."
    )
    versioned = classify(status, openai_error("no such model"))
    assert versioned.stop is not None and "usually ends" not in versioned.stop


def test_a_page_with_status_200_at_an_address_without_a_version():
    page = classify(200, "<html>Welcome</html>", base_url="http://127.0.0.1")
    assert page.stop_if_first == (
        "http://127.0.0.1: the response is not a chat completion; base_url usually ends in /v1: try http://127.0.0.1/v1."
    )
    assert classify(200, "<html>Welcome</html>").stop_if_first is None


@pytest.mark.parametrize(
    ("payload", "error", "repeat"),
    [
        (
            openai_error("Rate limit exceeded: per minute.", code=429),
            "http_429: Rate limit exceeded: per minute.",
            True,
        ),
        (openai_error("m", code=None, type="server_error"), "http_500: m", True),
        ({"base_resp": {"status_code": 1004, "status_msg": "not authorized"}}, "http_200: not authorized", False),
        ({"error": "Unexpected endpoint or method."}, "http_200: Unexpected endpoint or method.", False),
    ],
)
def test_an_error_with_status_200_shows_its_message_and_counts_by_its_code(payload, error, repeat):
    outcome = classify(200, payload)
    assert (outcome.result.state, outcome.result.error, outcome.repeat) == ("failed", error, repeat)


@pytest.mark.parametrize(
    ("code", "words"), [(401, "without a key"), (402, "asks for payment"), ("insufficient_quota", "quota is used up")]
)
def test_an_error_with_status_200_can_stop_the_run(code, words):
    stop = classify(200, openai_error("m", code=code)).stop
    assert stop is not None and words in stop


def test_what_a_server_says_is_one_printable_line_without_the_key():
    key = "sk-0123456789abcdefghij"
    body = json.dumps(openai_error(f"a\x1b]0;title\x07\x1b[2J\nb\u202ec {key} \x9b1m\x00" + "x" * 500))
    outcome = classify_response(400, {}, body, endpoint(), 0.0, KeyRedactor(key))
    assert outcome.result.error is not None
    assert outcome.result.error.startswith("http_400: a bc [key] 1mxxx") and len(outcome.result.error) < 220
    assert outcome.result.raw is not None and key not in outcome.result.raw


@pytest.mark.parametrize(
    ("content", "content_type", "text"),
    [
        ("é".encode(), "", "é"),
        (b"\xef\xbb\xbf{}", "", "{}"),
        ('{"é": 1}'.encode("utf-16"), "", '{"é": 1}'),
        ("é".encode("latin-1"), "text/plain; charset=ISO-8859-1", "é"),
        (b"\xff{", "text/plain; charset=rot13", "\ufffd{"),
        (b"", "", ""),
    ],
)
def test_bodies_are_decoded_by_their_encoding(content, content_type, text):
    assert decode_body(content, content_type) == text

"""Read what an endpoint says in the body of an error, in the formats of the providers and servers in use.

OpenAI's `{"error": {"message", "code"}}`, flat bodies (vLLM), `detail` (FastAPI), lists (Gemini), messages within
messages (OpenRouter, Azure), statuses in the body (MiniMax), and plain text. Only the fields below are read: others may
repeat the prompt, whose words say nothing about the fault. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from purld.errors import one_line

MESSAGE_FIELDS = (
    "message", "msg", "error_msg", "error_message", "errmsg", "status_msg", "error_description", "detail", "error",
    "title", "description", "reason", "raw",
)  # fmt: skip
CODE_FIELDS = ("code", "type", "status", "error_code", "errcode", "status_code", "error_type", "errortype", "reason")
NESTED_FIELDS = (*MESSAGE_FIELDS, "errors", "details", "innererror", "inner_error", "metadata", "base_resp", "response")
MAX_DEPTH, MAX_FIELDS, MAX_WORDS = 6, 40, 4_000
# What an error with status 200 in the header may be called instead of by its status.
NAMED_STATUS = {
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "resource_exhausted": 429, "insufficient_quota": 429,
    "overloaded_error": 529, "unavailable": 503, "server_error": 500, "internal_server_error": 500, "api_error": 500,
    "invalid_api_key": 401, "authentication_error": 401, "unauthenticated": 401,
    "model_not_found": 404, "not_found_error": 404,
    "invalid_request_error": 400, "invalid_argument": 400, "bad_request": 400,
}  # fmt: skip

# How servers say that a prompt is longer than the model's context.
CONTEXT = re.compile(
    "|".join(
        (
            r"context.{0,20}(length|window|size|limit)",
            r"(maximum|max|model).{0,10}(context|sequence|prompt|input) ?length",
            r"max_model_len|max_seq_len|maximum model length|model.{0,20}token limit",
            r"maximum number of tokens allowed|input tokens exceed|token length exceed",
            r"(prompt|input|message)s?([ _](is|are))?[ _]too[ _](long|large)|too many (input |prompt )?tokens",
            r"string_above_max|string too long|token capacity",
            r"(prompt|input)[ _](token|length|tokens).{0,60}(exceed|longer|too (long|large))",
            r"(prompt|input|sequence).{0,80}longer than (the|its).{0,40}(length|limit)",
            r"prompt.{0,40}exceeds.{0,20}(length|max)|input length should be|range of input length",
            r"input is too long|tokens?.{0,20}`? \+ `?max_(new_)?tokens|must have less than \d+ tokens",
            r"reduce (the length of )?(the|your) (prompt|input|messages)",
            r"超长|超出最大长度",
        )
    )
)
# How they say that their filter refused a prompt.
FILTER = re.compile(
    "|".join(
        (
            r"content[ _-]?(filter|policy|moderation)|content management policy|data_?inspection_?failed",
            r"responsible_?ai_?policy|inappropriate content|usage (policy|policies|guidelines)",
            r"content exists risk|considered high risk|sensitive_?(content|words)|input.{0,10}sensitive",
            r"new_sensitive|flagged (for|as|by)|moderation|prohibited_content|guardrail",
            r"敏感|不安全",
        )
    )
)


@dataclass(frozen=True)
class EndpointError:
    """What an error body says.

    Attributes:
        message: its messages as one printable line, empty if there are none.
        codes: its codes and types, in lower case.
        words: codes and messages in lower case, to search in.
    """

    message: str
    codes: tuple[str, ...] = ()
    words: str = ""

    @property
    def status(self) -> int | None:
        """Return the HTTP status that the body names, by number or by name."""
        for code in self.codes:
            if re.fullmatch(r"[45]\d\d", code):
                return int(code)
        return next((NAMED_STATUS[code] for code in self.codes if code in NAMED_STATUS), None)

    @property
    def context_too_long(self) -> bool:
        """Return whether the prompt does not fit the model's context."""
        return bool(CONTEXT.search(self.words))

    @property
    def filtered(self) -> bool:
        """Return whether a content filter refused the prompt."""
        return bool(FILTER.search(self.words))


def read_error(data: object, body: str) -> EndpointError:
    """Return what a body says, given as parsed (None if it is no JSON) and as text."""
    if data is None:
        shown = "" if body.lstrip()[:1] in ("<", "{", "[") else one_line(body)
        return EndpointError(shown, (), shown.lower())
    found = list(_walk(data, 0))[:MAX_FIELDS]
    messages = list(dict.fromkeys(text for is_code, text in found if not is_code and text))
    codes = tuple(dict.fromkeys(text.lower() for is_code, text in found if is_code))
    words = " ".join([*codes, *messages])[:MAX_WORDS]
    return EndpointError(one_line(": ".join(messages)), codes, words.lower())


def _walk(value: object, depth: int) -> Iterator[tuple[bool, str]]:
    """Yield (is it a code, text) for every field that is read, messages of the same object first."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, str):
        yield False, one_line(value, MAX_WORDS)
    elif isinstance(value, list):
        for item in value[:5]:
            yield from _walk(item, depth + 1)
    elif isinstance(value, dict):
        fields = {str(name).lower(): item for name, item in list(value.items())[:MAX_FIELDS]}
        for name in CODE_FIELDS:
            if isinstance(code := fields.get(name), str | int):
                yield True, one_line(str(code), 80)
        for name in NESTED_FIELDS:
            item = fields.get(name)
            if isinstance(item, dict | list) or (isinstance(item, str) and name in MESSAGE_FIELDS):
                yield from _walk(item, depth + 1)

"""A key is found in every form in which a server may quote it, and nothing else is touched."""

from __future__ import annotations

import base64
import json
import time
from urllib.parse import quote

import pytest
from faulty_server import SECRET
from hypothesis import given, settings
from hypothesis import strategies as st

from purld.clients.ledger import CallResult
from purld.clients.redaction import KeyRedactor

LONG = "sk-proj-" + "".join(chr(48 + (i * 7) % 10) + chr(97 + (i * 11) % 26) for i in range(70))
KEYS = (SECRET, LONG, "0123456789abcdef0123456789abcdef")


def encodings(key: str) -> dict[str, str]:
    data = key.encode()
    encoded = base64.b64encode(data).decode()
    half = len(key) // 2
    return {
        "plain": key,
        "JSON": key.replace("/", "\\/"),
        "JSON within JSON": json.dumps(json.dumps(key.replace("/", "\\/"))),
        "unicode escapes": "".join(f"\\u{ord(letter):04X}" for letter in key),
        "escaped unicode escapes": "".join(f"\\\\\\\\u{ord(letter):04x}" for letter in key),
        "URL": quote(key, safe=""),
        "URL twice": quote(quote(key, safe=""), safe=""),
        "URL, all letters": "".join(f"%{byte:02x}" for byte in data),
        "HTML": "".join(f"&#{byte};" for byte in data),
        "HTML hex": "".join(f"&#x{byte:X};" for byte in data),
        "base64": encoded,
        "base64 for URLs": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "base64 in lines": "\n".join(encoded[i : i + 16] for i in range(0, len(encoded), 16)),
        "basic": base64.b64encode(b"user:" + data).decode(),
        "basic, no user": base64.b64encode(b":" + data).decode(),
        "bearer in base64": base64.b64encode(b"Bearer " + data + b"; x").decode(),
        "hex": data.hex(),
        "HEX": data.hex().upper(),
        "hex with colons": data.hex(":"),
        "hex escapes": "".join(f"\\x{byte:02x}" for byte in data),
        "hex numbers": ", ".join(f"0x{byte:02x}" for byte in data),
        "bytes": str(list(data)),
        "a list": json.dumps(list(key)),
        "lines": "\n".join(key[i : i + 7] for i in range(0, len(key), 7)),
        "lines in JSON": "\\n".join(key[i : i + 7] for i in range(0, len(key), 7)),
        "halves": json.dumps({"first": key[:half], "second": key[half:]}),
        "backwards": key[::-1],
    }


def letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())


@pytest.mark.parametrize("name", encodings(SECRET))
@pytest.mark.parametrize("key", KEYS, ids=["odd", "long", "hex"])
def test_the_key_is_removed_in_every_form(name, key):
    quoted = encodings(key)[name]
    redactor = KeyRedactor(key)
    for clean in (redactor.redact, redactor.redact_answer):
        shown = clean(f"Before it, {quoted} and after it.")
        assert "[key]" in shown and shown.startswith("Before it, ") and shown.endswith(" and after it.")
        rest = letters(shown[len("Before it, ") : -len(" and after it.")].replace("[key]", "|"))
        assert len(rest) <= 22, "at most the ends of base64, which share a character with their neighbours, and names"


@pytest.mark.parametrize("key", KEYS, ids=["odd", "long", "hex"])
def test_a_long_piece_is_removed(key):
    redactor = KeyRedactor(key)
    piece = key[-14:]
    assert redactor.redact(f"ends in {piece}.") == "ends in [key]."
    assert redactor.redact(f"starts with {key[:20]}...") == "starts with [key]..."


def test_words_and_public_prefixes_stay():
    redactor = KeyRedactor("my-internal-gateway-key-20261126")
    for text in ("Use the internal gateway.", "my key, on 2026-11-26", "internal"):
        assert redactor.redact_answer(text) == text
    text = "Keys of Anthropic begin with sk-ant-api03-, those of OpenAI with sk-proj-."
    for key in ("sk-ant-api03-Ab3dEf6hIj9lMn2pQr5tUv8x", LONG):
        assert KeyRedactor(key).redact_answer(text) == text


def test_a_short_key_is_only_removed_from_what_is_no_answer():
    redactor = KeyRedactor("EMPTY")
    assert redactor.redact_answer("EMPTY") == "EMPTY"
    assert redactor.redact("key EMPTY is wrong") == "key [key] is wrong"
    assert KeyRedactor(None).redact("EMPTY") == "EMPTY"


def test_everything_of_a_result_that_came_from_the_server_is_redacted():
    fields = dict.fromkeys(("text", "finish_reason", "raw"), SECRET)
    result = KeyRedactor(SECRET).redact_result(CallResult("failed", error=f"http_400: {SECRET}", **fields))
    assert SECRET not in repr(result)
    assert (result.error, result.text) == ("http_400: [key]", "[key]")
    assert KeyRedactor("empty").redact_result(CallResult("failed", error="empty_answer")).error == "empty_answer"


@pytest.mark.parametrize(
    "unit", ["\\", "%", "%25", "&#1", "\\u00", SECRET[:9], SECRET + " ", "a", "\\\\u0073", "73 "], ids=repr
)
def test_the_time_is_linear(unit):
    """A quadratic search takes minutes on a megabyte of these, a linear one about a second."""
    text = unit * (400_000 // len(unit))
    started = time.process_time()
    KeyRedactor(SECRET).redact(text)
    assert time.process_time() - started < 8


@given(st.text(max_size=200), st.text(max_size=200), st.sampled_from(KEYS), st.sampled_from(sorted(encodings(SECRET))))
@settings(max_examples=25, deadline=None)
def test_any_text_around_a_key_is_survived(before, after, key, name):
    redactor = KeyRedactor(key)
    shown = redactor.redact(f"{before} {encodings(key)[name]} {after}")
    assert "[key]" in shown
    assert (
        key not in shown and quote(key, safe="") not in shown and base64.b64encode(key.encode()).decode() not in shown
    )

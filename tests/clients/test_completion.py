"""Answers in every shape, and what their finish reasons mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from faulty_server import completion

from purld.clients.base import Reply, reply_from_result
from purld.clients.batch_format import read_line
from purld.clients.completion import parse_body, parse_json, read_completion
from purld.clients.faults import NO_KEY, classify_response
from purld.clients.ledger import CallResult
from purld.config.clients import OpenAIEndpoint

ENDPOINT = OpenAIEndpoint(kind="openai", base_url="http://127.0.0.1/v1", model="m", max_tokens_per_answer=100)


def read(payload: Any) -> CallResult | None:
    body = json.dumps(payload)
    return read_completion(parse_json(body), body, ENDPOINT)


def reply(*args: Any, **message: Any) -> Reply:
    result = read(completion(*args, **message))
    assert result is not None
    return reply_from_result(result)


@pytest.mark.parametrize(
    ("finish", "state"),
    [
        *((name, "answered") for name in ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE")),
        *((name, "answered") for name in ("FinishReason.STOP", "FINISH_REASON_STOP", "Stop", "normal")),
        *((name, "truncated") for name in ("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "model_length")),
        *((name, "truncated") for name in ("model_context_window_exceeded", "error", "abort", "network_error")),
        *((name, "truncated") for name in ("tool_calls", "insufficient_system_resource", "OTHER", "", None, 7, {})),
        *((name, "refused") for name in ("content_filter", "sensitive", "SAFETY", "RECITATION", "refusal")),
        *((name, "refused") for name in ("PROHIBITED_CONTENT", "guardrail_intervened")),
    ],
)
def test_only_a_good_finish_reason_makes_an_answer_whole(finish, state):
    found = reply("Half an answer", finish)
    assert (found.state, found.text) == (state, "Half an answer")
    name = (finish or "empty") if isinstance(finish, str) else "dict" if finish == {} else json.dumps(finish)
    assert state == "answered" or f"finish reason {name}" in found.detail


def test_a_server_that_names_no_finish_reason_is_judged_by_its_token_count():
    for spent, state in ((99, "answered"), (100, "truncated")):
        payload = completion("Text")
        del payload["choices"][0]["finish_reason"]
        payload["usage"]["completion_tokens"] = spent
        result = read(payload)
        assert result is not None and reply_from_result(result).state == state


@pytest.mark.parametrize(
    ("counted", "total", "state"), [(3, 400, "answered"), (99, 400, "answered"), (100, 110, "cut")]
)
@pytest.mark.parametrize("prompt", [0, 10])
def test_thinking_that_only_the_total_counts_cuts_no_answer(counted, total, state, prompt):
    """A server that names no finish reason may leave thinking out of both its limit and its count."""
    usage = {"prompt_tokens": prompt, "completion_tokens": counted, "total_tokens": total}
    result = read({"choices": [{"message": {"content": "Four."}}], "usage": usage})
    assert result is not None and result.finish_reason == ("length" if state == "cut" else None)
    assert (result.usage and result.usage.output_tokens) == (total - 10 if prompt else None)


TEXTS = {
    "text": "A",
    "parts": [{"type": "thinking", "thinking": "I add."}, {"type": "text", "text": "A"}],
    "parts in two": [{"type": "text", "text": ""}, {"type": "text", "text": "A"}],
    "thinking in parts": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "I add."}]},
        {"type": "text", "text": "A"},
    ],
    "output_text": [{"type": "output_text", "text": "A", "annotations": []}],
    "a value": [{"type": "text", "text": {"value": "A", "annotations": []}}],
    "strings": ["A"],
    "one part": {"type": "text", "text": "A"},
    "no type": [{"text": "A"}],
    "a thought of Gemini": [{"text": "I add.", "thought": True}, {"text": "A"}],
    "a content with parts": {"role": "model", "parts": [{"text": "A"}]},
    "an image as well": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "A"}],
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_found_in_parts(name):
    assert reply(TEXTS[name]) == Reply("answered", "A", "stop")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"text": "A", "finish_reason": "stop"}, "A"),
        ({"message": "A", "finish_reason": "stop"}, "A"),
        ({"delta": {"content": "A"}, "finish_reason": "stop"}, "A"),
        ({"message": {"content": "A"}, "index": 10**30, "finish_reason": "stop"}, "A"),
    ],
)
def test_other_choices_are_read(choice, text):
    for choices in ([choice], [choice, None]):
        result = read({"choices": choices})
        assert result is not None and (result.state, result.text) == ("answered", text)


def test_a_number_of_any_length_beside_an_answer_loses_nothing():
    body = json.dumps(completion("A")).replace('"index": 0', '"index": 1' + "0" * 6000)
    result = read_completion(parse_json(body), body, ENDPOINT)
    assert result is not None and result.text == "A"


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"type": "thinking", "thinking": "Let me see"}]])
@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS"])
def test_a_limit_used_up_by_thinking_is_truncated_and_names_the_setting(content, finish):
    found = reply(content, finish, reasoning_content="Let me see")
    assert (found.state, found.text) == ("truncated", None)
    assert found.detail == (
        f"the token limit was used up before the answer began, finish reason {finish}: raise max_tokens_per_answer"
    )


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        (completion(42), "a content of type int"),
        (completion(True), "a content of type bool"),
        (completion({"answer": 1}), "a part without text"),
        (completion([{"type": "image_url"}]), "a part of type image_url"),
        (completion(None, "tool_calls", tool_calls=[{"id": "x"}]), "tool_calls"),
        ({"usage": completion()["usage"], "output": {"text": "A"}}, "no choices"),
    ],
)
def test_what_cannot_be_read_is_kept_whole_and_counts_as_answered(payload, form):
    payload["padding"] = "x" * 50_000
    result = read(payload)
    assert result is not None and (result.state, result.raw) == ("answered", json.dumps(payload))
    found = reply_from_result(result)
    assert (found.state, found.text) == ("failed", None)
    assert found.detail == f"the answer is kept in the ledger, but purld cannot read its form: {form}"


def test_a_refusal_in_parts():
    found = reply([{"type": "refusal", "refusal": "I can't."}])
    assert (found.state, found.text, found.finish_reason) == ("refused", "I can't.", "refusal")


def test_an_escape_sequence_in_a_finish_reason_is_not_shown():
    found = reply("Half", "ab\x1b[31mort\u202e\x07")
    assert found.detail.endswith(", finish reason abort")


def events(*pieces: Any, end: str = "data: [DONE]") -> str:
    return ": comment\n\n" + "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + end


def test_a_stream_that_was_not_asked_for_is_read():
    def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None}

    last = {"choices": [], "usage": completion()["usage"]}
    body = events(piece("An "), piece("answer."), piece(None, "stop"), last)
    result = read_completion(parse_body(body), body, ENDPOINT)
    assert result is not None and result.usage is not None
    assert (result.text, result.finish_reason, result.usage.output_tokens) == ("An answer.", "stop", 5)
    cut = events(piece("An "), end="")
    result = read_completion(parse_body(cut), cut, ENDPOINT)
    assert result is not None and reply_from_result(result).state == "truncated"
    assert parse_body(events({"error": {"message": "m"}})) == {"error": {"message": "m"}}
    assert parse_body("data: nothing\n") is None


def whole(text: str | None, **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (whole("An answer."), "An answer."),
        (whole("An answer.\n") | {"object": "chat.completion"}, "An answer.\n"),
        (whole(" An answer.") | {"object": "chat.completion"}, " An answer."),
        (whole("") | {"object": "chat.completion"}, "An answer."),
        (whole(None), "An answer."),
        (whole(" More."), "An answer. More."),
        (
            {"choices": [{"message": None, "delta": {"content": "An answer."}, "finish_reason": "stop"}]},
            2 * "An answer.",
        ),
    ],
)
def test_the_whole_message_at_the_end_of_a_stream_is_no_piece_of_it(last, text):
    pieces = [{"choices": [{"delta": {"content": piece}}]} for piece in ("An ", "answer.")]
    body = events(*pieces, last)
    result = read_completion(parse_body(body), body, ENDPOINT)
    assert result is not None
    assert (result.state, result.text, result.finish_reason) == ("answered", text, "stop")


def streamed(*texts: str) -> list[dict[str, Any]]:
    pieces = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return [*pieces, {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": completion()["usage"]}]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_only_line_feeds_and_carriage_returns_end_a_line_of_a_stream(mark, separator):
    events = [json.dumps(piece, ensure_ascii=False) for piece in streamed("The total is ", f"not{mark} ", "12.")]
    body = "".join(f"data: {event}{separator * 2}" for event in events) + f"data: [DONE]{separator}"
    result = read_completion(parse_body(body), body, ENDPOINT)
    assert result is not None and (result.text, result.finish_reason) == (f"The total is not{mark} 12.", "stop")


@pytest.mark.parametrize("damage", ['"not ', "\n", "\x00"])
def test_a_stream_with_a_damaged_event_is_no_whole_answer(damage):
    body = events(*streamed("The total is ", "not ", "12.")).replace('"not "', f'"not {damage}')
    result = read_completion(parse_body(body), body, ENDPOINT)
    assert result is not None and result.usage is not None and result.usage.output_tokens == 5
    found = reply_from_result(result)
    assert (found.state, found.text) == ("truncated", "The total is "), "what follows the gap is no part of the text"
    assert "finish reason damaged_stream" in found.detail


def test_a_stream_that_breaks_off_in_its_first_event_may_have_been_billed():
    body = events(*streamed("An answer."))[:60]
    outcome = classify_response(200, {}, body, ENDPOINT, now=0.0)
    assert outcome.unusable and (outcome.result.state, outcome.result.error) == ("answered", "cut_response")


def test_empty_events_and_comments_damage_no_stream():
    body = ": ping\n\ndata:\n\nevent: ping\n\n" + events(*streamed("A"), end="data:[DONE] \n\n")
    result = read_completion(parse_body(body), body, ENDPOINT)
    assert result is not None and (result.text, result.finish_reason) == ("A", "stop")


USAGE = {"choices": [], "usage": completion()["usage"]}
NO_OBJECT = ["null", '"[DONE]"', '"ping"']
BROKEN = ["ping", '{"usage": {"prompt_tok', "[1]", '{"usage":\ndata: {"prompt_tokens": 3}}']


def stream_with(line: str, place: int, finish: str = "stop") -> str:
    """Return a stream of four events, the third of which ends the answer, with another line at a place."""
    pieces = [*streamed("All ", "of it."), USAGE]
    pieces[2]["choices"][0]["finish_reason"] = finish
    lines = [json.dumps(piece) for piece in pieces]
    lines.insert(place, line)
    return "".join(f"data: {each}\n\n" for each in lines) + "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("line", "place"),
    [
        *((line, place) for line in NO_OBJECT for place in range(5)),
        *((line, place) for line in BROKEN for place in (0, 3, 4)),
    ],
)
def test_a_line_that_holds_nothing_of_the_answer_damages_no_stream(line, place):
    """Before its first piece and after its finish reason, no piece of the answer can be missing."""
    outcome = classify_response(200, {}, stream_with(line, place), ENDPOINT, now=0.0)
    assert (outcome.result.text, outcome.result.finish_reason) == ("All of it.", "stop")
    assert outcome.result.usage is not None and outcome.result.usage.output_tokens == 5 and not outcome.unusable


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_cannot_be_read_within_the_answer_ends_it(line):
    for place, text in ((1, "All "), (2, "All of it.")):
        outcome = classify_response(200, {}, stream_with(line, place), ENDPOINT, now=0.0)
        assert (outcome.result.text, outcome.result.finish_reason) == (text, "damaged_stream")


def test_a_stream_whose_first_piece_is_damaged_is_no_whole_answer():
    body = stream_with('{"choices": [{"delta": {"content": "Not \x00', 0)
    outcome = classify_response(200, {}, body, ENDPOINT, now=0.0)
    assert reply_from_result(outcome.result).state != "answered"


def test_a_refusal_in_a_damaged_stream_stays_one():
    for place in range(5):
        body = stream_with("ping", place, "content_filter")
        result = read_completion(parse_body(body), body, ENDPOINT)
        assert result is not None and reply_from_result(result).state == "refused"


def test_a_refusal_in_a_stream_is_read():
    pieces = [{"choices": [{"delta": {"content": None, "refusal": piece}}]} for piece in ("I ", "cannot.")]
    for last in ([], [whole(None, refusal="I cannot.")]):
        body = events(*pieces, *last)
        result = read_completion(parse_body(body), body, ENDPOINT)
        assert result is not None and reply_from_result(result).state == "refused"
        assert result.text == "I cannot."


def test_usage_in_other_words():
    result = read({**completion("A"), "usage": {"input_tokens": 3, "output_tokens": 4}})
    assert result is not None and result.usage is not None
    assert (result.usage.input_tokens, result.usage.output_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 941}, (32, 909)),
        ({"prompt_tokens": 32, "completion_tokens": 909, "total_tokens": 941}, (32, 909)),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 20}, (32, 9)),
        ({"prompt_tokens": 32, "completion_tokens": 0, "total_tokens": 41}, (32, 9)),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": "941"}, (32, 9)),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 2**60}, (32, 9)),
        ({"prompt_tokens": 0, "completion_tokens": 9, "total_tokens": 9}, None),
        ({"prompt_tokens": 32, "completion_tokens": 0, "total_tokens": 32}, None),
    ],
)
def test_tokens_that_only_the_total_has_are_output_and_a_usage_that_cannot_be_true_is_none(usage, counted):
    for payload in (completion("A"), completion(None, refusal="No."), completion(42), completion("", reasoning="I")):
        result = read({**payload, "usage": usage})
        assert result is not None
        assert (result.usage and (result.usage.input_tokens, result.usage.output_tokens)) == counted


def test_a_line_of_a_batch_counts_the_same_tokens():
    body = {**completion(), "usage": {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 941}}
    line = json.dumps({"custom_id": "q", "response": {"status_code": 200, "body": body}}).encode()
    read_back = read_line(line, False, 2**20, ENDPOINT, 0.0, NO_KEY)
    assert read_back is not None and read_back.outcome.result.usage is not None
    assert read_back.outcome.result.usage.output_tokens == 909


def test_an_answer_without_text_may_have_no_output():
    result = read({**completion(""), "usage": {"prompt_tokens": 32, "completion_tokens": 0}})
    assert result is not None and result.usage is not None and result.usage.output_tokens == 0

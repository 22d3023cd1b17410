"""All faults of an endpoint, over real HTTP: which calls are repeated, billed and stored."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import gzip
import io
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import SECRET, answer, completion, date_in, drip, error, hang_up, raw, reset, silence
from image_factory import encode_image, make_image, save_image
from PIL import Image

from purld import records
from purld.clients import endpoint as endpoint_module
from purld.clients import ledger as ledger_module
from purld.clients import rate_limit, transport
from purld.clients.endpoint import EndpointClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger, LedgerView
from purld.clients.requests import (
    TOKENS_PER_CALL,
    TOKENS_PER_MESSAGE,
    build_request,
    max_image_tokens,
    worst_case_tokens,
)
from purld.config.clients import OpenAIEndpoint
from purld.data.images import read_image
from purld.errors import UserError
from purld.evaluation.judge import judge_questions
from purld.records import IMAGE, Generation, Message, Prompt
from purld.training.scoring import rating_prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.from_text(text) for text in texts]


def numbered(count: int) -> list[Prompt]:
    return prompts(*(f"question {n}" for n in range(count)))


def ask(endpoint, ledger, texts, **options):
    return EndpointClient(endpoint, ledger, "teacher", **options).ask(prompts(*texts))


def test_replies_come_in_the_order_of_the_prompts_and_are_durable_when_announced(server, endpoint, ledger):
    for n, text in enumerate("abcdef"):
        server.script[text] = [
            lambda handler, n=n: (time.sleep(0.05 * (6 - n)), handler.reply(completion(handler.prompt * 2)))
        ]
    seen = []

    def on_reply(index, reply):
        with sqlite3.connect(ledger.path) as other:
            seen.append(
                (index, reply.text, other.execute("SELECT text FROM calls WHERE text = ?", (reply.text,)).fetchone())
            )

    replies = EndpointClient(endpoint(), ledger, "teacher").ask(prompts(*"abcdef"), on_reply)
    assert [reply.text for reply in replies] == ["aa", "bb", "cc", "dd", "ee", "ff"]
    assert sorted(seen) == [(n, text * 2, (text * 2,)) for n, text in enumerate("abcdef")]
    assert [index for index, *_ in seen] != sorted(index for index, *_ in seen), "slow first prompts held up others"


def test_a_cell_of_a_notebook_may_ask(server, endpoint, ledger):
    """Cells run under an event loop, where `asyncio.run` refuses to work."""

    async def cell():
        return ask(endpoint(), ledger, ["a", "b"])

    server.script |= {text: [lambda handler: handler.reply(completion(handler.prompt * 2))] for text in "ab"}
    assert [reply.text for reply in asyncio.run(cell())] == ["aa", "bb"]


def test_the_ledger_holds_the_bytes_that_left(server, endpoint, ledger):
    config = endpoint(system="Be brief.", extra_body={"top_p": 0.5}, token_limit_field="max_completion_tokens")
    prompt = Prompt((Message("user", "Çava? \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")),))
    EndpointClient(config, ledger, "teacher").ask([prompt])
    [row] = ledger.iter_requests()
    assert server.bodies == [build_request(config, prompt).body.encode()]
    assert row["request"] == json.loads(server.bodies[0])
    assert row["request"]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert row["request"]["top_p"] == 0.5
    assert row["request"]["max_completion_tokens"] == config.max_tokens_per_answer
    assert row["bytes"] == len(server.bodies[0])


def test_a_system_turn_of_the_prompt_is_kept(endpoint):
    prompt = Prompt((Message("system", "Own."), Message("user", "q")))
    body = json.loads(build_request(endpoint(system="Ours."), prompt).body)
    assert [turn["content"] for turn in body["messages"]] == ["Own.", "q"]


def test_a_question_is_bought_once(server, endpoint, ledger):
    assert [r.text for r in ask(endpoint(), ledger, ["a", "b", "a"])] == ["An answer."] * 3
    ask(endpoint(), ledger, ["b", "a", "c"])
    assert sorted(server.arrived) == ["a", "b", "c"]
    assert ledger.totals("teacher") == {
        "prompts": 3, "answered": 3, "failed": 0, "unknown": 0, "under_way": 0, "calls": 3,
        "input_tokens": 30, "output_tokens": 15, "cost": 0.0, "unsettled_cost": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"temperature": 0.5}, {"system": "s"}, {"max_tokens_per_answer": 9}]
)
def test_another_model_or_sampling_is_another_question(server, endpoint, ledger, change):
    ask(endpoint(), ledger, ["a"])
    ask(endpoint(**change), ledger, ["a"])
    assert server.arrived == ["a", "a"]


def sent_urls(request) -> list[str]:
    contents = [turn["content"] for turn in json.loads(request.body)["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def test_the_bytes_of_an_image_are_part_of_the_question_and_its_name_is_not(endpoint, tmp_path):
    keys = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data = save_image(tmp_path / f"{name}.png", seed=seed).read_bytes()
        request = build_request(
            endpoint(), Prompt.from_text(f"{IMAGE}q", images=(read_image(f"{name}.png", tmp_path),))
        )
        assert sent_urls(request) == ["data:image/png;base64," + base64.b64encode(data).decode()]
        keys.append(request.key)
    assert keys[0] == keys[1] != keys[2]


def test_images_leave_where_they_stand_in_the_chat(endpoint):
    red, green, blue = (read_image(encode_image(make_image(seed=n)), Path()) for n in range(3))
    messages = (
        Message("system", "S"), Message("user", f"{IMAGE} and {IMAGE}\n"), Message("assistant", "A"),
        Message("user", f"like {IMAGE}?"),
    )  # fmt: skip
    request = build_request(endpoint(), Prompt(messages, (red, green, blue)))
    urls = ["data:image/png;base64," + base64.b64encode(image.data).decode() for image in (red, green, blue)]
    first, second, third = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
    assert [turn["content"] for turn in json.loads(request.body)["messages"]] == [
        "S",
        [first, {"type": "text", "text": " and "}, second],  # some endpoints refuse a part that is only white space
        "A",
        [{"type": "text", "text": "like "}, third, {"type": "text", "text": "?"}],
    ]


def test_an_image_leaves_within_the_configured_bounds(endpoint):
    image = read_image(encode_image(make_image(900, 600), "JPEG"), Path())
    prompt = Prompt.from_text(f"{IMAGE}q", images=(image,))
    whole = build_request(endpoint(), prompt)
    small = build_request(endpoint(max_image_side=300), prompt)
    [url] = sent_urls(small)
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (300, 200)
    assert whole.key != small.key and len(small.body) < len(whole.body)


def test_a_scorer_and_a_judge_see_the_images_of_the_question(endpoint):
    prompt = Prompt.from_text(f"Is {IMAGE} red?", images=(read_image(encode_image(make_image()), Path()),))
    for asked in (
        rating_prompt(prompt, f"{IMAGE}yes"),
        judge_questions([prompt], [Generation(prompt.id, 0, f"no{IMAGE}", 1, True)], {prompt.id: "yes"})[0],
    ):
        before, part, after = json.loads(build_request(endpoint(), asked).body)["messages"][0]["content"]
        assert before["text"].endswith("\nIs ") and part["type"] == "image_url" and after["text"].startswith(" red?\n")


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        # OpenAI's own examples: 1024 x 1024 is 765 tokens in tiles; 1,024 patches are 2.46 times as many tokens. The
        # bound covers InternVL's 3,328, too, and Pixtral's 64 x 64 patches with a break for each row.
        ("m", (1024, 1024), 64 * 64 + 64),
        ("m", (640, 480), 3328),
        ("m", (1, 1), 3328),
        ("m", (1536, 1536), 5668),  # 48 x 48 patches of 32 pixels at 2.46
        ("m", (6000, 6000), 5668),  # sent as 1536 x 1536
        ("gpt-4o-mini-2024-07-18", (1024, 1024), 2833 + 4 * 5667),  # scaled to 768 x 768: four tiles
        ("gpt-4o-mini", (2000, 500), 2833 + 4 * 5667),  # 2048 x 512
    ],
)
def test_the_worst_case_of_an_image_follows_from_its_size(endpoint, model, size, tokens):
    assert max_image_tokens(endpoint(model=model), records.Image("a1", size)) == tokens
    bare = worst_case_tokens(endpoint(model=model), Prompt.from_text("q"))[0]
    prompt = Prompt.from_text(f"{IMAGE}q{IMAGE}", images=(records.Image("a1", size),) * 2)
    # An IMAGE mark is three bytes, which count as text.
    assert worst_case_tokens(endpoint(model=model), prompt)[0] == bare + 2 * tokens + 2 * len(IMAGE.encode())


def test_an_image_that_changed_since_the_prompts_were_read_does_not_leave(server, endpoint, ledger, tmp_path):
    path = save_image(tmp_path / "a.png", seed=101)
    prompt = Prompt.from_text(f"{IMAGE}q", images=(read_image("a.png", tmp_path),))
    save_image(path, seed=9)
    with pytest.raises(UserError, match=r"a\.png: the image has changed"):
        EndpointClient(endpoint(), ledger, "teacher").ask([prompt])
    assert server.bodies == []


def test_what_is_under_way_is_kept_when_an_image_goes_missing(server, endpoint, ledger, monkeypatch):
    """The second prompt's image disappears after its key was computed, while the first prompt is being answered."""

    def request(config, prompt):
        if prompt.question == "gone":
            server.started.wait(5)
            raise UserError("a.png: the image cannot be read any more.")
        return build_request(config, prompt)

    def slow(handler):
        server.started.set()
        time.sleep(0.3)
        handler.reply(completion("paid for"))

    server.started = threading.Event()
    server.script["slow"] = [slow]
    monkeypatch.setattr(endpoint_module, "build_request", request)
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read any more"):
        ask(endpoint(concurrency=2), ledger, ["slow", "gone", "later"])
    assert server.arrived == ["slow"]
    assert [row["answer"] for row in ledger.iter_requests()] == ["paid for"]


def test_the_worst_case_bounds_any_tokenizer_that_falls_back_to_bytes(endpoint):
    prompt = Prompt((Message("system", "S"), Message("user", "naïve 🤝")))
    input_tokens, output_tokens = worst_case_tokens(endpoint(max_tokens_per_answer=7), prompt)
    assert input_tokens >= len("Snaïve 🤝".encode()) + 2 * 8
    assert output_tokens == 7
    schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "é" * 100}}}
    more, _ = worst_case_tokens(endpoint(extra_body=schema), prompt)
    assert more >= input_tokens + 200, "what goes along with every request is read, too"


# The server's action on each arrival; the reply; the last call's error; calls sent; tokens that count towards caps.
WORST = len("q") + TOKENS_PER_CALL + 2 * TOKENS_PER_MESSAGE + 100
FAULTS = {
    "429": ([error(429)], "answered", None, 2, 15),
    "429 with seconds": ([error(429, headers={"Retry-After": "0"})], "answered", None, 2, 15),
    "429 with a date": ([error(429, headers={"Retry-After": date_in(-5)})], "answered", None, 2, 15),
    "429 with nonsense": ([error(429, headers={"Retry-After": "soon"})], "answered", None, 2, 15),
    "429 for ever": ([error(429)] * 9, "failed", "http_429", 4, 0),
    "500": ([error(500)], "answered", None, 2, 15),
    "502": ([raw(b"<html>Bad gateway</html>", 502)], "answered", None, 2, 15),
    "503 twice": ([error(503), error(503)], "answered", None, 3, 15),
    "503 for ever": ([error(503)] * 9, "failed", "http_503", 4, 0),
    "504": ([error(504)], "unknown", "http_504", 1, WORST),
    "reset mid-body": ([reset], "unknown", "connection_lost", 1, WORST),
    "hang-up": ([hang_up], "unknown", "connection_lost", 1, WORST),
    "silence": ([silence], "unknown", "timeout", 1, WORST),
    "a byte at a time": ([drip], "unknown", "timeout", 1, WORST),
    "a completion that breaks off": ([raw(b'{"choices": [{"mess')], "answered", None, 2, WORST + 15),
    "completions that break off": ([raw(b'{"choices": [{"mess')] * 9, "failed", "cut_response", 2, 2 * WORST),
    "another JSON that breaks off": ([raw(b'{"detail": [{"mess')], "failed", "invalid_response", 1, WORST),
    "a login page": ([raw(b"<html>Sign in</html>")], "failed", "invalid_response", 1, WORST),
    "no UTF-8": ([raw(b"\xff\xfe\x00")], "failed", "invalid_response", 1, WORST),
    "an error with status 200": ([raw(b'{"error": {"message": "m"}}')], "failed", "http_200: m", 1, WORST),
    "a status in the body": (
        [raw(b'{"error": {"message": "Slow down.", "code": 429}}')] * 9, "failed", "http_429: Slow down.", 4, 0
    ),
    "a status in the body, once": ([raw(b'{"error": {"message": "m", "code": "502"}}')], "answered", None, 2, 15),
    "an error within a choice": (
        [raw(b'{"choices": [{"error": {"code": 502, "message": "m"}, "message": {"content": ""}}]}')],
        "answered", None, 2, 15,
    ),
    "no choices": ([raw(b'{"choices": []}')], "failed", "invalid_response", 1, WORST),
    "choices of another kind": ([raw(b'{"choices": [null]}')], "failed", "invalid_response", 1, WORST),
    "JSON nested deep": ([raw(b"[" * 100_000)], "failed", "invalid_response", 1, WORST),
    "an empty answer": ([answer("")], "answered", None, 2, 30),
    "empty answers": ([answer("")] * 9, "failed", "empty_answer", 2, 30),
    "blank answers": ([answer(" \n")] * 9, "failed", "empty_answer", 2, 30),
    "null answers": ([answer(None)] * 9, "failed", "empty_answer", 2, 30),
    "empty, then a passing fault": ([answer(""), error(503), answer("")], "failed", "empty_answer", 3, 30),
    "an answer of another kind": (
        [answer(42)], "failed", "unreadable_answer: a content of type int", 1, 15
    ),
    "a tool call": ([answer(None, "tool_calls", tool_calls=[{}])], "failed", "unreadable_answer: tool_calls", 1, 15),
    "thought too long": ([answer("", "length")], "truncated", None, 1, 15),
    "nothing for another reason": ([answer(None, "network_error")] * 9, "failed", "empty_answer", 2, 30),
    "truncated": ([answer("Half an", "length")], "truncated", None, 1, 15),
    "refusal": ([answer(None, refusal="I can't.")], "refused", None, 1, 15),
    "filtered answer": ([answer("Par", "content_filter")], "refused", None, 1, 15),
    "filtered answer by another name": ([answer("Par", "SAFETY")], "refused", None, 1, 15),
    "filtered prompt": ([error(400, "content_filter")], "refused", "content_filter", 1, 0),
    "context": ([error(400, "context_length_exceeded")], "failed", "context_too_long", 1, 0),
    "context in words": (
        [error(400, message="This model's maximum context length is 5 tokens.")], "failed", "context_too_long", 1, 0
    ),
    "context at the server's size": (
        [error(500, message="input is too large to process. increase the physical batch size")],
        "failed", "context_too_long", 1, 0,
    ),
    "a parameter it does not know": ([error(400, message="no such thing")], "failed", "http_400: no such thing", 1, 0),
    "403": ([error(403, message="blocked")], "failed", "http_403: blocked", 1, 0),
}  # fmt: skip


CUT = raw(b'{"object": "chat.completion", "choices": [{"message": {"content": "The ans')


def with_usage(payload: dict, prompt: int, output: int):
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return lambda handler: handler.reply({**payload, "usage": usage})


BROKEN_OFF = {"choices": [{"message": {"content": ""}, "error": {"code": 503, "message": "The provider died."}}]}


@pytest.mark.parametrize("payload", [BROKEN_OFF, {}])
@pytest.mark.parametrize("prompt", [0, 10])
def test_a_fault_that_reports_output_was_paid(payload, prompt, server, endpoint, tmp_path):
    """A usage of 0 prompt tokens cannot be true, so the worst case stays booked; but something was written."""
    server.default = with_usage(payload, prompt, 7)
    booked = []
    for _ in range(2):
        with Ledger(tmp_path / "l.sqlite") as ledger:
            [given] = ask(endpoint(unusable_retries=0, max_tokens_per_answer=100), ledger, ["q"])
            booked.append(ledger.settled_spend("teacher").tokens)
            [row] = ledger.iter_requests()
    assert given.state == "failed" and row["state"] == "answered"
    assert len(server.arrived) == 1, "neither repeated nor bought again by the next start"
    assert booked == [17 if prompt else WORST] * 2


@pytest.mark.parametrize("prompt", [0, 10])
def test_a_fault_that_reports_no_output_is_repeated(prompt, server, endpoint, ledger):
    server.script["q"] = [with_usage(BROKEN_OFF, prompt, 0)]
    assert ask(endpoint(), ledger, ["q"])[0].state == "answered" and len(server.arrived) == 2


@pytest.mark.parametrize("reply", [answer(""), CUT])
def test_a_paid_reply_without_an_answer_is_bought_again_by_no_later_start(reply, server, endpoint, tmp_path):
    server.script = {"q": [reply] * 9}
    paths = [tmp_path / "runs" / name / "ledger.sqlite" for name in "ab"]
    for path, calls in ((paths[0], 2), (paths[0], 2), (paths[1], 2)):
        with Ledger(path, FolderLedgers(path)) as ledger:
            [given] = ask(endpoint(), ledger, ["q"])
            assert given.state == "failed" and len(server.arrived) == calls
    with Ledger(paths[0], FolderLedgers(paths[0])) as ledger:
        [row] = ledger.iter_requests()
        assert row["state"] == "answered" and row["calls"][0]["raw"], "the whole body is kept"
        server.script = {}
        [given] = ask(endpoint(unusable_retries=0), ledger, ["q"], resend_unknown=True)
        assert given.state == "answered" and len(server.arrived) == 3
    with Ledger(paths[1], FolderLedgers(paths[1])) as ledger:  # which had the useless reply before
        assert ask(endpoint(), ledger, ["q"])[0].state == "answered" and len(server.arrived) == 3


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, server, endpoint, ledger):
    script, state, error_class, calls, tokens = FAULTS[name]
    server.script["q"] = script
    [reply] = ask(endpoint(timeout=0.4, max_tokens_per_answer=100), ledger, ["q"])
    [row] = ledger.iter_requests()
    assert (reply.state, row["calls"][-1]["error"]) == (state, error_class)
    assert bool(reply.detail) == (state != "answered")
    totals = ledger.totals("teacher")
    assert totals["calls"] == calls == len(server.arrived)
    assert totals["prompts"] == 1
    assert ledger.booked_spend("teacher").tokens == tokens


def test_the_raw_body_of_a_failure_is_kept(server, endpoint, ledger):
    server.script["q"] = [raw(b"<html>Sign in</html>")]
    ask(endpoint(), ledger, ["q"])
    [row] = ledger.iter_requests()
    assert row["calls"][0]["raw"] == "<html>Sign in</html>"


def test_a_failure_is_no_answer_and_may_be_asked_again_in_a_later_run(server, endpoint, ledger):
    server.script["q"] = [raw(b"oops")]
    assert ask(endpoint(), ledger, ["q"])[0].state == "failed"
    assert ask(endpoint(), ledger, ["q"])[0].text == "An answer."
    assert ledger.totals("teacher")["failed"] == 0


def test_a_refusal_was_paid_and_is_not_bought_again(server, endpoint, ledger):
    server.script["q"] = [answer(None, refusal="I can't.")]
    first, again = ask(endpoint(), ledger, ["q"]), ask(endpoint(), ledger, ["q"])
    assert first == again
    assert first[0].text == "I can't."
    assert len(server.arrived) == 1


def test_unknown_is_sent_again_only_when_told_to(server, endpoint, ledger):
    server.script["q"] = [hang_up]
    assert ask(endpoint(), ledger, ["q"])[0].state == "unknown"
    assert ask(endpoint(), ledger, ["q"])[0].state == "unknown"
    assert len(server.arrived) == 1
    ledger.close()
    with Ledger(ledger.path) as later:
        assert ask(endpoint(), later, ["q"], resend_unknown=True)[0].text == "An answer."
        totals = later.totals("teacher")
    assert (totals["unknown"], totals["answered"], totals["calls"]) == (0, 1, 2)


@pytest.mark.parametrize("fault", [hang_up, answer("")])
def test_what_a_command_loses_itself_is_not_sent_again_by_it(server, endpoint, ledger, fault):
    """One question is asked several times where models give the same answer, which a judge is asked about."""
    server.script["q"] = [fault] * 9
    states = [ask(endpoint(unusable_retries=0), ledger, ["q"], resend_unknown=True)[0].state for _ in range(3)]
    assert len(server.arrived) == 1 and len(set(states)) == 1
    ledger.close()
    with Ledger(ledger.path) as later:
        ask(endpoint(unusable_retries=0), later, ["q"], resend_unknown=True)
    assert len(server.arrived) == 2


def test_connection_refused_is_repeated_and_counts_as_no_call(endpoint, ledger):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        config = endpoint(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}/v1", max_calls=1)
        [reply] = ask(config, ledger, ["q"])
    assert (reply.state, reply.detail) == ("failed", "no connection to the endpoint")
    [row] = ledger.iter_requests()
    assert len(row["calls"]) == 4
    assert ledger.totals("teacher")["calls"] == ledger.booked_spend("teacher").calls == 0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for_by_all(server, endpoint, ledger, form):
    arrivals: list[float] = []

    def note(handler):
        arrivals.append(time.monotonic())
        handler.reply(completion())

    headers = {"Retry-After": "1"} if form == "seconds" else {"Retry-After": date_in(2)}
    server.script["first"] = [error(429, headers=headers)]
    server.default = note
    started = time.monotonic()
    ask(endpoint(concurrency=1), ledger, ["first", "second"])
    assert len(arrivals) == 2
    assert min(arrivals) - started > 0.9


@pytest.mark.parametrize("header", ["0", date_in(-120)], ids=["zero", "a date that has passed"])
def test_a_server_that_asks_for_no_wait_is_not_given_up_in_a_moment(server, endpoint, ledger, monkeypatch, header):
    monkeypatch.setattr(rate_limit, "FIRST_WAIT", 0.1)
    started = time.monotonic()

    def overloaded(handler):
        busy = time.monotonic() - started < 0.8
        (error(429, headers={"Retry-After": header}) if busy else answer())(handler)

    server.default = overloaded
    replies = EndpointClient(endpoint(retries=5), ledger, "teacher").ask(numbered(16))
    assert {reply.state for reply in replies} == {"answered"}


def test_a_long_retry_after_is_bounded(server, endpoint, ledger, monkeypatch):
    monkeypatch.setattr(rate_limit, "LONGEST_WAIT", 0.05)
    server.script["q"] = [error(429, headers={"Retry-After": "86400"})]
    assert ask(endpoint(), ledger, ["q"])[0].state == "answered"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (error(401, message=f"Incorrect API key provided: {SECRET}"), "environment variable TEST_KEY (HTTP 401)"),
        (error(404, "model_not_found", "The model m does not exist"), "has no model 'm'"),
        (error(429, "insufficient_quota", "You exceeded your quota"), "quota is used up"),
        (raw(b"", 307), "redirects to another address"),
    ],
)
def test_what_no_other_prompt_can_survive_stops_at_once(server, endpoint, ledger, fault, words):
    server.default = fault
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")) as stopped:
        EndpointClient(endpoint(concurrency=4), ledger, "teacher").ask(numbered(50))
    assert SECRET not in str(stopped.value)
    assert len(server.arrived) <= 4
    assert ledger.totals("teacher")["unknown"] == 0, "calls under way were heard out"


def test_an_endpoint_that_is_down_stops_the_run_and_not_one_fault_among_answers(server, endpoint, ledger, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_CONSECUTIVE_FAILURES", 3)
    server.script |= {f"question {n}": [error(503)] * 9 for n in range(0, 10, 2)}
    replies = EndpointClient(endpoint(concurrency=1), ledger, "teacher").ask(numbered(10))
    assert [reply.state for reply in replies] == ["failed", "answered"] * 5
    server.default = error(503)
    before = len(server.arrived)
    with pytest.raises(UserError, match=r"3 prompts in a row failed \(http_503\)"):
        EndpointClient(endpoint(model="n", concurrency=1), ledger, "teacher").ask(numbered(10))
    assert len(server.arrived) - before == 3 * 4


@pytest.mark.parametrize("cap", ["max_calls", "max_tokens", "max_cost"])
@pytest.mark.parametrize("fault", [None, error(503), hang_up])
def test_a_cap_is_never_passed_at_any_concurrency(server, endpoint, ledger, cap, fault, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_CONSECUTIVE_FAILURES", 10**9)
    if fault:
        server.script = {prompt.question: [fault] for prompt in numbered(60)[::3]}
    worst = len("question 10") + TOKENS_PER_CALL + 2 * TOKENS_PER_MESSAGE + 20
    limit = {"max_calls": 20, "max_tokens": 5 * worst, "max_cost": 5 * worst / 1e6}[cap]
    config = endpoint(concurrency=16, max_tokens_per_answer=20, input_price=1.0, output_price=1.0, **{cap: limit})
    highest = []
    monkeypatch.setattr(
        ledger,
        "mark_sent",
        lambda call, sent=ledger.mark_sent: (highest.append(ledger.booked_spend("teacher")), sent(call)),
    )
    replies = EndpointClient(config, ledger, "teacher").ask(numbered(60))
    measure = {"max_calls": "calls", "max_tokens": "tokens", "max_cost": "cost"}[cap]
    assert max(getattr(booked, measure) for booked in highest) <= limit * (1 + 1e-9)
    if cap == "max_calls":
        assert len(server.arrived) == limit, "the cap is used up, and not by one more"
    capped = [reply for reply in replies if reply.state == "capped"]
    assert capped and cap in capped[0].detail
    assert {reply.state for reply in replies} <= {"answered", "capped", "unknown", "failed"}
    # The remainder under the cap was too small for another call.
    room = {"max_calls": 1, "max_tokens": worst, "max_cost": worst / 1e6}[cap]
    assert getattr(ledger.booked_spend("teacher"), measure) + room > limit


def test_a_cap_counts_what_earlier_runs_spent(server, endpoint, tmp_path):
    for answered in (3, 3):
        with Ledger(tmp_path / "l.sqlite") as ledger:
            replies = EndpointClient(endpoint(max_calls=3), ledger, "teacher").ask(numbered(5))
        assert sum(reply.state == "answered" for reply in replies) == answered
    assert len(server.arrived) == 3


def test_roles_have_their_own_caps(server, endpoint, ledger):
    EndpointClient(endpoint(max_calls=2), ledger, "teacher").ask(prompts("a", "b"))
    [reply] = EndpointClient(endpoint(max_calls=1), ledger, "judge").ask(prompts("c"))
    assert reply.state == "answered"
    assert ledger.totals("judge")["calls"] == 1


def test_a_server_that_reports_no_usage_is_booked_at_the_worst(server, endpoint, ledger):
    server.default = lambda handler: handler.reply({**completion(), "usage": {"prompt_tokens": -3}})
    ask(endpoint(max_tokens_per_answer=100, input_price=1.0, output_price=1.0), ledger, ["q"])
    totals = ledger.totals("teacher")
    assert (totals["answered"], totals["cost"]) == (1, 0)
    assert totals["unsettled_cost"] == pytest.approx(WORST / 1e6)
    assert ledger.booked_spend("teacher").tokens == WORST


HIDDEN = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 941}  # 900 tokens of thinking
NOTHING = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("usage", [HIDDEN, NOTHING])
def test_a_cap_holds_where_the_usage_leaves_tokens_out(server, endpoint, ledger, usage):
    server.default = lambda handler: handler.reply({**completion(), "usage": usage})
    config = endpoint(max_cost=0.05, input_price=3.0, output_price=15.0, max_tokens_per_answer=1024)
    replies = EndpointClient(config, ledger, "teacher").ask(numbered(20))
    assert {reply.state for reply in replies} == {"answered", "capped"}
    assert len(server.arrived) * (32 * 3.0 + 909 * 15.0) / 1e6 <= 0.05


def test_cost_follows_the_reported_usage(server, endpoint, ledger):
    ask(endpoint(input_price=3.0, output_price=15.0), ledger, ["q"])
    assert ledger.totals("teacher")["cost"] == pytest.approx((10 * 3 + 5 * 15) / 1e6)


def test_no_more_calls_at_once_than_configured(server, endpoint, ledger):
    at_once, most, mutex = 0, [], threading.Lock()

    def slow(handler):
        nonlocal at_once
        with mutex:
            at_once += 1
            most.append(at_once)
        time.sleep(0.05)
        with mutex:
            at_once -= 1
        handler.reply(completion())

    server.default = slow
    EndpointClient(endpoint(concurrency=3, timeout=60), ledger, "teacher").ask(numbered(20))
    assert 1 < max(most) <= 3


def test_requests_are_paced(server, endpoint, ledger):
    started = time.monotonic()
    EndpointClient(endpoint(requests_per_minute=600), ledger, "teacher").ask(numbered(6))
    assert time.monotonic() - started > 0.45


def test_tokens_are_paced_and_unused_ones_given_back(server, endpoint, ledger):
    started = time.monotonic()
    config = endpoint(tokens_per_minute=60 * 60, max_tokens_per_answer=400, concurrency=1)
    EndpointClient(config, ledger, "teacher").ask(numbered(6))
    assert 1.2 < time.monotonic() - started < 30, "6 × 500 tokens at 60 a second take 40 s and more; 5 × 15 take 1.25 s"


def test_lone_surrogates_and_nul_in_an_answer_are_survived(server, endpoint, ledger):
    server.default = lambda handler: handler.reply(completion("a\ud800b\0c"))
    assert ask(endpoint(), ledger, ["q"])[0].text == "a?b\0c"
    assert ask(endpoint(), ledger, ["q"])[0].text == "a?b\0c"


def test_no_file_of_a_run_and_no_message_holds_the_key(server, endpoint, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")

    def echo(handler):
        handler.reply({"error": {"message": handler.headers["Authorization"], "code": "x"}}, 403)

    def escaped(handler):
        key = "".join(f"\\u{ord(letter):04X}" if letter.isalpha() else letter for letter in SECRET)
        handler.reply(f'{{"error": {{"message": "not {key}"}}}}'.replace("/", "\\/").encode(), 400)

    server.script = {
        "echo": [echo],
        "escaped": [escaped],
        "an answer": [lambda h: h.reply(completion(h.headers["Authorization"]))],
        "503": [lambda h: h.reply(h.headers["Authorization"].encode(), 503)],
        "lost": [reset],
    }
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        replies = ask(endpoint(), ledger, ["plain", "echo", "escaped", "an answer", "503", "lost"])
        server.default = error(401, message=f"Bearer {SECRET}")
        with pytest.raises(UserError) as stopped:
            ask(endpoint(), ledger, ["wrong"])
        ledger.export(tmp_path / "run" / "export.jsonl")
        files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    out, err = capfd.readouterr()
    assert [replies[2].detail, replies[3].text] == ["http_400: not [key]", "Bearer [key]"]
    said = repr(replies) + str(stopped.value) + repr(stopped.value.__context__) + out + err + caplog.text
    assert {path.name for path in files} >= {"ledger.sqlite", "ledger.sqlite-wal", "export.jsonl"}
    for text in [said.encode(), *files.values()]:
        assert SECRET.encode() not in text
        assert SECRET.replace("/", "\\/").encode() not in text


def endless(handler):
    """Send blanks for as long as the client listens."""
    handler.send_response(handler.status)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" " * 2**16)
    handler.close_connection = True


def compressed(content: bytes, encoding: str):
    def send(handler):
        handler.reply(content, headers={"Content-Encoding": encoding})

    return send


def test_an_endless_reply_is_given_up_at_a_limit_and_not_bought_again(server, endpoint, ledger, monkeypatch):
    monkeypatch.setattr(transport, "MIN_BODY_BYTES", 2**20)
    server.script["q"] = [lambda handler: (setattr(handler, "status", 200), endless(handler))]
    started = time.monotonic()
    [reply] = ask(endpoint(timeout=60), ledger, ["q"])
    assert time.monotonic() - started < 30
    assert (reply.state, reply.detail) == ("unknown", "the response is longer than purld reads: 1 MiB")
    assert ask(endpoint(), ledger, ["q"])[0].state == "unknown" and len(server.arrived) == 1


def test_an_endless_error_is_classified_by_its_status(server, endpoint, ledger):
    server.script["q"] = [lambda handler: (setattr(handler, "status", 429), endless(handler))]
    assert ask(endpoint(), ledger, ["q"])[0].state == "answered"


def test_an_error_whose_body_never_ends_in_time_is_classified_by_its_status(server, endpoint, ledger):
    def drip_error(handler):
        handler.send_response(503)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"bu")
        time.sleep(1)

    server.script["q"] = [drip_error]
    assert ask(endpoint(timeout=0.5), ledger, ["q"])[0].state == "answered"


WHOLE = json.dumps(completion("A")).encode()


@pytest.mark.parametrize(
    ("content", "encoding", "state", "detail"),
    [
        (gzip.compress(WHOLE), "gzip", "answered", ""),
        (zlib.compress(WHOLE), "deflate", "answered", ""),
        (gzip.compress(WHOLE[:40]) + gzip.compress(WHOLE[40:]) + bytes(9), "gzip", "answered", ""),
        (gzip.compress(WHOLE) + b"no member", "gzip", "answered", ""),
        (gzip.compress(b" " * 2**19) * 8, "gzip", "unknown", "the response is longer than purld reads: 1 MiB"),
        (gzip.compress(b" " * 2**22), "gzip", "unknown", "the response is longer than purld reads: 1 MiB"),
        (b"no gzip", "gzip", "unknown", "gzip, damaged"),
        (b"x", "br", "unknown", ": br"),
    ],
)
def test_compression_is_not_asked_for_and_a_bomb_stays_small(
    server, endpoint, ledger, monkeypatch, content, encoding, state, detail
):
    monkeypatch.setattr(transport, "MIN_BODY_BYTES", 2**20)
    server.script["q"] = [compressed(content, encoding)]
    [reply] = ask(endpoint(), ledger, ["q"])
    assert reply.state == state and reply.detail.endswith(detail)
    assert server.headers[0]["accept-encoding"] == "identity" and len(server.arrived) == 1


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_members_of_a_compressed_body_may_be_cut_anywhere(size):
    inflater = transport.Inflater()
    content = b"".join(map(gzip.compress, (b"one, ", b"", b"two", b"x" * 10**6))) + bytes(9)
    pieces = [piece for at in range(0, len(content), size) for piece in inflater.pieces(content[at : at + size])]
    assert b"".join(pieces) == b"one, two" + b"x" * 10**6
    assert max(map(len, pieces)) <= 64 * 2**10


def test_an_answer_that_repeats_itself_holds_up_no_other(server, endpoint, ledger):
    loop = "\\" * 300_000
    server.script["loops"] = [answer(loop)]
    started = time.monotonic()
    replies = ask(endpoint(timeout=60), ledger, ["loops", *"abcdefg"])
    assert time.monotonic() - started < 30
    assert [reply.state for reply in replies] == ["answered"] * 8
    assert replies[0].text == loop


def test_an_answer_that_cannot_be_read_is_bought_once(server, endpoint, ledger):
    server.script["q"] = [answer({"new": "format"})]
    first, again = ask(endpoint(), ledger, ["q"]), ask(endpoint(), ledger, ["q"])
    assert first == again and first[0].state == "failed" and "kept in the ledger" in first[0].detail
    assert len(server.arrived) == 1
    [row] = ledger.iter_requests()
    assert json.loads(row["calls"][0]["raw"])["choices"][0]["message"]["content"] == {"new": "format"}
    ledger.close()
    with Ledger(ledger.path) as later:
        assert ask(endpoint(), later, ["q"], resend_unknown=True)[0].text == "An answer."


def test_prompts_that_failed_before_are_asked_last(server, endpoint, ledger):
    server.script["long"] = [error(400, "context_length_exceeded")] * 9
    assert [r.state for r in ask(endpoint(), ledger, ["long", "a"])] == ["failed", "answered"]
    ask(endpoint(concurrency=1), ledger, ["long", "a", "b", "c"])
    assert server.arrived[-3:] == ["b", "c", "long"]


def test_a_lost_call_keeps_its_idempotency_key_and_a_failed_one_gets_another(server, endpoint, ledger):
    server.script["q"] = [error(503), hang_up]
    ask(endpoint(), ledger, ["q"])
    ledger.close()
    with Ledger(ledger.path) as later:
        ask(endpoint(), later, ["q"], resend_unknown=True)
        [row] = later.iter_requests()
    keys = [headers["idempotency-key"] for headers in server.headers]
    assert keys == [row["key"], f"{row['key']}-1", f"{row['key']}-1"]


def test_runs_of_one_folder_share_a_lost_calls_idempotency_key_and_never_a_failed_ones(server, endpoint, tmp_path):
    """A gateway that replays the errors which it stored would give a run the failures of the run beside it."""
    server.script["q"] = [error(503), error(503), hang_up]
    for name, options in (("a", {}), ("b", {}), ("a", {"resend_unknown": True})):
        path = tmp_path / name / "ledger.sqlite"
        with Ledger(path, FolderLedgers(path)) as ledger:
            [reply] = ask(endpoint(retries=0), ledger, ["q"], **options)
    assert reply.state == "unknown"
    path = tmp_path / "b" / "ledger.sqlite"
    with Ledger(path, FolderLedgers(path)) as ledger:
        [reply] = ask(endpoint(), ledger, ["q"], resend_unknown=True)
        [row] = ledger.iter_requests()
    assert reply.state == "answered"
    keys = [headers["idempotency-key"] for headers in server.headers]
    assert keys == [row["key"], f"{row['key']}-1", f"{row['key']}-2", f"{row['key']}-2"]


def test_a_copied_ledger_changes_no_idempotency_key(server, endpoint, tmp_path):
    """A copy in the same folder, as a sweep makes it, holds the same calls."""
    server.script["q"] = [error(503), hang_up]
    first, copy = (tmp_path / name / "ledger.sqlite" for name in ("first", "copy"))
    copy.parent.mkdir()
    with Ledger(first, FolderLedgers(first)) as ledger:
        assert ask(endpoint(), ledger, ["q"])[0].state == "unknown"
    with LedgerView(first) as view:
        view.copy(copy, roles=("teacher", "opponent"))
    with Ledger(copy, FolderLedgers(copy)) as ledger:
        assert ask(endpoint(), ledger, ["q"], resend_unknown=True)[0].state == "answered"
        [row] = ledger.iter_requests()
    keys = [headers["idempotency-key"] for headers in server.headers]
    assert keys == [row["key"], f"{row['key']}-1", f"{row['key']}-1"]


def test_no_cookie_goes_back(server, endpoint, ledger):
    server.default = lambda handler: handler.reply(completion(), headers={"Set-Cookie": "id=1; Path=/"})
    ask(endpoint(concurrency=1), ledger, ["a", "b"])
    assert not any("cookie" in headers for headers in server.headers)


def test_nothing_of_the_environment_leaves_but_the_configured_key(server, endpoint, ledger, monkeypatch):
    names = ("ORG_ID", "PROJECT_ID", "ADMIN_KEY", "WEBHOOK_SECRET", "API_KEY")
    for name in names:
        monkeypatch.setenv(f"OPENAI_{name}", f"secret-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: secret-header")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    ask(endpoint(timeout=30), ledger, ["q"])
    assert set(server.headers[0]) == {
        "host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type",
        "authorization", "idempotency-key",
    }  # fmt: skip
    assert "secret" not in json.dumps(server.headers[0]).lower()


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://user:hidden@127.0.0.1:1080", "a SOCKS proxy .*`pip install socksio`"),
        ("nonsense://user:hidden@127.0.0.1", "proxy or certificate settings cannot be used"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_sentence(endpoint, ledger, monkeypatch, proxy, words):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UserError, match=words) as stopped:
        ask(endpoint(base_url="http://teacher.example/v1"), ledger, ["q"])
    assert "hidden" not in str(stopped.value)
    assert ledger.booked_spend("teacher").calls == 0


def test_a_page_at_an_address_without_a_version_stops_at_once(server, endpoint, ledger):
    server.default = raw(b"<html>Welcome</html>")
    bare = endpoint(base_url=server.url.removesuffix("/v1"), concurrency=1)
    with pytest.raises(UserError, match=r"base_url usually ends in /v1: try http://127\.0\.0\.1:\d+/v1\."):
        EndpointClient(bare, ledger, "teacher").ask(numbered(5))
    assert len(server.arrived) == 1


def test_a_placeholder_for_a_key_is_left_alone_in_answers(server, endpoint, ledger, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "content")
    server.default = lambda handler: handler.reply(completion("The content is EMPTY."))
    assert ask(endpoint(), ledger, ["q"])[0].text == "The content is EMPTY."


def test_what_a_run_beside_this_one_bought_is_not_bought_again(server, endpoint, tmp_path):
    server.script["lost"] = [hang_up]
    server.script["failed"] = [raw(b"oops")]
    first, second, damaged = (tmp_path / name / "l.sqlite" for name in ("a", "b", "damaged"))
    damaged.parent.mkdir()
    damaged.write_bytes(b"no ledger" * 100)
    with Ledger(first) as ledger:
        ask(endpoint(), ledger, ["known", "lost", "failed", "unasked"])
    for _ in range(2):
        with Ledger(second, FolderLedgers(second)) as ledger:
            replies = ask(endpoint(max_calls=2), ledger, ["known", "lost", "failed", "new"])
            totals = ledger.totals("teacher")
    assert [reply.state for reply in replies] == ["answered", "unknown", "answered", "answered"]
    assert sorted(server.arrived) == sorted(["known", "lost", "failed", "unasked", "failed", "new"])
    assert {name: totals[name] for name in ("prompts", "answered", "unknown", "calls")} == {
        "prompts": 4, "answered": 3, "unknown": 1, "calls": 2,
    }  # fmt: skip
    assert (totals["input_tokens"], totals["unsettled_cost"]) == (20, 0), (
        "what another run paid for cost this one nothing"
    )
    with Ledger(second, FolderLedgers(second)) as ledger:
        assert ask(endpoint(), ledger, ["lost"], resend_unknown=True)[0].state == "answered"
        assert len(list(ledger.iter_requests())) == 4


def test_no_key_of_another_service_is_sent(server, ledger, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    config = OpenAIEndpoint(kind="openai", base_url=server.url, model="m")
    ask(config, ledger, ["q"])
    assert SECRET not in json.dumps(server.headers)


@pytest.mark.parametrize("value", [None, "", "  \n", "two words", "schlüssel", "a\x07b"])
def test_a_key_that_cannot_be_one(endpoint, ledger, monkeypatch, value):
    config = endpoint()
    monkeypatch.delenv("TEST_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(UserError, match="environment variable TEST_KEY") as stopped:
        EndpointClient(config, ledger, "teacher")
    assert not value or not value.strip() or value not in str(stopped.value)


def test_a_key_file(server, endpoint, ledger, tmp_path: Path):
    (tmp_path / "key").write_text(f"{SECRET}\n")
    ask(endpoint(api_key_env=None, api_key_file=str(tmp_path / "key")), ledger, ["q"])
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    with pytest.raises(UserError, match="nowhere cannot be read"):
        EndpointClient(endpoint(api_key_env=None, api_key_file="nowhere"), ledger, "teacher")


def test_a_full_disk_is_one_sentence_and_stops_the_run(server, endpoint, ledger):
    ledger._db.execute("PRAGMA max_page_count = 12")
    with pytest.raises(UserError, match="the disk is full; make room"):
        EndpointClient(endpoint(), ledger, "teacher").ask(prompts(*(f"{n}" * 3000 for n in range(30))))
    assert len(server.arrived) < 30


def lock_by_another_program(path: Path, unlock: threading.Event, seconds: float = 20) -> None:
    """Lock a ledger as a program does that leaves a transaction open, until `unlock` is set or the time is over."""
    locked = threading.Event()

    def hold() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            locked.set()
            unlock.wait(seconds)
            other.execute("ROLLBACK")

    threading.Thread(target=hold, daemon=True).start()
    assert locked.wait(5)


def ask_in_time(endpoint: OpenAIEndpoint, ledger: Ledger, texts: str) -> str:
    """Ask, and return the error's words; fails if asking takes for ever."""
    words: list[str] = []

    def run() -> None:
        with pytest.raises(UserError) as stopped:
            ask(endpoint, ledger, texts)
        words.append(str(stopped.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "a worker waits for a call that has ended"
    return words[0]


@pytest.mark.parametrize("sent", [True, False])
def test_a_ledger_that_stays_locked_ends_the_run_though_others_wait_at_a_cap(
    server, endpoint, tmp_path, monkeypatch, sent
):
    """It is locked before the only call that the cap allows is sent, or before its answer comes."""
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.2)
    path, unlock = tmp_path / "l.sqlite", threading.Event()
    with Ledger(path) as ledger:
        if sent:
            server.default = lambda handler: (lock_by_another_program(path, unlock), handler.reply(completion()))
        else:
            mark_sent = ledger.mark_sent
            monkeypatch.setattr(
                ledger, "mark_sent", lambda call: (lock_by_another_program(path, unlock), mark_sent(call))
            )
        words = ask_in_time(endpoint(max_calls=1, concurrency=4), ledger, "abcd")
        assert "l.sqlite: is locked by another program" in words and "disk" not in words
        assert (tmp_path / "l.sqlite.room").exists(), "the disk is not full"
        unlock.set()
    assert len(server.arrived) == sent
    server.default = answer()
    with Ledger(path) as ledger:
        assert ledger.totals("teacher")["unknown"] == sent
        states = {reply.state for reply in ask(endpoint(), ledger, "abcd")}
    assert states == ({"unknown", "answered"} if sent else {"answered"}), "the same command goes on"


@pytest.mark.parametrize("patience", [10.0, 0.2])
def test_answers_are_kept_though_another_program_locks_the_ledger_for_a_moment(
    server, endpoint, tmp_path, monkeypatch, patience
):
    """They are even kept if the lock is given back too late for the run to go on."""
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", patience)
    monkeypatch.setattr(ledger_module, "BUSY_AGAIN_SECONDS", 10.0)
    path, arrived = tmp_path / "l.sqlite", threading.Barrier(4)
    locks = iter([lambda: lock_by_another_program(path, threading.Event(), 0.6)])

    def reply_to_all(handler):
        if handler.prompt in "abcd":
            arrived.wait(5)  # all four are in flight
            next(locks, lambda: time.sleep(0.1))()
        handler.reply(completion())

    server.default = reply_to_all
    goes_on = contextlib.nullcontext() if patience > 1 else pytest.raises(UserError, match="is locked by another")
    with Ledger(path) as ledger:
        with goes_on:
            assert [reply.state for reply in ask(endpoint(concurrency=4), ledger, "abcde")] == ["answered"] * 5
        totals = ledger.totals("teacher")
    assert totals["unknown"] == 0 and totals["answered"] >= (5 if patience > 1 else 4)


def test_a_ledger_that_stays_locked_is_waited_for_once_and_not_by_each_call(server, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.5)
    path, unlock, arrived = tmp_path / "l.sqlite", threading.Event(), threading.Barrier(8)

    def reply_to_all(handler):
        if arrived.wait(5) == 0:
            lock_by_another_program(path, unlock)
        else:
            time.sleep(0.2)
        handler.reply(completion())

    server.default = reply_to_all
    with Ledger(path) as ledger:
        started = time.monotonic()
        assert "is locked by another program" in ask_in_time(endpoint(concurrency=8, timeout=30.0), ledger, "abcdefgh")
        assert time.monotonic() - started < 6, "0.5 s once, and two tries of 0.1 s for each call"
        unlock.set()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_FULL, None),
        (sqlite3.SQLITE_IOERR_WRITE, None),
        (sqlite3.SQLITE_BUSY, "is locked by another program"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "is locked by another program"),
        (sqlite3.SQLITE_READONLY, "the ledger cannot be used"),
        (sqlite3.SQLITE_CANTOPEN, "the ledger cannot be used"),
    ],
)
def test_only_a_lack_of_room_takes_the_room_held_for_answers(server, endpoint, tmp_path, monkeypatch, code, words):
    """SQLite says "I/O error" of some of the calls that fail for it. The answer is kept whatever fails once."""
    broken = []

    class FailsOnce(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement.startswith("UPDATE calls SET state = ?") and not broken:
                broken.append(statement)
                problem = sqlite3.OperationalError("a problem")
                problem.sqlite_errorcode = code
                raise problem
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=FailsOnce))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            ask(endpoint(), ledger, "a")
        assert broken and (tmp_path / "l.sqlite.room").exists() == (words is not None)
        assert ledger.totals("teacher")["answered"] == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 20 MiB."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(mount_point)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def test_a_full_disk_costs_no_answer(server, endpoint, small_disk):
    prompts = [Prompt.from_text(f"question {n}") for n in range(40)]
    server.default = lambda handler: (time.sleep(0.2), handler.reply(completion("x" * 200_000)))
    with Ledger(small_disk / "l.sqlite") as ledger, pytest.raises(UserError, match="the disk is full"):
        EndpointClient(endpoint(concurrency=8), ledger, "teacher").ask(prompts)
    assert 8 <= len(server.arrived) < 40
    with LedgerView(small_disk / "l.sqlite") as ledger:
        assert ledger.totals("teacher")["answered"] == len(server.arrived) == len(server.finished)
    (small_disk / "filler").write_bytes(bytes(2**20))
    with pytest.raises(UserError, match="cannot reserve 16 MiB"):
        Ledger(small_disk / "l.sqlite")
    assert not (small_disk / "l.sqlite.room").exists()

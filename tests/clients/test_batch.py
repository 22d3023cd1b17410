"""The batch client against a batch API over HTTP that fails in every way."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter

import pytest
from batch_server import SECRET, ask_in_process, lost_after, lost_before, running_batch_server, wait_until
from faulty_server import completion, error

from purld.clients import batch as batch_module
from purld.clients import batch_submit, rate_limit
from purld.clients.batch import BatchClient
from purld.clients.batch_format import ENDED
from purld.clients.endpoint import EndpointClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger, LedgerView
from purld.clients.open import open_client
from purld.config.clients import OpenAIEndpoint
from purld.errors import PlainWarning, UserError
from purld.records import Prompt
from purld.signals import Stopped, stopping_signals

PROMPTS = [Prompt.from_text(f"question {n}") for n in range(6)]
TEXTS = [f"To question {n}." for n in range(6)]


@pytest.fixture
def server():
    with running_batch_server() as server:
        yield server


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setattr(batch_module, "FIRST_POLL", 0.01)
    monkeypatch.setattr(batch_module, "LONGEST_POLL", 0.05)
    monkeypatch.setattr(batch_submit, "LOOKS", (0.01, 0.02))
    monkeypatch.setattr(rate_limit, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("TEST_KEY", SECRET)

    def make(**settings):
        defaults = {"base_url": server.url, "model": "m", "api_key_env": "TEST_KEY", "timeout": 3.0, "retries": 3}
        return OpenAIEndpoint(**{"kind": "openai", "batch": True} | defaults | settings)

    return make


@pytest.fixture
def ask(endpoint, ledger):
    def ask(prompts=PROMPTS, resend_unknown=False, **settings):
        return BatchClient(endpoint(**settings), ledger, "teacher", resend_unknown).ask(prompts)

    return ask


def ask_later(endpoint, ledger, prompts=PROMPTS, **settings):
    """Ask with `--resend-unknown` in a later command, which opens the ledger anew."""
    ledger.close()
    with Ledger(ledger.path) as later:
        return BatchClient(endpoint(**settings), later, "teacher", resend_unknown=True).ask(prompts)


def name_files_late(server, looks, until_named=None, **counts):
    """Let the server name the files of a batch only after so many looks at it once it has ended.

    `counts` are those of a batch that has ended, `until_named` those that it has as long as it names no file.
    """
    retrieve, seen = server.store.retrieve, Counter()

    def late(identity):
        described = retrieve(identity)
        if described["status"] in ENDED:
            seen[identity] += 1
            if seen[identity] <= looks:
                described |= {"output_file_id": None, "error_file_id": None}
                described["request_counts"] = described["request_counts"] | (until_named or {})
            described["request_counts"] = described["request_counts"] | counts
        return described

    server.store.retrieve = late


def texts(replies):
    return [reply.text for reply in replies]


def states(replies):
    return [reply.state for reply in replies]


def test_answers_come_in_another_order_and_at_half_the_price(server, ledger, ask):
    assert texts(ask(input_price=1e6, output_price=1e6)) == TEXTS
    assert ledger.totals("teacher") == {
        "prompts": 6, "answered": 6, "failed": 0, "unknown": 0, "under_way": 0, "calls": 6,
        "input_tokens": 60, "output_tokens": 30, "cost": 45.0, "unsettled_cost": 0.0,
    }  # fmt: skip
    assert ledger.open_batches() == [] and ledger.calls_in_flight("teacher") == 0
    before = list(server.routes)
    assert texts(ask()) == TEXTS
    assert server.routes == before, "what the ledger knows is not asked again"


def test_the_file_has_the_bodies_of_single_calls_and_the_key_leaves_only_in_its_header(server, endpoint, ask, tmp_path):
    settings = {"system": "Be brief.", "temperature": 0.5, "extra_body": {"seed": 1}}
    ask([*PROMPTS, PROMPTS[0]], **settings)
    [form] = [body for route, _, body in server.sent if route == "upload"]
    assert b'name="purpose"\r\n\r\nbatch\r\n' in form
    lines = [line for line in form.splitlines() if line.startswith(b'{"custom_id"')]
    assert len(lines) == 6 and {json.loads(line)["url"] for line in lines} == {"/v1/chat/completions"}
    with Ledger(tmp_path / "single.sqlite") as single:
        EndpointClient(endpoint(batch=False, **settings), single, "teacher").ask(PROMPTS)
    assert sorted(line.partition(b'"body":')[2][:-1] for line in lines) == sorted(server.bodies)
    assert all(SECRET.encode() not in body for _, _, body in server.sent)
    [created] = [json.loads(body) for route, _, body in server.sent if route == "create"]
    assert created["endpoint"] == "/v1/chat/completions" and created["completion_window"] == "24h"
    assert re.fullmatch("[0-9a-f]{32}", created["metadata"]["purld"])


MOMENTS = {
    "before the upload arrives": ("upload", False),
    "after the upload": ("upload", True),
    "before the batch is created": ("create", False),
    "after the batch is created": ("create", True),
    "while it runs": ("retrieve", True),
    "before the results are read": ("content", False),
    "in the middle of the results": ("content", True),
    "before the creation is recorded": "mark_batch_sent",
    "after the creation, before its id is recorded": "note_batch",
    "before the first answer is stored": "settle",
    "before the end is recorded": "end_batch",
}
QUICK = ("after the batch is created", "in the middle of the results", "before the end is recorded")


@pytest.mark.parametrize(
    "moment",
    [moment if moment in QUICK else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS],
)
def test_killed_at_any_moment_it_pays_once_and_gets_every_answer(server, tmp_path, moment):
    context = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds
    ledger_path, log = tmp_path / "run" / "ledger.sqlite", tmp_path / "log"
    processes = []

    def run(killed_in=""):
        arguments = (server.url, ledger_path, 6, log, killed_in)
        processes.append(context.Process(target=ask_in_process, args=arguments))
        processes[-1].start()
        processes[-1].join(60)

    at = MOMENTS[moment]
    if isinstance(at, tuple):
        route, served = at

        def kill(handler):
            done = handler.served() if served else None
            if route == "content":  # half of the answers arrive, and then nothing
                handler.send_response(200)
                handler.send_header("Content-Length", "100000")
                handler.end_headers()
                if done:
                    handler.wfile.write(b"".join(done[0].splitlines(keepends=True)[:3]))
                    handler.wfile.flush()
                    wait_until(lambda: _answered(ledger_path) == 3)
            wait_until(lambda: processes)
            os.kill(processes[0].pid, signal.SIGKILL)
            handler.close_connection = True

        server.faults[route] = [kill]
        run()
    else:
        run(at)
    assert processes[0].exitcode == -signal.SIGKILL
    run()
    assert processes[1].exitcode == 0
    assert sorted(set(log.read_text().splitlines())) == sorted([*(f"{n} {t}" for n, t in enumerate(TEXTS)), "end 6"])
    assert set(server.executed.values()) == {1}, "a question was bought twice"
    with LedgerView(ledger_path) as ledger:
        assert ledger.totals("teacher")["calls"] == 6 and ledger.totals("teacher")["under_way"] == 0
        assert ledger.open_batches() == []


def _answered(ledger_path):
    with LedgerView(ledger_path) as ledger:
        return ledger.totals("teacher")["answered"]


@pytest.mark.parametrize("fault", [error(500), lost_before, lambda handler: handler.reply(b"<html>")])
@pytest.mark.parametrize("applied", [True, False])
def test_a_creation_without_a_clear_reply_is_looked_up_and_not_made_twice(server, ledger, ask, fault, applied):
    def faulty(handler):
        if applied:
            handler.served()
        fault(handler)

    server.faults["create"] = [faulty]
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1}
    assert ledger.totals("teacher")["calls"] == 6


def test_where_the_endpoint_lists_no_batches_a_lost_creation_is_unknown(server, ledger, endpoint, ask):
    server.store.listed = False
    server.faults["create"] = [lost_after]
    assert states(ask()) == ["unknown"] * 6
    assert states(ask()) == ["unknown"] * 6 and set(server.executed.values()) == {1}
    assert ledger.booked_spend("teacher").calls == 6, "they may be billed"
    assert texts(ask_later(endpoint, ledger)) == TEXTS and set(server.executed.values()) == {2}


@pytest.mark.parametrize("submitted", [True, False])
def test_what_a_command_loses_itself_is_not_bought_again_by_it(server, ledger, endpoint, ask, submitted):
    """`resend_unknown` is about what was lost before; an endpoint that loses everything would be paid without end."""
    server.store.listed = False
    server.faults["create"] = [lost_after] * 3
    if submitted:  # as commands do before they ask
        BatchClient(endpoint(), ledger, "teacher", resend_unknown=True).submit(PROMPTS)
    for _ in range(2):
        assert states(ask(resend_unknown=True)) == ["unknown"] * 6 and set(server.executed.values()) == {1}
    single = EndpointClient(endpoint(batch=False), ledger, "teacher", resend_unknown=True)
    assert states(single.ask(PROMPTS)) == ["unknown"] * 6 and not server.arrived
    assert states(ask_later(endpoint, ledger)) == ["unknown"] * 6 and set(server.executed.values()) == {2}


@pytest.mark.parametrize("submitted", [True, False])
def test_a_batch_of_this_command_that_nobody_knows_is_not_bought_again_by_it(server, ledger, endpoint, submitted):
    server.faults["retrieve"] = [error(404)] * 2
    client = BatchClient(endpoint(), ledger, "teacher", resend_unknown=True)
    if submitted:
        client.submit(PROMPTS)
    for _ in range(2):
        with pytest.raises(UserError, match=r"does not know batch_\w+ of this run"):
            client.ask(PROMPTS)
    assert set(server.executed.values()) == {1}


def test_calls_that_are_free_are_made_again(server, ask):
    faults = [error(429, headers={"Retry-After": "0"}), error(500), lost_before]
    server.faults = {"upload": faults, "retrieve": faults, "content": faults}
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1}


@pytest.mark.parametrize(("route", "status"), [("upload", 404), ("create", 405)])
def test_a_server_without_batches_is_told_in_one_sentence_and_nothing_is_billed(server, ledger, ask, route, status):
    server.faults[route] = [error(status)] * 9
    with pytest.raises(UserError, match=r"has no batch API \(HTTP \d+: no.*\); set teacher.batch to false"):
        ask()
    assert ledger.totals("teacher")["failed"] == 6
    assert ledger.booked_spend("teacher").calls == 0 and not server.executed
    assert texts(ask(batch=False, max_calls=6)) == ["An answer."] * 6


def test_a_wrong_key(server, ledger, ask, monkeypatch):
    server.key = "another"
    with pytest.raises(
        UserError, match=r"refuses the key in the environment variable TEST_KEY \(HTTP 401\)"
    ) as refused:
        ask()
    assert SECRET not in str(refused.value) and ledger.booked_spend("teacher").calls == 0
    server.key = SECRET
    server.store.held = True

    def revoke(handler):
        handler.reply(*handler.served())
        server.key = "another"

    server.faults["retrieve"] = [revoke]
    with pytest.raises(UserError, match=r"HTTP 401.* goes on at .*the same command collects the answers"):
        ask()
    server.key, server.store.held = SECRET, False
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def test_an_expired_batch_brings_its_part_and_the_rest_is_asked_in_another(server, ledger, ask):
    server.store.ending = server.store.expire(2)
    endings = [server.store.expire(2), lambda made: server.store.finish(made, "completed")]
    server.store.ending = lambda made: endings.pop(0)(made)
    assert texts(ask()) == TEXTS
    assert server.routes.count("create") == 2
    totals = ledger.totals("teacher")
    assert (totals["answered"], totals["calls"], totals["output_tokens"]) == (6, 10, 30)


def test_a_batch_that_answers_nothing_ends_the_run(server, ledger, ask):
    server.store.ending = server.store.expire(0)
    prompts = [Prompt.from_text(f"question {n}") for n in range(12)]
    with pytest.raises(UserError, match=r"none of the 12 requests of batch_\w+ was answered \(the batch expired"):
        ask(prompts)
    assert ledger.booked_spend("teacher").tokens == 0
    with pytest.raises(UserError, match="none of the 12"):
        ask(prompts)
    assert server.routes.count("create") == 2, "one batch for each start"


def test_lines_are_read_like_single_replies(server, ledger, ask):
    """Cut, refused, too long for the context, passing and lasting errors, garbage and silence."""
    server.answers = {
        "question 0": [(200, completion("cut off", "length"))],
        "question 1": [(200, completion(None, "content_filter"))],
        "question 2": [(400, {"error": {"message": "This model's maximum context length is 10 tokens."}})],
        "question 3": [(429, {"error": {"message": "slow down"}}), (500, {}), (200, completion("at last"))],
        "question 4": [(400, {"error": {"message": "no such thing"}})],
    }
    replies = ask()
    assert states(replies) == ["truncated", "refused", "failed", "answered", "failed", "answered"]
    assert texts(replies) == ["cut off", None, None, "at last", None, TEXTS[5]]
    assert replies[2].detail == "the prompt does not fit the model's context"
    assert server.executed["question 3"] == 3 and server.executed["question 5"] == 1
    assert server.routes.count("create") == 3


def test_paid_replies_without_an_answer_are_asked_again_once(server, ledger, endpoint, ask):
    server.answers = {"question 0": [(200, completion("")), (200, completion("at last"))]}
    server.answers["question 1"] = [(200, completion(""))] * 9
    assert texts(ask()) == ["at last", None, *TEXTS[2:]]
    assert texts(ask()) == ["at last", None, *TEXTS[2:]]
    assert server.executed["question 0"] == server.executed["question 1"] == 2
    assert ledger.totals("teacher")["calls"] == 8
    ask_later(endpoint, ledger, [Prompt.from_text("question 1")], unusable_retries=0)
    assert server.executed["question 1"] == 3


def test_garbage_among_the_lines(server, ledger, endpoint, ask):
    """A cut line keeps its request; a line that names none leaves its request open, as does a missing one."""

    def ending(made):
        server.store.finish(made, "completed")
        lines = server.store.contents[made["output_file_id"]].splitlines()
        by_number = {json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]: line for line in lines}
        cut, nameless, large, twice, _, good = (by_number[text] for text in TEXTS)
        large = json.loads(large) | {"padding": "x" * 9_000_000}
        server.store.contents[made["output_file_id"]] = b"\n".join(
            [
                b"",
                b"\xff\xfe",
                cut[: len(cut) // 2],
                nameless[90:],
                json.dumps(large).encode(),
                twice,
                twice,
                b"[]",
                good,
            ]
        )

    server.store.ending = ending
    with pytest.raises(UserError, match=r"results of batch_\w+ cannot be read \(lines are missing\); they stay there"):
        ask()
    calls = {row["prompt_id"]: row["calls"][-1] for row in ledger.iter_requests()}
    cut, nameless, large, twice, missing, good = (calls[prompt.id] for prompt in PROMPTS)
    assert (cut["error"], large["error"].partition(":")[0]) == ("invalid_response", "too_large")
    assert [call["state"] for call in (cut, large, twice, good)] == ["failed", "unknown", "answered", "answered"]
    assert nameless["state"] == missing["state"] == "sent" and len(calls) == 6
    server.store.ending = lambda made: server.store.finish(made, "completed")
    assert texts(ask_later(endpoint, ledger)) == TEXTS
    executed = [server.executed[f"question {n}"] for n in range(6)]
    assert executed == [2, 2, 2, 1, 2, 1], "what is missing is given up and asked again, and nothing else"


def send_without_length(cut):
    """Send part of a file, and no length by which the end could be noticed, as a proxy that dies does."""

    def send(handler):
        data, _ = handler.served()
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(cut(data))
        handler.close_connection = True

    return send


def in_a_line(data):
    return data[: data.rindex(b'"choices"') + 40]


def in_an_id(data):
    return data[: data.rindex(b'"custom_id"') + 30]


def between_lines(data):
    return data[: data.index(b"\n") + 1]


def all_of_it(data):
    return data.removesuffix(b"\n")


CUTS = [in_a_line, in_an_id, between_lines]


@pytest.mark.parametrize("cut", [*CUTS, all_of_it])
def test_results_that_arrive_short_are_read_again(server, ledger, ask, cut):
    server.faults["content"] = [send_without_length(cut)] * 2
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1} and ledger.totals("teacher")["calls"] == 6
    assert server.routes.count("content") == (1 if cut is all_of_it else 3)


@pytest.mark.parametrize("cut", CUTS)
def test_results_that_stay_short_stay_at_the_endpoint(server, ledger, endpoint, ask, cut):
    server.faults["content"] = [send_without_length(cut)] * 8
    for resend_unknown in (False, True):
        with pytest.raises(UserError, match=r"lines are missing\); they stay there.* with --resend-unknown"):
            ask(resend_unknown=resend_unknown)
    assert server.routes.count("content") == 8 and len(ledger.open_batches()) == 1
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1} and ledger.totals("teacher")["calls"] == 6


@pytest.mark.parametrize("cut", CUTS)
def test_results_that_stay_short_are_given_up_by_a_later_command(server, ledger, endpoint, ask, cut):
    server.faults["content"] = [send_without_length(cut)] * 8
    with pytest.raises(UserError, match="lines are missing"):
        ask()
    assert texts(ask_later(endpoint, ledger)) == TEXTS
    again = 5 if cut is between_lines else 1
    assert sorted(server.executed.values()) == [1] * (6 - again) + [2] * again
    with LedgerView(ledger.path) as view:
        totals = view.totals("teacher")
    assert (totals["answered"], totals["calls"], totals["unknown"]) == (6, 6 + again, 0)


@pytest.mark.parametrize("cut", [in_a_line, in_an_id])
def test_results_without_counts_are_short_where_a_line_breaks_off(server, ledger, ask, cut):
    name_files_late(server, 0, completed=None)
    server.faults["content"] = [send_without_length(cut)]
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def cut_results(server, *prompts):
    """Let the server leave out the lines of these prompts, and count them."""
    read = server.store.read_file
    left_out = [f"To {prompt}.".encode() for prompt in prompts]

    def short(identity):
        lines = read(identity).splitlines(keepends=True)
        return b"".join(line for line in lines if not any(answer in line for answer in left_out))

    server.store.read_file = short


def test_a_batch_that_stays_short_does_not_keep_others_from_being_collected(server, ledger, endpoint, ask, monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 2)
    cut_results(server, "question 0")
    for _ in range(2):
        with pytest.raises(UserError, match=r"results of batch_\w+ cannot be read \(lines are missing\)") as stopped:
            ask()
        assert "go on" not in str(stopped.value) and "either" not in str(stopped.value)
        assert [batch.calls for batch in ledger.open_batches()] == [1] and ledger.totals("teacher")["answered"] == 5
    del server.store.read_file
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def test_several_batches_that_stay_short_are_told_in_one_message(server, ledger, ask, monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 2)
    cut_results(server, "question 0", "question 3")
    with pytest.raises(UserError, match=r"lines are missing\).* 1 other batch cannot be read either\.$"):
        ask()
    assert ledger.totals("teacher")["answered"] == 4


def test_a_short_batch_of_another_role_stops_nothing(server, ledger, endpoint, ask):
    cut_results(server, "question 9")
    BatchClient(endpoint(), ledger, "opponent").submit([Prompt.from_text("question 9")])
    assert texts(ask()) == TEXTS
    assert len(ledger.open_batches()) == 1
    assert texts(ask([*PROMPTS, Prompt.from_text("question 7")])) == [*TEXTS, "To question 7."]


def test_what_is_to_be_asked_again_waits_for_a_batch_that_is_short(server, ledger, endpoint, ask, monkeypatch):
    """An endpoint that loses lines is not sent more in the same command; the next one asks first, and collects."""
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 2)
    server.answers = {"question 3": [(500, {}), (200, completion("at last"))]}
    cut_results(server, "question 0")
    for answered in (4, 5):
        with pytest.raises(UserError, match="lines are missing"):
            ask()
        assert ledger.totals("teacher")["answered"] == answered
    del server.store.read_file
    assert texts(ask()) == [*TEXTS[:3], "at last", *TEXTS[4:]]


@pytest.mark.parametrize("loses", ["a line", "every file"])
def test_what_is_lost_again_after_it_was_given_up_ends_the_stage(server, ledger, endpoint, ask, loses):
    """An endpoint that always loses it would stop every command, and each --resend-unknown would buy it again."""
    if loses == "a line":
        cut_results(server, "question 3")
    else:
        name_files_late(server, 99)
    with pytest.raises(UserError, match=r"they stay there|names no file") as stopped:
        ask()
    assert "goes on" not in str(stopped.value) and "--cancel-batches" not in str(stopped.value)
    lost = [3] if loses == "a line" else range(6)
    expected = ["unknown" if n in lost else "answered" for n in range(6)]
    assert states(ask_later(endpoint, ledger)) == expected and server.executed["question 3"] == 2
    with Ledger(ledger.path) as later:
        assert states(BatchClient(endpoint(), later, "teacher").ask(PROMPTS)) == expected
        assert server.executed["question 3"] == 2 and not later.open_batches()
        totals = later.totals("teacher")
        assert totals["unknown"] == len(lost) and later.booked_spend("teacher").calls == 6 + len(lost)
    assert states(ask_later(endpoint, ledger)) == expected and server.executed["question 3"] == 3


def test_only_what_was_given_up_before_is_given_up_when_it_is_lost_again(server, ledger, endpoint, ask):
    cut_results(server, "question 3", "new")
    with pytest.raises(UserError, match="lines are missing"):
        ask()
    assert states(ask_later(endpoint, ledger)).count("unknown") == 1
    prompts = [*PROMPTS, Prompt.from_text("new")]
    with pytest.raises(UserError, match="lines are missing"):
        ask_later(endpoint, ledger, prompts)
    with LedgerView(ledger.path) as view:
        calls = {row["prompt_id"]: [call["state"] for call in row["calls"]] for row in view.iter_requests()}
        assert [batch.calls for batch in view.open_batches()] == [1]
    assert calls[PROMPTS[3].id] == ["unknown"] * 3 and calls[prompts[-1].id] == ["sent"]


@pytest.mark.parametrize("members", [2, 6])
def test_results_that_are_compressed_in_parts(server, ledger, ask, members):
    def send(handler):
        lines = handler.served()[0].splitlines(keepends=True)
        size = len(lines) // members
        parts = [b"".join(lines[at : at + size]) for at in range(0, len(lines), size)]
        handler.reply(b"".join(map(gzip.compress, parts)) + bytes(20), headers={"Content-Encoding": "gzip"})

    server.faults["content"] = [send]
    assert texts(ask()) == TEXTS and server.routes.count("content") == 1


def test_an_output_that_is_deleted(server, ask):
    server.faults["content"] = [error(404)]
    replies = ask()
    assert states(replies) == ["unknown"] * 6
    assert replies[0].detail == "the endpoint has deleted the results of the batch"


@pytest.mark.parametrize("most", [6, 2, 1])
@pytest.mark.parametrize("status", ["completed", "expired"])
def test_files_that_are_named_late_are_waited_for(server, ledger, ask, monkeypatch, most, status):
    """Of several batches each is waited for, and also one that has ended before it was complete."""
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", most)
    server.store.ending = lambda made: server.store.finish(made, status)
    name_files_late(server, batch_module.EMPTY_POLLS - 1)
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1} and ledger.totals("teacher")["calls"] == 6


@pytest.mark.parametrize("most", [6, 2])
@pytest.mark.parametrize("status", ["completed", "expired"])
@pytest.mark.parametrize("counts", [{"completed": 0}, {"completed": 0, "total": 0}])
def test_files_that_are_named_late_are_waited_for_while_the_counts_are_not_told_either(
    server, ledger, ask, monkeypatch, most, status, counts
):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", most)
    server.store.ending = lambda made: server.store.finish(made, status)
    name_files_late(server, batch_module.EMPTY_POLLS - 1, until_named=counts)
    assert texts(ask()) == TEXTS
    assert set(server.executed.values()) == {1} and ledger.totals("teacher")["calls"] == 6


@pytest.mark.parametrize("status", ["completed", "expired"])
@pytest.mark.parametrize("counts", [{"completed": 0}, {"completed": 0, "total": 0}, {"completed": 0, "failed": 5}])
def test_a_batch_without_files_is_lost_where_its_counts_do_not_add_up(server, ledger, ask, status, counts):
    """A count of 0 that may only not be told yet makes nothing free: it would be bought again."""
    server.store.ending = lambda made: server.store.finish(made, status)
    name_files_late(server, 99, until_named=counts)
    for _ in range(2):
        assert states(ask()) == ["unknown"] * 6
    assert ledger.booked_spend("teacher").calls == 6 and ledger.booked_spend("teacher").tokens > 0
    assert set(server.executed.values()) == {1} and not ledger.open_batches()


def test_a_batch_without_files_is_free_where_its_counts_say_that_all_of_it_failed(server, ledger, ask):
    name_files_late(server, 99, until_named={"completed": 0, "failed": 6})
    assert states(ask(retries=0)) == ["failed"] * 6
    assert ledger.booked_spend("teacher").tokens == 0


def test_a_batch_that_names_no_files_of_what_it_executed_stays_until_it_does(server, ledger, ask):
    name_files_late(server, 99)
    for resend_unknown in (False, True):
        with pytest.raises(UserError, match=r"has ended with 6 executed requests and names no file .*--resend"):
            ask(resend_unknown=resend_unknown)
    assert len(ledger.open_batches()) == 1 and ledger.totals("teacher")["under_way"] == 6
    del server.store.retrieve
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def test_a_batch_that_never_names_its_files_is_given_up_by_a_later_command_alone(server, ledger, endpoint, ask):
    name_files_late(server, 99)
    with pytest.raises(UserError, match="names no file"):
        ask()
    del server.store.retrieve
    [first], retrieve = server.store.batches, server.store.retrieve
    nothing = {"output_file_id": None, "error_file_id": None}
    server.store.retrieve = lambda identity: retrieve(identity) | (nothing if identity == first else {})
    assert texts(ask_later(endpoint, ledger)) == TEXTS
    assert set(server.executed.values()) == {2}
    with LedgerView(ledger.path) as view:
        assert {row["calls"][0]["error"] for row in view.iter_requests()} == {"no_line"}


def test_a_batch_that_tells_no_counts_and_no_files_is_lost_after_some_looks(server, ledger, ask):
    name_files_late(server, 99, completed=None)
    assert states(ask()) == ["unknown"] * 6
    assert server.routes.count("retrieve") == 1 + batch_module.EMPTY_POLLS and not ledger.open_batches()


def test_a_batch_that_is_refused_after_it_was_created(server, ledger, ask):
    def ending(made):
        said = {"code": "model_not_found", "message": f"Model m has no batches for {SECRET}.", "line": 1}
        made |= {"status": "failed", "errors": {"object": "list", "data": [said]}}

    server.store.ending = ending
    with pytest.raises(
        UserError, match=r"refused batch_\w+ \(Model m has no batches for .*\); nothing of it"
    ) as stopped:
        ask()
    assert SECRET not in str(stopped.value)
    assert ledger.booked_spend("teacher").calls == 0
    with LedgerView(ledger.path) as view:
        assert SECRET not in json.dumps([dict(row) for row in view._db.execute("SELECT * FROM calls")])


def test_a_queue_that_is_full_gets_smaller_batches_one_by_one(server, ledger, ask):
    sizes = []

    def ending(made):
        sizes.append(made["request_counts"]["total"])
        if sizes[-1] > 2:
            said = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m."}
            made |= {"status": "failed", "errors": {"data": [said]}}
            made["_results"] = ([], [])
        else:
            server.store.finish(made, "completed")

    server.store.ending = ending
    assert texts(ask(max_calls=6)) == TEXTS
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    server.store.ending = lambda made: made.update(status="failed", errors=[{"code": "token_limit_exceeded"}])
    with pytest.raises(UserError, match="takes no batch, even of one request"):
        ask([Prompt.from_text("another")])


@pytest.mark.parametrize("role", ["teacher", "opponent"])
def test_a_small_batch_that_finds_the_queue_full_makes_the_others_no_smaller(server, ledger, endpoint, role):
    """It says nothing of how large a batch may be; thousands of requests would be asked one by one, a day each."""
    refused = []

    def ending(made):
        size = made["request_counts"]["total"]
        if size not in refused and (size == 1 or refused == [1]):  # the small one first
            refused.append(size)
            made |= {"status": "failed", "errors": {"data": [{"code": "token_limit_exceeded"}]}, "_results": ([], [])}
        elif refused == [1, 6]:
            server.store.finish(made, "completed")

    server.store.ending = ending
    last = Prompt.from_text("question 6")
    BatchClient(endpoint(), ledger, role).submit([last])
    replies = BatchClient(endpoint(), ledger, "teacher").ask([*PROMPTS, last] if role == "teacher" else PROMPTS)
    assert texts(replies)[:6] == TEXTS
    sizes = [batch["request_counts"]["total"] for batch in server.store.batches.values()]
    assert sizes == ([1, 6, 3, 3, 1] if role == "teacher" else [1, 6, 3, 3])


def test_more_than_fits_one_batch_is_several(server, ledger, ask, monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_REQUESTS", 4)
    assert texts(ask()) == TEXTS and server.routes.count("create") == 2
    monkeypatch.setattr(batch_module, "MAX_FILE_BYTES", 500)
    assert len(ask([Prompt.from_text(f"other {n}") for n in range(3)])) == 3 and server.routes.count("create") == 4


def test_a_cap_holds_at_the_worst_case_of_a_batch(server, ledger, ask):
    """Answers cost less than was booked, so the rest follows in further batches; the cap on calls is final."""
    settings = {"input_price": 1.0, "output_price": 10.0, "max_tokens_per_answer": 100}
    replies = ask(max_cost=0.0012, **settings)
    assert states(replies) == ["answered"] * 6 and server.routes.count("create") > 1
    assert ledger.booked_spend("teacher").cost <= 0.0012
    replies = ask([*PROMPTS, *(Prompt.from_text(f"other {n}") for n in range(4))], max_calls=8, **settings)
    assert states(replies) == ["answered"] * 8 + ["capped"] * 2
    assert replies[-1].detail == "max_calls (8) is reached"


def test_ctrl_c_leaves_the_batch_and_says_how_to_go_on(server, ledger, ask):
    server.store.held = True

    def interrupt():
        wait_until(lambda: "retrieve" in server.routes)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    goes_on = pytest.warns(PlainWarning, match=r"batch_\w+ goes on.*--cancel-batches` cancels it")
    with stopping_signals(), goes_on, pytest.raises(Stopped):
        ask()
    assert [batch.state for batch in ledger.open_batches()] == ["submitted"]
    server.store.held = False
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def test_ctrl_c_while_a_batch_is_created_waits_for_its_id(server, ledger, ask):
    def slow(handler):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(0.3)
        handler.reply(*handler.served())

    server.faults["create"] = [slow]
    with stopping_signals(), pytest.warns(PlainWarning, match="goes on"), pytest.raises(Stopped):
        ask()
    assert [batch.state for batch in ledger.open_batches()] == ["submitted"]
    assert texts(ask()) == TEXTS and set(server.executed.values()) == {1}


def test_a_cancelled_batch_keeps_its_part_and_the_next_start_asks_for_the_rest(server, ledger, endpoint, ask):
    server.store.held = True
    client = BatchClient(endpoint(), ledger, "teacher")
    client.submit(PROMPTS)
    [line] = client.cancel()
    assert re.fullmatch(r"batch_\w+: cancelling, 0 of 6 done, 6 requests", line)
    server.store.held = False
    assert texts(ask()) == TEXTS and server.routes.count("create") == 2


def test_a_batch_cancelled_elsewhere_is_not_submitted_again_by_itself(server, ledger, ask):
    def ending(made):
        made["_results"] = (made["_results"][0][:2], [])
        server.store.finish(made, "cancelled")

    server.store.ending = ending
    with pytest.raises(UserError, match="was cancelled; 2 of its 6 requests were answered"):
        ask()
    assert server.routes.count("create") == 1


def test_open_batches_are_collected_when_batches_are_switched_off(server, ledger, endpoint):
    BatchClient(endpoint(), ledger, "teacher").submit(PROMPTS)
    client = open_client(endpoint(batch=False), ledger, "teacher")
    replies = client.ask([*PROMPTS, Prompt.from_text("new")])
    assert texts(replies) == [*TEXTS, "An answer."]
    assert isinstance(open_client(endpoint(batch=False), ledger, "teacher"), EndpointClient)


def test_a_batch_at_another_address_or_of_another_account_is_not_forgotten(server, ledger, endpoint, ask):
    BatchClient(endpoint(), ledger, "teacher").submit(PROMPTS)
    with pytest.raises(UserError, match=r"waits at http.*; set base_url back"):
        ask(base_url="http://127.0.0.1:1/v1")
    server.store.batches.clear()
    with pytest.raises(UserError, match=r"does not know batch_\w+ of this run"):
        ask()
    assert texts(ask_later(endpoint, ledger)) == TEXTS
    with LedgerView(ledger.path) as view:
        assert view.totals("teacher")["calls"] == 12


def test_runs_in_one_folder_do_not_buy_what_is_in_a_batch(server, endpoint, tmp_path):
    paths = [tmp_path / "runs" / name / "ledger.sqlite" for name in "ab"]
    with Ledger(paths[0], FolderLedgers(paths[0])) as first:
        BatchClient(endpoint(), first, "teacher").submit(PROMPTS)
    with Ledger(paths[1], FolderLedgers(paths[1])) as second:
        for client in (BatchClient(endpoint(), second, "teacher"), EndpointClient(endpoint(), second, "teacher")):
            with pytest.raises(UserError, match="has put questions of this one into a batch and does not wait for it"):
                client.ask(PROMPTS)
        with Ledger(paths[0], FolderLedgers(paths[0])) as first:
            assert texts(BatchClient(endpoint(), first, "teacher").ask(PROMPTS)) == TEXTS
        assert texts(BatchClient(endpoint(), second, "teacher").ask(PROMPTS)) == TEXTS
        assert second.totals("teacher")["calls"] == 0
    assert set(server.executed.values()) == {1}


def test_a_run_waits_for_a_question_that_another_is_asking(server, endpoint, tmp_path):
    paths = [tmp_path / "runs" / name / "ledger.sqlite" for name in "ab"]
    server.store.held = True
    threading.Timer(0.3, lambda: setattr(server.store, "held", False)).start()
    with Ledger(paths[0], FolderLedgers(paths[0])) as first, Ledger(paths[1], FolderLedgers(paths[1])) as second:
        BatchClient(endpoint(), first, "teacher").submit(PROMPTS)
        asked = threading.Thread(target=BatchClient(endpoint(), first, "teacher").ask, args=(PROMPTS,))
        asked.start()
        with pytest.warns(PlainWarning, match="purld waits"):
            assert texts(BatchClient(endpoint(), second, "teacher").ask(PROMPTS)) == TEXTS
        asked.join()
    assert set(server.executed.values()) == {1}


def test_the_state_of_a_batch_is_shown(server, ledger, endpoint):
    shown = []
    client = BatchClient(endpoint(), ledger, "teacher", on_wait=lambda *state: shown.append(state))
    client.ask(PROMPTS)
    notes = [re.sub(r"batch_\w+", "B", note) for _, _, note in shown]
    assert list(dict.fromkeys(notes)) == ["B: in progress, 0 of 6 done", "B: completed, 6 of 6 done"]
    assert {state[:2] for state in shown} == {(0, 6)}


@pytest.mark.parametrize("word", [f"denied for {SECRET}", "a word\x1b[31m", "x" * 41, "", "secretkey"])
def test_a_status_that_is_no_word_is_neither_shown_nor_kept(server, ledger, endpoint, monkeypatch, word):
    if word == "secretkey":
        server.key = word
        monkeypatch.setenv("TEST_KEY", word)
    shown, kept = [], []

    def on_wait(done, total, text):
        shown.append(re.sub(r"batch_\w+", "B", text))
        kept.extend(batch.status for batch in ledger.open_batches())

    server.faults["retrieve"] = [lambda handler: handler.reply({**handler.served()[0], "status": word})]
    assert texts(BatchClient(endpoint(), ledger, "teacher", on_wait=on_wait).ask(PROMPTS)) == TEXTS
    assert (shown[0], kept[0]) == ("B: unknown, 0 of 6 done", "unknown")
    assert "B: completed, 6 of 6 done" in shown


def test_an_id_of_a_file_that_holds_the_key_is_neither_shown_nor_kept(server, ledger, ask, monkeypatch):
    server.key = SECRET.replace("/", "-")
    monkeypatch.setenv("TEST_KEY", server.key)
    server.faults["upload"] = [lambda handler: handler.reply({"id": f"file-{server.key}"})]
    with pytest.raises(UserError, match="did not take the file of a batch") as refused:
        ask()
    assert server.key not in str(refused.value) and not server.executed
    with LedgerView(ledger.path) as view:
        assert not any(server.key in str(tuple(row)) for row in view._db.execute("SELECT * FROM batches"))


@pytest.mark.parametrize(
    ("base_url", "path"),
    [
        ("https://api.openai.com/v1", "/v1/chat/completions"),
        ("https://api.groq.com/openai/v1", "/v1/chat/completions"),
        ("https://open.bigmodel.cn/api/paas/v4", "/v4/chat/completions"),
        ("http://h:8000", "/v1/chat/completions"),
        ("https://h/v1beta/openai", "/v1/chat/completions"),
    ],
)
def test_the_path_of_a_line_has_the_version_of_the_address(base_url, path):
    from purld.clients.batch_format import endpoint_path

    assert endpoint_path(base_url) == path


@pytest.mark.parametrize(
    ("data", "status", "files", "errors", "too_much"),
    [
        ({"status": "COMPLETED", "output_file_id": "f", "error_file_id": ""}, "completed", ("f",), "", False),
        ({"status": "PROGRESS"}, "in_progress", (), "", False),
        ({"status": "failed", "errors": ["bad line", "bad line"]}, "failed", (), "bad line", False),
        ({"status": "failed", "errors": "no"}, "failed", (), "no", False),
        (
            {"status": "failed", "errors": {"message": "Enqueued token limit reached"}},
            "failed", (), "Enqueued token limit reached", True,
        ),
        ({"status": "Canceled", "output_file_id": "../secrets"}, "cancelled", (), "", False),
    ],
)  # fmt: skip
def test_batches_in_the_words_of_other_servers(data, status, files, errors, too_much):
    from purld.clients.batch_format import read_batch
    from purld.clients.redaction import KeyRedactor

    batch = read_batch({"id": "b"} | data, KeyRedactor(None))
    assert (batch.status, batch.files, batch.errors, batch.too_much) == (status, files, errors, too_much)
    assert read_batch({"id": "a/b"} | data, KeyRedactor(None)) is None
    assert read_batch({"id": SECRET} | data, KeyRedactor(SECRET)) is None

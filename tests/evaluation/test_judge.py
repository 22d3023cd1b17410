"""Test the judge's protocol with judges that follow known rules."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from purld.clients.base import OnReply, Reply, capped_reply
from purld.clients.ledger import Ledger
from purld.clients.open import open_client
from purld.config.clients import OpenAIEndpoint
from purld.evaluation.judge import ASKED_AGAIN, NO_REFERENCE, average_preferences, judge_answers, judge_questions
from purld.records import IMAGE, Generation, Image, Prompt, Verdict
from purld.templates import JUDGE_AGAIN


@dataclass
class Taste:
    """A judge that applies a rule to (answer A, answer B) and records the questions."""

    rule: Callable[[str, str], str | None]
    asked: list[Prompt] = field(default_factory=list)

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        self.asked += prompts
        return [self._reply(p.messages[0].content) for p in prompts]

    def _reply(self, question: str) -> Reply:
        head, b = question.split("\n\n=== Response B ===\n")
        text = self.rule(head.split("=== Response A ===\n")[1], b)
        return Reply("failed", detail="status 503") if text is None else Reply("answered", text)


def longest(a: str, b: str) -> str:
    return "T" if len(a) == len(b) else "AB"[len(b) > len(a)]


def generation(prompt: Prompt, text: str, sample: int = 0) -> Generation:
    return Generation(prompt.id, sample, text, tokens=len(text), finished=True)


MAP = Image("a1", (8, 8), path="map.png")
PROMPT = Prompt.from_text(f"{IMAGE}Capital of France?", reference="Paris", images=(MAP,))


def test_both_orders_by_default_and_the_judge_sees_everything() -> None:
    judge = Taste(longest)
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "Paris, France")], {PROMPT.id: "Paris"}, judge)
    assert [v.outcome for v in verdicts] == ["win", "win"]
    assert [v.model_is_a for v in verdicts] == [True, False]
    assert [v.raw for v in verdicts] == ["A", "B"]
    first = judge.asked[0]
    assert first.images == (MAP,)
    assert f"=== Question / Prompt ===\n{IMAGE}Capital of France?\n" in first.question
    assert "=== Reference (Ground Truth) ===\nParis\n" in first.question


def test_an_image_mark_in_an_answer_is_no_image() -> None:
    """Neither an answer nor a judge's quoted reply can shift the prompt's images."""
    judge = SecondThought(1, mark=IMAGE)
    judge_answers([PROMPT], [generation(PROMPT, f"{IMAGE} Paris")], {PROMPT.id: f"{IMAGE}Rome"}, judge)
    for question in judge.asked:
        assert question.images == (MAP,)
        assert question.question.index(IMAGE) < question.question.index("Capital")
    assert "=== Response A ===\n  Paris" in judge.asked[0].question


def test_a_missing_reference_is_said_plainly() -> None:
    judge, prompt = Taste(longest), Prompt.from_text("Write a poem.")
    judge_answers([prompt], [generation(prompt, "Roses")], {prompt.id: "Violets"}, judge)
    assert f"=== Reference (Ground Truth) ===\n{NO_REFERENCE}\n" in judge.asked[0].question


def test_a_judge_that_always_takes_the_first_has_flip_rate_one() -> None:
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, Taste(lambda a, b: "A"))
    assert [v.outcome for v in verdicts] == ["win", "loss"]
    preferences = average_preferences(verdicts)
    assert preferences.wins == {PROMPT.id: 0.5}
    assert preferences.flip_rate == 1.0


def test_single_order_depends_on_content_and_not_on_side_or_position() -> None:
    prompts = [Prompt.from_text(f"question {i}") for i in range(60)]
    ours = [generation(p, f"ours {i}") for i, p in enumerate(prompts)]
    theirs = [generation(p, f"theirs {i}") for i, p in enumerate(prompts)]
    forward, backward = Taste(longest), Taste(longest)
    verdicts = judge_answers(prompts, ours, {g.prompt_id: g.text for g in theirs}, forward, both_orders=False)
    swapped = judge_answers(
        prompts[::-1], theirs[::-1], {g.prompt_id: g.text for g in ours}, backward, both_orders=False
    )
    assert set(forward.asked) == set(backward.asked)
    assert {v.prompt_id: v.model_is_a for v in verdicts} == {v.prompt_id: not v.model_is_a for v in swapped}
    assert {v.outcome for v in verdicts} == {"loss"}
    assert 18 <= sum(v.model_is_a for v in verdicts) <= 42


@pytest.mark.parametrize("raw", ["A", " A\n", "A.", "**A**", "**A**.", "<think>B?\nNo.</think>\n\nA", "B?</think>A"])
def test_a_letter_in_its_wrapping_is_a_verdict(raw: str) -> None:
    verdict, _ = judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, Taste(lambda a, b: raw))
    assert (verdict.outcome, verdict.raw) == ("win", raw)


@pytest.mark.parametrize("raw", ["", "C", "Both are good", "A or B", "I prefer A", "AB", None])
def test_anything_else_is_unjudged_and_kept(raw: str | None) -> None:
    judge = Taste(lambda a, b: raw)
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, judge, retries=0)
    assert [v.outcome for v in verdicts] == ["unjudged", "unjudged"]
    assert verdicts[0].raw == ("(failed: status 503)" if raw is None else raw)
    assert len(judge.asked) == 2
    assert average_preferences(verdicts).wins == {PROMPT.id: None}
    assert average_preferences(verdicts).unjudged == 2
    assert average_preferences(verdicts).reasons == {"no_reply" if raw is None else "no_verdict": 2}
    assert average_preferences(verdicts).flip_rate is None


def test_a_verdict_is_read_after_the_thinking_which_is_counted_and_not_quoted() -> None:
    judge = Taste(lambda a, b: "<think>I see.</think>\nBoth.")
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, judge, both_orders=False)
    assert (average_preferences(verdicts).thinking, average_preferences(verdicts).unjudged) == (1, 1)
    assert [turn.content for turn in judge.asked[-1].messages[1:]] == ["Both.", JUDGE_AGAIN]


def test_a_judge_that_a_cap_silences_is_not_to_blame() -> None:
    """The second order is asked under a cap that the first has used up; a verdict of older versions has no reason."""

    class Capped(Taste):
        def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
            return [super().ask(prompts[:1])[0], capped_reply("max_calls (1)")]

    verdicts = judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, Capped(lambda a, b: "A"))
    assert [v.outcome for v in verdicts] == ["win", "unjudged"]
    assert average_preferences(verdicts).reasons == {"max_calls": 1}
    older = Verdict("p", 0, "unjudged", "(capped: max_calls (1) is reached)", True)
    assert average_preferences([older]).reasons == {"no_verdict": 1}


@dataclass
class SecondThought:
    """A judge that gives a verdict only after a number of reminders."""

    reminders: int
    asked: list[Prompt] = field(default_factory=list)
    mark: str = ""

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        self.asked += prompts
        replies = [Reply("answered", self.mark + self._text(len(p.messages) // 2)) for p in prompts]
        for index, reply in enumerate(replies):
            if on_reply:
                on_reply(index, reply)
        return replies

    def _text(self, reminded: int) -> str:
        return "A" if reminded >= self.reminders else f"Hard to say ({reminded})."


@pytest.mark.parametrize(
    ("reminders", "retries", "outcome"), [(1, 1, "win"), (1, 0, "unjudged"), (2, 1, "unjudged"), (2, 3, "win")]
)
def test_a_judge_without_a_verdict_is_asked_again_within_limits(reminders: int, retries: int, outcome: str) -> None:
    judge, told = SecondThought(reminders), []
    verdict, _ = judge_answers(
        [PROMPT],
        [generation(PROMPT, "x")],
        {PROMPT.id: "y"},
        judge,
        retries=retries,
        progress=lambda *seen: told.append(seen),
    )
    asked = min(reminders, retries) + 1
    assert (verdict.outcome, verdict.asked) == (outcome, asked)
    assert len(judge.asked) == 2 * asked
    assert len(set(judge.asked)) == 2 * asked  # no question is repeated: the ledger would not send it again
    assert verdict.raw.startswith("Hard to say (0)." if asked > 1 or outcome == "unjudged" else "A")
    assert (ASKED_AGAIN in verdict.raw) == (asked > 1)
    assert told[:2] == [(1, 2, ""), (2, 2, "")]
    assert told[2:4] == ([(1, 2, "asked again"), (2, 2, "asked again")] if asked > 1 else [])
    assert average_preferences([verdict]).asked_again == (asked > 1)


def test_asked_again_a_judge_sees_its_reply_and_the_image() -> None:
    judge = SecondThought(1)
    judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, judge)
    first, again = judge.asked[0], judge.asked[2]
    assert again.images == (MAP,)
    assert [m.role for m in again.messages] == ["user", "assistant", "user"]
    assert again.messages[0] == first.messages[0]
    assert again.messages[1].content == "Hard to say (0)."
    assert again.messages[2].content == JUDGE_AGAIN


def test_a_call_without_an_answer_is_not_repeated_here() -> None:
    judge = Taste(lambda a, b: None)
    judge_answers([PROMPT], [generation(PROMPT, "x")], {PROMPT.id: "y"}, judge, retries=3)
    assert len(judge.asked) == 2


def test_the_questions_are_those_that_are_asked() -> None:
    prompts = [Prompt.from_text(f"question {i}") for i in range(5)]
    answers = [generation(p, "same" if i == 2 else f"ours {i}") for i, p in enumerate(prompts)]
    opponents = {p.id: "same" for p in prompts[:4]}
    for both in (True, False):
        judge = Taste(longest)
        judge_answers(prompts, answers, opponents, judge, both)
        assert judge_questions(prompts, answers, opponents, both) == judge.asked
        assert len(judge.asked) == 3 * (1 + both)


def test_equal_answers_tie_without_a_call() -> None:
    judge = Taste(longest)
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "Paris")], {PROMPT.id: "Paris"}, judge)
    assert [v.outcome for v in verdicts] == ["tie", "tie"]
    assert judge.asked == []
    assert average_preferences(verdicts).flip_rate is None  # no judge was asked, so there is no consistency to measure


def test_a_missing_opponent_is_unjudged() -> None:
    verdicts = judge_answers([PROMPT], [generation(PROMPT, "Paris")], {}, Taste(longest))
    assert {v.outcome for v in verdicts} == {"unjudged"}


def test_every_sample_is_judged_in_order() -> None:
    samples = [generation(PROMPT, text, i) for i, text in enumerate(["long answer", "medium", "no"])]
    verdicts = judge_answers([PROMPT], samples, {PROMPT.id: "medium"}, Taste(longest))
    outcomes = [(v.sample, v.outcome) for v in verdicts]
    assert outcomes == [(0, "win"), (0, "win"), (1, "tie"), (1, "tie"), (2, "loss"), (2, "loss")]


def test_an_answer_to_no_prompt_is_an_error() -> None:
    with pytest.raises(KeyError):
        judge_answers([], [generation(PROMPT, "x")], {PROMPT.id: "y"}, Taste(longest))


def test_preferences_average_orders_first_and_samples_second() -> None:
    """Sample 0: one win and one unjudged, so 1. Sample 1: win and tie, so 0.75. Mean 0.875, one flip of one."""
    verdicts = [
        Verdict("p", 0, "win", "A", True),
        Verdict("p", 0, "unjudged", "?", False),
        Verdict("p", 1, "win", "A", True),
        Verdict("p", 1, "tie", "T", False),
        Verdict("q", 0, "loss", "B", True),
        Verdict("q", 0, "loss", "A", False),
    ]
    preferences = average_preferences(verdicts)
    assert preferences.wins == {"p": 0.875, "q": 0.0}
    assert preferences.unjudged == 1
    assert preferences.flip_rate == 0.5


def test_no_verdicts_no_claims() -> None:
    preferences = average_preferences([])
    assert (preferences.wins, preferences.unjudged, preferences.flip_rate) == ({}, 0, None)


class JudgeServer(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer, and replies with a sentence if both are short."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.asked.append(question)
        head, b = question.split("\n\n=== Response B ===\n")
        a = head.split("=== Response A ===\n")[1]
        reply = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": longest(a, b) if len(a + b) > 12
                        else "Both are rather short."}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51},
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_verdicts_over_http_are_in_the_ledger_and_bought_once(tmp_path: Path) -> None:
    prompts = [Prompt.from_text("first?"), Prompt.from_text("second?")]
    answers = [generation(prompts[0], "a rather long answer"), generation(prompts[1], "short")]
    opponents = {prompts[0].id: "brief", prompts[1].id: "brief"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = OpenAIEndpoint(kind="openai", base_url=f"http://127.0.0.1:{server.server_port}/v1", model="judge")
    try:
        for _ in range(2):
            with Ledger(tmp_path / "ledger.sqlite") as ledger:
                verdicts = judge_answers(prompts, answers, opponents, open_client(endpoint, ledger, "judge"))
            assert [v.outcome for v in verdicts] == ["win", "win", "unjudged", "unjudged"]
            assert verdicts[2].raw == ASKED_AGAIN.join(["Both are rather short."] * 2)
            assert len(JudgeServer.asked) == 6  # four questions, two of them asked again
    finally:
        server.shutdown()
        server.server_close()

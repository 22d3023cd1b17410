"""The anchor policy for incomplete answers."""

from __future__ import annotations

import pytest

from purld.clients.anchors import collect_anchors
from purld.clients.base import Reply
from purld.config.clients import AnchorPolicy
from purld.errors import UserError
from purld.records import Anchor, Prompt

REPLIES = {
    "whole": Reply("answered", "Whole."),
    "refused": Reply("refused", "I can't.", "refusal", "the model refused"),
    "blocked": Reply("refused", None, None, "the filter refused"),
    "half": Reply("truncated", "Half", "length", "too long"),
    "failed": Reply("failed", detail="http_503"),
    "lost": Reply("unknown", detail="timeout"),
    "absent": Reply("missing", detail="no row"),
    "dear": Reply("capped", detail="max_calls (5) is reached"),
}


THOUGHTS = {
    "thought": Reply("answered", "<think>\nHm.\n</think>\n\nWhole."),
    "cut": Reply("truncated", "<think>\nHm", "length", "too long"),
    "silent": Reply("answered", "<think>Hm.</think>"),
}


class ScriptedClient:
    def ask(self, prompts, on_reply=None):
        replies = [(REPLIES | THOUGHTS)[prompt.question] for prompt in prompts]
        for index, reply in enumerate(replies):
            on_reply(index, reply)
        return replies


def collect(*texts: str, **policy: str):
    return collect_anchors([Prompt.from_text(text) for text in texts], ScriptedClient(), AnchorPolicy(**policy))


def test_by_default_only_whole_answers_are_anchors_and_all_else_is_counted():
    collection = collect(*REPLIES)
    assert collection.anchors == [Anchor(Prompt.from_text("whole").id, "Whole.")]
    assert collection.counts == {
        "answered": 1, "refused": 2, "truncated": 1, "failed": 1, "unknown": 1, "missing": 1, "capped": 1,
    }  # fmt: skip
    assert collection.dropped == 7
    assert collection.reasons["http_503"] == 1
    assert "1 answered, 2 refused" in collection.summary() and "7 dropped" in collection.summary()


def test_keep_keeps_what_has_text():
    collection = collect(*REPLIES, refused="keep", truncated="keep")
    assert [anchor.text for anchor in collection.anchors] == ["Whole.", "I can't.", "Half"]
    assert [anchor.cut for anchor in collection.anchors] == [False, False, True]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [("refused", ["refused"]), ("truncated", ["half"]), ("failed", ["failed", "lost", "absent", "dear"])],
)
def test_fail_fails_the_run(kind, texts):
    for text in texts:
        with pytest.raises(UserError, match=f"1 of 2 prompts.*{Prompt.from_text(text).id}.*{REPLIES[text].detail[:8]}"):
            collect("whole", text, **{kind: "fail"})
        assert len(collect("whole", text).anchors) == 1


def test_no_anchor_at_all_names_the_most_common_reason():
    with pytest.raises(UserError, match=r"none of the 3 prompts .* \(2 times\): http_503"):
        collect("failed", "lost", "failed")
    with pytest.raises(UserError, match="no prompts"):
        collect()


def test_progress_counts_every_reply():
    steps = []
    collect_anchors(
        [Prompt.from_text(text) for text in REPLIES], ScriptedClient(), on_progress=lambda c: steps.append(c.total())
    )
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_thinking_is_taken_out_and_counted():
    collection = collect("whole", *THOUGHTS, truncated="keep")
    assert [anchor.text for anchor in collection.anchors] == ["Whole.", "Whole."]
    assert (collection.counts["answered"], collection.counts["truncated"], collection.counts["failed"]) == (2, 1, 1)
    assert collection.reasons["the reply has thinking and no answer"] == 1
    assert "3 with thinking, taken out (anchors.thinking)" in collection.summary()
    kept = collect("whole", *THOUGHTS, thinking="keep")
    assert [anchor.text for anchor in kept.anchors] == ["Whole.", THOUGHTS["thought"].text]
    with pytest.raises(
        UserError, match=r"1 of 2 answers come with thinking, which anchors\.thinking: fail does not acc"
    ):
        collect("whole", "thought", thinking="fail")

"""Answer files: matching by prompt and by id, gaps, duplicates, bad rows."""

from __future__ import annotations

import json

import pytest

from purld.blackbox.answers import OTHER_PROMPT, SEVERAL, FileClient
from purld.config import AnswerFile, FileColumns
from purld.errors import UserError
from purld.records import Message, Prompt


@pytest.fixture
def client(tmp_path):
    def make(*rows: object, **columns: str) -> FileClient:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FileClient(AnswerFile(kind="file", path=str(path), columns=FileColumns(**columns)))

    return make


def test_matching_by_prompt_by_id_and_by_content_hash(client):
    chat = Prompt((Message("system", "s"), Message("user", "u")))
    prompts = [
        Prompt.from_text("a"),
        Prompt.from_text("b", metadata={"id": 7}),
        Prompt.from_text("c"),
        chat,
        Prompt.from_text("nobody knows"),
    ]
    rows = [
        {"prompt": "a", "answer": "A"},
        {"id": "7", "answer": "B"},
        {"id": prompts[2].id, "answer": "C"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "D"},
    ]
    seen = []
    replies = client(*rows).ask(prompts, lambda place, reply: seen.append((place, reply)))
    assert [reply.text for reply in replies] == ["A", "B", "C", "D", None]
    assert [reply.state for reply in replies] == ["answered"] * 4 + ["missing"]
    assert seen == list(enumerate(replies))


def test_an_id_with_another_prompt_is_not_taken(client):
    [reply] = client({"id": 1, "prompt": "other", "answer": "A"}).ask([Prompt.from_text("q", metadata={"id": 1})])
    assert (reply.state, reply.detail) == ("missing", OTHER_PROMPT)


def test_duplicates_that_differ_are_reported_and_equal_ones_are_not(client):
    rows = [
        {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"},
        {"prompt": "b", "answer": "1"}, {"prompt": "b", "answer": "1"},
        {"prompt": "c", "answer": ""}, {"prompt": "c", "answer": "late"},
        {"prompt": "d", "answer": None},
    ]  # fmt: skip
    a, b, c, d = client(*rows).ask([Prompt.from_text(text) for text in "abcd"])
    assert (a.text, a.detail) == ("1", SEVERAL)
    assert (b.text, b.detail) == ("1", "")
    assert (c.text, c.detail) == ("late", "")
    assert (d.state, d.detail) == ("missing", "the answer is empty")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "line 2: there is no column 'answer'"),
        ({"answer": "a"}, "line 2: has neither 'id' nor 'prompt'"),
        ({"prompt": "a", "answer": 3}, "line 2: column 'answer' cannot be used: it is a number, not a text"),
        ({"prompt": [], "answer": "x"}, "line 2: column 'prompt' cannot be used: it has no messages"),
        ([], "line 2: is a list"),
    ],
)
def test_bad_rows(client, row, words):
    with pytest.raises(UserError, match=words):
        client({"prompt": "fine", "answer": "x"}, row)


def test_an_empty_file(client):
    with pytest.raises(UserError, match="has no answers"):
        client()


def test_other_columns(client):
    [reply] = client({"q": "a", "teacher": "A"}, prompt="q", answer="teacher").ask([Prompt.from_text("a")])
    assert reply.text == "A"

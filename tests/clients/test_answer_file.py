"""Answer files: matching by prompt and by id, gaps, duplicates, bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_factory import encode_image, make_image, save_image

from purld.clients.answer_file import AMBIGUOUS_IMAGES, CONFLICTING_ANSWERS, OTHER_PROMPT, SHARED_ID, AnswerFileClient
from purld.config.clients import AnswerFile, FileColumns
from purld.data.images import read_image
from purld.errors import UserError
from purld.records import IMAGE, Message, Prompt


@pytest.fixture
def client(tmp_path):
    def make(*rows: object, **columns: str) -> AnswerFileClient:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return AnswerFileClient(AnswerFile(kind="file", path=str(path), columns=FileColumns(**columns)))

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
    replies = client(*rows).ask(prompts, lambda index, reply: seen.append((index, reply)))
    assert [reply.text for reply in replies] == ["A", "B", "C", "D", None]
    assert [reply.state for reply in replies] == ["answered"] * 4 + ["missing"]
    assert seen == list(enumerate(replies))


def test_an_id_with_another_prompt_is_not_taken(client):
    [reply] = client({"id": 1, "prompt": "other", "answer": "A"}).ask([Prompt.from_text("q", metadata={"id": 1})])
    assert (reply.state, reply.detail) == ("missing", OTHER_PROMPT)


def test_an_id_that_two_prompts_have_finds_no_answer(client):
    prompts = [Prompt.from_text(text, metadata={"id": 1}) for text in ("q", "r")]
    assert [reply.detail for reply in client({"id": 1, "answer": "A"}).ask(prompts)] == [SHARED_ID] * 2
    replies = client({"id": 1, "prompt": "q", "answer": "A"}).ask(prompts)
    assert [reply.text for reply in replies] == ["A", None]


def test_duplicates_that_differ_are_reported_and_equal_ones_are_not(client):
    rows = [
        {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"},
        {"prompt": "b", "answer": "1"}, {"prompt": "b", "answer": "1"},
        {"prompt": "c", "answer": ""}, {"prompt": "c", "answer": "late"},
        {"prompt": "d", "answer": None},
    ]  # fmt: skip
    a, b, c, d = client(*rows).ask([Prompt.from_text(text) for text in "abcd"])
    assert (a.text, a.detail) == ("1", CONFLICTING_ANSWERS)
    assert (b.text, b.detail) == ("1", "")
    assert (c.text, c.detail) == ("late", "")
    assert (d.state, d.detail) == ("missing", "the answer is empty")


def image_prompt(text: str, seed: int = 0, **fields: object) -> Prompt:
    return Prompt.from_text(text, images=(read_image(encode_image(make_image(seed=seed)), Path()),), **fields)


def test_prompts_with_images_are_found_as_users_write_them(client, tmp_path):
    """By text with or without markers, by chats with image parts, by id, or by text and images."""
    prompts = [
        image_prompt(f"{IMAGE}Is it red?"),
        image_prompt(f"Is {IMAGE} green?"),
        image_prompt(f"{IMAGE}Is it blue?"),
        image_prompt(f"{IMAGE}Which?", seed=1, metadata={"id": "x1"}),
        image_prompt(f"{IMAGE}Which?", seed=2),
        image_prompt(f"{IMAGE}Which?", seed=3),
    ]
    save_image(tmp_path / "two.png", seed=2)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it blue?"}]}]
    rows = [
        {"prompt": "Is it red?", "answer": "R"},
        {"prompt": "Is <image> green?", "answer": "G"},
        {"prompt": chat, "answer": "B"},
        {"id": "x1", "prompt": "<image>\nWhich?", "answer": "1"},
        {"prompt": "Which?", "images": ["two.png"], "answer": "2"},
        {"id": prompts[5].id, "answer": "3"},
    ]
    replies = client(*rows).ask(prompts)
    assert [reply.text for reply in replies] == ["R", "G", "B", "1", "2", "3"]
    assert {reply.detail for reply in replies} == {""}


def test_the_images_decide_between_prompts_of_the_same_words(client):
    """A wrong anchor is worse than none, and text alone does not identify the image."""
    first, second = (image_prompt(f"{IMAGE}Which?", seed=n) for n in (1, 2))
    for rows in (
        [{"prompt": "Which?", "answer": "A"}],  # one answer, two prompts
        [{"prompt": "Which?", "answer": "A"}, {"prompt": "<image>Which?", "answer": "B"}],
    ):
        assert [r.detail for r in client(*rows).ask([first, second])] == [AMBIGUOUS_IMAGES] * 2
    [reply] = client(*rows).ask([first])
    assert (reply.state, reply.detail) == ("missing", AMBIGUOUS_IMAGES)
    [reply] = client(rows[0]).ask([first])
    assert reply.text == "A"


def test_an_answer_about_other_images_is_not_taken(client, tmp_path):
    save_image(tmp_path / "two.png", seed=2)
    row = {"id": 1, "prompt": "Which?", "images": "two.png", "answer": "2"}
    [reply] = client(row).ask([image_prompt(f"{IMAGE}Which?", seed=1, metadata={"id": 1})])
    assert (reply.state, reply.detail) == ("missing", OTHER_PROMPT)
    [reply] = client(row).ask([image_prompt(f"{IMAGE}Which?", seed=1)])
    assert reply.state == "missing"
    [reply] = client({"prompt": "Which?", "answer": "A"}).ask([Prompt.from_text("Which?")])
    assert reply.text == "A", "a prompt without images is itself"


def test_an_image_of_an_answer_file_that_is_missing_is_a_sentence(client):
    with pytest.raises(UserError, match=r"answers\.jsonl, line 1: .*image 1 \(none\.png\) is missing"):
        client({"prompt": "Which?", "images": "none.png", "answer": "A"})


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

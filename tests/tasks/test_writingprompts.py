"""WritingPrompts as published: tags, detokenisation, and faulty lines."""

import pytest

from purld.errors import UserError
from purld.tasks.registry import load_task
from purld.tasks.writingprompts import restore_plain_text

SOURCE = """\
[ WP ] You 've finally discovered immortality .
[ CW ] Each character can only speak one sentence .
[ EU ] As a treat to fans , George R. R. Martin writes himself in .
[ CW ] Each character can only speak one sentence .
"""
TARGET = """\
Not this one .
`` We 're sinking , '' he said . <newline> <newline> `` I ca n't swim ! ''
George looked up .
A second story .
"""


@pytest.fixture
def folder(tmp_path):
    for split, source, target in [
        ("train", SOURCE, TARGET),
        ("valid", "[ CW ] Not used .\n", "x\n"),
        ("test", "[ CW ] Write without the letter e .\n[ EU ] Hogwarts .\n", "OK .\nOwls .\n"),
    ]:
        (tmp_path / f"{split}.wp_source").write_text(source)
        (tmp_path / f"{split}.wp_target").write_text(target)
    return tmp_path


def test_the_tag_tells_the_variants_apart_and_stays_in_the_prompt(folder):
    pool, held_out = load_task("writingprompts_cw", str(folder))
    assert [p.question for p in pool.prompts] == ["[CW] Each character can only speak one sentence."]
    assert pool.prompts[0].reference == '"We\'re sinking," he said.\n\n"I can\'t swim!"'
    assert (pool.rows, pool.duplicates) == (2, 1)
    assert [p.question for p in held_out.prompts] == ["[CW] Write without the letter e."]
    pool, held_out = load_task("writingprompts_eu", str(folder))
    assert pool.prompts[0].question == "[EU] As a treat to fans, George R. R. Martin writes himself in."
    assert held_out.prompts[0].reference == "Owls."


def test_one_file_is_one_split(folder):
    pool, held_out = load_task("writingprompts_eu", str(folder / "test.wp_source"))
    assert (len(pool.prompts), held_out) == (1, None)


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ("I do n't know , she 'd say .", "I don't know, she'd say."),
        ("It 's $ 5 ( or 10 % ) : cheap ; good ?", "It's $5 (or 10%): cheap; good?"),
        ('He said , " Stop ! " and " go . "', 'He said, "Stop!" and "go."'),
        ('" One <newline> " Two "', '" One\n"Two"'),
        ("a <newline> <newline> b", "a\n\nb"),
        ("wait . . .  what", "wait... what"),
        ("the dogs ' bowl -- mine", "the dogs ' bowl -- mine"),
    ],
)
def test_detokenise(published, text):
    assert restore_plain_text(published) == text


def test_what_is_wrong_with_a_line(folder):
    (folder / "train.wp_target").write_bytes(TARGET.replace("A second story .", "").encode())
    with pytest.raises(UserError, match=r"train\.wp_source, line 4: the story is empty\."):
        load_task("writingprompts_cw", str(folder))
    pool, _ = load_task("writingprompts_cw", str(folder), "skip")
    assert (len(pool.prompts), pool.skipped) == (1, 1)
    (folder / "train.wp_source").write_bytes(b"[ CW ] caf\xe9\n" * 4)
    with pytest.raises(UserError, match=r"line 1: is not UTF-8 \(byte 0xe9\)"):
        load_task("writingprompts_cw", str(folder))
    (folder / "train.wp_source").write_text("[ CW ] one\n")
    with pytest.raises(UserError, match=r"number of lines differs from that of train\.wp_target"):
        load_task("writingprompts_cw", str(folder), "skip")
    (folder / "train.wp_target").unlink()
    with pytest.raises(UserError, match=r"train\.wp_source: is not a \.wp_source file with its \.wp_target"):
        load_task("writingprompts_cw", str(folder))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.wp_source file"):
        load_task("writingprompts_cw", str(tmp_path))
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        load_task("writingprompts_cw", str(tmp_path / "nowhere"))

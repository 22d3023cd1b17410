"""The formats that data sets are published in, each as prompts and as answers, and the files that hold them."""

import gzip
import json

import pytest

from purld.clients.answer_file import AnswerFileClient
from purld.config.clients import AnswerFile
from purld.config.load import parse_config
from purld.config.schema import Columns
from purld.data.formats import read_formatted
from purld.data.prompts import load_prompts
from purld.errors import UserError


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def said(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


CHAT = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]
FORMATS = {
    "alpaca": (
        [
            {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            {"instruction": "Say hello.", "input": "", "output": "Hello."},
            {"instruction": "Go on.", "output": "More.", "system": "S", "history": [["a", "b"]]},
        ],
        [[("user", "Add.\n\n2 and 3")], [("user", "Say hello.")], [*CHAT[:3], ("user", "Go on.")]],
        ["5", "Hello.", "More."],
    ),
    "messages": (
        [
            {"messages": turns(("user", "q"), ("assistant", "A"))},
            {"messages": turns(*CHAT, ("assistant", "d"))},
            {"messages": turns(("user", "open"))},
            {"messages": turns(("user", "parts"), ("assistant", [{"type": "text", "text": "P"}]))},
        ],
        [[("user", "q")], CHAT, [("user", "open")], [("user", "parts")]],
        ["A", "d", None, "P"],
    ),
    "sharegpt": (
        [
            {"conversations": said(("human", "q"), ("gpt", "A"))},
            {"conversations": said(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), "system": "S"},
            {"conversations": said(("system", "T"), ("user", "open"))},
        ],
        [[("user", "q")], CHAT, [("system", "T"), ("user", "open")]],
        ["A", "d", None],
    ),
    "columns": (
        [{"prompt": "q", "answer": "A", "reference": "R"}, {"prompt": turns(*CHAT), "answer": "d"}],
        [[("user", "q")], CHAT],
        ["A", "d"],
    ),
}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="pool.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("named", [False, True])
def test_a_format_is_found_and_gives_prompts_and_answers(write, name, named):
    rows, chats, answers = FORMATS[name]
    path = write(rows)
    key = name if named else "auto"
    loaded = load_prompts(path, format=key)
    assert [[(m.role, m.content) for m in prompt.messages] for prompt in loaded.prompts] == chats
    assert loaded.format.startswith("JSONL, ")
    client = AnswerFileClient(AnswerFile(kind="file", path=str(path), format=key))
    assert [reply.text for reply in client.ask(loaded.prompts)] == answers


def as_csv(rows, delimiter):
    names = ["prompt", "answer"]
    quoted = [['"{}"'.format(row[name].replace('"', '""')) for name in names] for row in rows]
    return "\r\n".join(delimiter.join(cells) for cells in [names, *quoted]).encode()


ROWS = [{"prompt": 'Say "hi",\nthen go.', "answer": "hi; bye"}, {"prompt": "é\u2028x", "answer": "A"}]
FILES = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "a.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "one-line.json": json.dumps(ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "array-in.jsonl": json.dumps(ROWS, indent=1).encode(),
    "no-name": json.dumps(ROWS).encode(),
    "a.csv": as_csv(ROWS, ","),
    "semicolons.csv": as_csv(ROWS, ";"),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS, ","),
    "a.tsv": as_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("name", [*FILES, *(f"{name}.gz" for name in FILES)])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    data = FILES[name.removesuffix(".gz")]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    prompts = load_prompts(tmp_path / name).prompts
    assert [(prompt.question, prompt.metadata["answer"]) for prompt in prompts] == [
        (row["prompt"], row["answer"]) for row in ROWS
    ]
    assert prompts[0].location.startswith(f"{tmp_path / name}, ")


def test_a_text_file_has_a_prompt_on_every_line(tmp_path):
    path = tmp_path / "pool.txt"
    path.write_bytes("\ufeffWhat is 2 + 3?\r\n\n  Say hello.\nGr\u00fc\u00df.\n".encode())
    loaded = load_prompts(path)
    assert [(p.question, p.location.removeprefix(str(path))) for p in loaded.prompts] == [
        ("What is 2 + 3?", ", line 1"), ("Say hello.", ", line 3"), ("Gr\u00fc\u00df.", ", line 4")
    ]  # fmt: skip
    assert loaded.format == "text with one prompt per line"
    assert load_prompts(path, Columns(prompt="question")).prompts[1].question == "Say hello."
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(UserError, match=r"pool\.txt, line 2: is not UTF-8"):
        load_prompts(path)
    path.write_text('{"prompt": "rows of JSON are read as such"}\n')
    assert load_prompts(path).prompts[0].question == "rows of JSON are read as such"


def test_parquet_and_saved_data_sets_hold_every_format(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, (rows, chats, _) in FORMATS.items():
        rows = [row for row in rows if "history" not in row and not isinstance(row.get("prompt"), list)]
        rows = [row for row in rows if not any(isinstance(turn["content"], list) for turn in row.get("messages", []))]
        keys = dict.fromkeys(key for row in rows for key in row)
        table = datasets.Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])
        table.to_parquet(tmp_path / f"{name}.parquet")
        datasets.DatasetDict(train=table).save_to_disk(tmp_path / name)
        for path in (tmp_path / f"{name}.parquet", tmp_path / name, tmp_path / name / "train"):
            prompts = load_prompts(path).prompts
            assert [[(m.role, m.content) for m in prompt.messages] for prompt in prompts] == chats[: len(rows)]


def test_a_file_whose_name_says_nothing_can_be_named(write):
    path = write([], "table")
    path.write_text("prompt\tanswer\nq\tA\n")
    with pytest.raises(UserError, match=r"say what it is by data\.format, for example csv\.$"):
        load_prompts(path)
    assert load_prompts(path, format="tsv").prompts[0].metadata == {"answer": "A"}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "q", "messages": turns(("user", "q"))}, "columns or messages"),
        ({"prompt": "q", "instruction": "i", "output": "o"}, "columns or alpaca"),
        ({"instruction": "i", "output": "o", "conversations": said(("human", "q"))}, "alpaca or sharegpt"),
    ],
)
def test_a_file_that_could_be_read_in_two_ways_is_refused_with_the_key_to_set(write, row, names):
    path = write([row])
    with pytest.raises(UserError, match=rf"line 1: the columns .* say which it is by data\.format: {names}\.$"):
        load_prompts(path)
    for name in names.split(" or "):
        assert load_prompts(path, format=name).prompts


def test_an_answer_file_with_columns_of_its_own_is_not_ambiguous(write):
    path = write([{"prompt": "q", "answer": "A", "messages": turns(("user", "x"))}])
    client = AnswerFileClient(AnswerFile(kind="file", path=str(path)))
    assert client.ask(load_prompts(path, format="columns").prompts)[0].text == "A"


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("alpaca", {"instruction": 3, "output": "x"}, "column 'instruction' is a number, not a text"),
        ("alpaca", {"instruction": " ", "output": "x"}, "column 'instruction' is empty"),
        ("alpaca", {"instruction": "i", "input": 3}, "column 'input' is a number, not a text"),
        ("alpaca", {"instruction": "i", "history": [["a"]]}, "turn 1 of column 'history' is not a pair"),
        ("messages", {"messages": None}, "column 'messages' is missing or null, not turns"),
        ("messages", {"messages": []}, "column 'messages' is an empty list, not turns"),
        ("messages", {"other": 1}, "there is no column 'messages'"),
        ("messages", {"messages": turns(("assistant", "A"))}, "column 'messages' has no turn of the user"),
        ("messages", {"messages": turns(("tool", "x"))}, "column 'messages' cannot be used: message 1 has the role"),
        ("messages", {"messages": [None]}, "column 'messages' cannot be used: message 1 is missing or null"),
        ("sharegpt", {"conversations": said(("robot", "x"))}, "turn 1 of column 'conversations' is from 'robot'"),
        ("sharegpt", {"conversations": [3]}, "turn 1 of column 'conversations' is from 'None'"),
        ("sharegpt", {"conversations": said(("human", None))}, "the content of message 1 is missing or null"),
    ],
)
def test_a_bad_row_of_a_format_is_one_sentence(write, name, row, words):
    path = write([FORMATS[name][0][0], row])
    with pytest.raises(UserError, match=rf"^{path}, line 2: .*{words}.*\.$"):
        load_prompts(path)
    assert load_prompts(path, bad_rows="skip").skipped == 1


BROKEN = {
    "missing comma": ("a.json", b'[{"prompt": "a"}\n {"prompt": "b"}]', "entry 1, line 1: is not valid JSON"),
    "torn": ("a.json", b'[\n{"prompt": "a"},\n{"prompt": "b', "entry 2, line 3: is not valid JSON"),
    "never closed": ("a.json", b'[{"prompt": "a"}', "entry 1, line 1: is not valid JSON"),
    "text after it": ("a.json", b'[{"prompt": "a"}]\n{}', "line 1: has text after the end of the JSON array"),
    "an entry that is none": ("a.json", b'[{"prompt": "a"},\n 7]', "entry 2, line 2: is a number; each entry is"),
    "NaN": ("a.json", b'[{"prompt": NaN}]', "entry 1, line 1: is not valid JSON"),
    "not UTF-8": ("a.json", b'[{"prompt": "a"},\n{"prompt": "\xe9"}]', r"line 2: is not UTF-8 \(byte 0xe9\)"),
    "deep": ("a.json", b"[" * 100_000, "is nested too deeply"),
    "empty array": ("a.json", b"[]", "there are no prompts: it has no rows"),
    "UTF-16 table": ("a.csv", "prompt\nq\n".encode("utf-16"), "line 1: the file is UTF-16; save it as UTF-8"),
    "too many cells": ("a.csv", b"prompt,answer\na,b\nc,d,e\n", "line 3: has 3 cells, and the header names 2 columns"),
    "too few cells": ("a.csv", b"prompt,answer\na\n", "line 2: has 1 cells"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "line 1: the header names the column 'prompt' twice"),
    "an open quote": ("a.csv", b'prompt\n"a\nb\n', "line 2: cannot be read as CSV"),
    "latin-1 table": ("a.csv", b"prompt\na\ncaf\xe9\n", "line 3: is not UTF-8 in column 'prompt'"),
    "NUL table": ("a.csv", b"prompt\na\0b\n", "line 2: .*NUL"),
    "an empty cell": (
        "a.csv",
        b"prompt,answer\na,b\n,b\n",
        "line 3: column 'prompt' cannot be used: it is missing or null",
    ),
    "no header": ("a.csv", b"a,b\nc,d\n", r"line 2: there is no column 'prompt' \(its columns: 'a', 'b'"),
    "an empty table": ("a.csv", b"", "there are no prompts: it has no rows"),
    "torn gzip": ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 100)[:-12], "cannot be read"),
    "a damaged gzip": ("a.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xff\xff\xff", "cannot be read"),
    "zstd": ("a.jsonl", b"\x28\xb5\x2f\xfd..", "is compressed with zstd, which is not read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence(tmp_path, case):
    name, data, words = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


def test_the_instruction_alone_is_told_apart_from_the_whole_of_alpaca(write):
    path = write(FORMATS["alpaca"][0])
    loaded = load_prompts(path, Columns(prompt="instruction"))
    assert loaded.prompts[0].question == "Add." and "'input' belongs to the instruction" in str(loaded.notice)
    gold = load_prompts(path, Columns(reference="output"))
    assert [prompt.reference for prompt in gold.prompts] == ["5", "Hello.", "More."] and gold.notice is None


def test_a_teacher_that_is_the_prompt_file_needs_no_path():
    values = {"student": {"model": "m"}, "data": {"prompts": "p.jsonl"}, "teacher": {"kind": "file"}}
    assert parse_config(values, "c").teacher.path == "p.jsonl"
    values["data"] |= {"columns": {"prompt": "q"}, "format": "columns", "image_folder": "photos"}
    values["teacher"] |= {"columns": {"answer": "a"}}
    teacher = parse_config(values, "c").teacher
    assert (teacher.format, teacher.image_folder) == ("columns", "photos")
    assert (teacher.columns.prompt, teacher.columns.answer) == ("q", "a")
    with pytest.raises(UserError, match=r"teacher\.path is missing"):
        parse_config(values | {"data": {"task": "competition_math", "path": "x"}}, "c")


def test_rows_are_read_when_they_are_asked_for(write):
    path = write([{"prompt": "q"}] * 150 + ["torn"])
    rows = read_formatted(path, "auto", Columns(), "answer").rows
    assert next(rows).values == {"prompt": "q"}

"""Prompt files: the forms that are read, and one sentence for each that is not."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_factory import encode_image, make_image, save_image

from purld.config.schema import Columns
from purld.data.images import open_image
from purld.data.prompts import exclude_prompts, load_prompts, split_pool
from purld.errors import UserError
from purld.records import IMAGE, Message, Prompt

REAL = Path(os.environ.get("PURLD_SHARED_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")


@pytest.fixture
def write(tmp_path):
    def write(*lines: bytes | str | dict, name: str = "pool.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(as_line(line) for line in lines))
        return path

    return write


def as_line(line: bytes | str | dict) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode() + b"\n"


def test_a_row_becomes_a_prompt(write):
    loaded = load_prompts(write({"prompt": "Q?", "reference": "A", "images": [], "level": 3, "tags": ["x"]}))
    [prompt] = loaded.prompts
    assert prompt == Prompt((Message("user", "Q?"),), (), "A")
    assert prompt.location.endswith("pool.jsonl, line 1")
    assert prompt.metadata == {"level": 3, "tags": ["x"]}
    assert (loaded.rows, loaded.duplicates, loaded.skipped) == (1, 0, 0)


def test_chats_keep_their_system_turn_and_other_columns_can_be_mapped(write):
    chat = [{"role": r, "content": c} for r, c in [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]]
    [prompt] = load_prompts(write({"chat": chat, "gold": 4}), Columns(prompt="chat", reference="gold")).prompts
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip
    assert prompt.reference == "4"


@pytest.mark.parametrize(("cell", "text"), [(4, "4"), (4.0, "4"), (4.5, "4.5"), (-1e300, "-1e+300"), (None, None)])
def test_numbers_are_references_too(write, cell, text):
    assert load_prompts(write({"prompt": "q", "reference": cell})).prompts[0].reference == text


def test_duplicates_are_dropped_and_counted(write):
    loaded = load_prompts(write({"prompt": "a", "n": 1}, {"prompt": "b"}, {"prompt": "a", "n": 2}))
    assert [prompt.question for prompt in loaded.prompts] == ["a", "b"]
    assert loaded.prompts[0].metadata["n"] == 1
    assert loaded.duplicates == 1


def test_byte_order_mark_line_ends_blank_lines_and_separators_in_text_are_no_faults(write):
    text = "one\u2028two\x85three"
    path = write(
        b"\xef\xbb\xbf" + json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n\r\n", b'{"prompt": "last"}'
    )
    assert [prompt.question for prompt in load_prompts(path).prompts] == [text, "last"]


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str, **fields: object) -> dict:
    return {"type": "text", "text": words} | fields


def image(**fields: object) -> dict:
    return {"type": "image"} | fields


DATA_URL = "data:image/png;base64,"


GOOD = {"prompt": "good"}
BAD = {
    "torn": ('{"prompt": "a', "is not valid JSON"),
    "two objects": ('{"prompt": "a"} {"prompt": "b"}', "is not valid JSON"),
    "an array": ('[{"prompt": "a"}]', "is a list; a row is one JSON object on one line"),
    "a number": ("7", "is a number"),
    "not a number": ('{"prompt": "a", "x": NaN}', "NaN is not a JSON number"),
    "a number of 5000 digits": ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "is not valid JSON"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', r"is not valid JSON \(key 'prompt' occurs twice\)"),
    "a reference without end": (
        '{"prompt": "a", "reference": 1e999}',
        "'reference' cannot be used: it is not a finite",
    ),
    "nested deep": ("[" * 100_000, "nested too deeply"),
    "latin-1": ('{"prompt": "caf\u00e9"}'.encode("latin-1") + b"\n", r"is not UTF-8 \(byte 0xe9 at position 16\)"),
    "no column": ({"text": "a"}, r"there is no column 'prompt' \(its columns: 'text'; see data.columns\)"),
    "null": ({"prompt": None}, "column 'prompt' cannot be used: it is missing or null"),
    "a list of texts": ({"prompt": ["a"]}, "message 1 is a text, not a {role, content} object"),
    "an object": ({"prompt": {"role": "user"}}, "it is an object, not a text or a list"),
    "true": ({"prompt": True}, "it is true or false"),
    "empty": ({"prompt": ""}, "it is empty"),
    "blank": ({"prompt": " \n\t"}, "it is empty"),
    "NUL": ({"prompt": "a\0b"}, "contains a NUL"),
    "lone surrogate": ({"prompt": "ab\ud800"}, "a lone surrogate at character 3"),
    "enormous": ({"prompt": "a" * 1_000_001}, "has 1,000,001 characters"),
    "no turns": ({"prompt": []}, "it has no messages"),
    "a wrong role": ({"prompt": [{"role": "robot", "content": "x"}]}, "message 1 has the role 'robot'"),
    "no role": ({"prompt": [{"content": "x"}]}, "message 1 has the role 'None'"),
    "the last word is the model's": (
        {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "its last message has the role assistant, not user",
    ),
    "a late system turn": (
        {"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "message 2 is a system message",
    ),
    "a turn without content": (
        {"prompt": [{"role": "user", "content": None}]},
        "the content of message 1 is missing or null",
    ),
    "a reference that is a list": (
        {"prompt": "a", "reference": [1]},
        "column 'reference' cannot be used: it is a list",
    ),
    "a reference that is true": ({"prompt": "a", "reference": True}, "it is true or false"),
    "images that are none": ({"prompt": "a", "images": 3}, "column 'images' cannot be used: image 1 is neither a path"),
    "an image that is null": ({"prompt": "a", "images": [None]}, "image 1 is missing or null"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_sentence_or_is_skipped(write, name):
    row, words = BAD[name]
    path = write(GOOD, row, {"prompt": "good, too"})
    with pytest.raises(UserError, match=f"^{path}, line 2: .*{words}.*(?<!\\.)\\.$"):
        load_prompts(path)
    loaded = load_prompts(path, bad_rows="skip")
    assert len(loaded.prompts) == 2
    assert (loaded.rows, loaded.skipped) == (3, 1)
    assert "line 2" in loaded.first_skipped


PLACED = {
    "one": ({"prompt": "Q", "images": "a.png"}, f"{IMAGE}Q", "a"),
    "a list": ({"prompt": "Q", "images": ["a.png", "b.png"]}, f"{IMAGE}{IMAGE}Q", "ab"),
    "a mapping": ({"prompt": "Q", "images": [{"path": "a.png", "bytes": None}]}, f"{IMAGE}Q", "a"),
    "markers": (
        {"prompt": "Is <image> like <image>?", "images": ["a.png", "b.png"]},
        f"Is {IMAGE} like {IMAGE}?",
        "ab",
    ),
    "an opening marker": ({"prompt": "<image>\nQ", "images": ["a.png"]}, f"{IMAGE}Q", "a"),
    "no images": ({"prompt": "<image> is an HTML tag"}, "<image> is an HTML tag", ""),
    "image parts": ({"prompt": user(text("Is "), image(), text("red?")), "images": ["a.png"]}, f"Is {IMAGE}red?", "a"),
    "image parts as tables store them": (
        {"prompt": user(image(text=None), text("Q", image=None)), "images": ["a.png"]},
        f"{IMAGE}Q",
        "a",
    ),
    "named parts": (
        {"prompt": user(image(image="a.png"), image(path="b.png"), text("Q"))},
        f"{IMAGE}{IMAGE}Q",
        "ab",
    ),
    "OpenAI's parts": (
        {
            "prompt": user(
                text("Q"),
                {"type": "image_url", "image_url": {"url": "DATA"}},
                {"type": "image_url", "image_url": "b.png"},
            )
        },
        f"Q{IMAGE}{IMAGE}",
        "ab",
    ),
    "a part with and a part without an image": (
        {"prompt": user(image(url="b.png"), image(), text("Q")), "images": ["a.png"]},
        f"{IMAGE}{IMAGE}Q",
        "ba",
    ),
    "an object without its picture": ({"prompt": f"a{IMAGE}b"}, "a b", ""),
}


@pytest.mark.parametrize("form", PLACED)
def test_images_stand_where_the_row_says(write, tmp_path, form):
    row, content, names = PLACED[form]
    digests = {}
    for seed, name in enumerate("ab"):
        data = save_image(tmp_path / f"{name}.png", seed=seed).read_bytes()
        digests[hashlib.sha256(data).hexdigest()[:16]] = name
        if name == "a":
            row = json.loads(
                json.dumps(row).replace("DATA", "data:image/png;base64," + base64.b64encode(data).decode())
            )
    [prompt] = load_prompts(write(row)).prompts
    assert prompt.messages == (Message("user", content),)
    assert "".join(digests[image.digest] for image in prompt.images) == names
    assert prompt.location == f"{tmp_path / 'pool.jsonl'}, line 1"
    assert prompt.metadata == {}


def test_images_of_a_chat_without_places_belong_to_the_first_turn_of_the_user(write, tmp_path):
    save_image(tmp_path / "a.png")
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = [{"role": role, "content": content} for role, content in turns]
    [prompt] = load_prompts(write({"prompt": chat, "images": ["a.png"]})).prompts
    assert [m.content for m in prompt.messages] == ["S", f"{IMAGE}a", "b", "c"]


BAD_IMAGES = {
    "too few markers": (
        {"prompt": "<image> Q", "images": ["a.png", "a.png"]},
        r"it has 1 <image> marker\(s\), and the row has 2 image",
    ),
    "too many markers": (
        {"prompt": "<image><image> Q", "images": ["a.png"]},
        r"it has 2 <image> marker\(s\), and the row has 1 image\(s\)",
    ),
    "an image part without an image": (
        {"prompt": user(image(), text("Q"))},
        r"it has 1 image part\(s\) without an image, and the row has 0",
    ),
    "an image without a position": (
        {"prompt": user(image(path="a.png"), text("Q")), "images": ["a.png"]},
        r"its messages name 1 image\(s\), and the row has 1 more without a position",
    ),
    "the model's own image": (
        {"prompt": [{"role": "assistant", "content": [image(path="a.png")]}, {"role": "user", "content": "Q"}]},
        "a message of the assistant holds an image; only the user's can",
    ),
    "a video": ({"prompt": user({"type": "video", "path": "a.mp4"})}, "part 1 of message 1 has the type 'video'"),
    "a part that is a text": ({"prompt": user("Q")}, "part 1 of message 1 is a text, not an object with a type"),
    "an empty address": (
        {"prompt": user({"type": "image_url", "image_url": {}})},
        "part 1 of message 1 has no image_url.url",
    ),
    "no parts": ({"prompt": user()}, "message 1 has no content"),
    "missing": (
        {"prompt": "Q", "images": ["a.png", "none.png"]},
        r"'images' cannot be used: image 2 \(none.png\) is missing",
    ),
    "named and missing": (
        {"prompt": user(image(path="none.png"))},
        r"'prompt' cannot be used: image 1 \(none.png\) is missing",
    ),
    "an address": ({"prompt": "Q", "images": "https://example.org/a.png"}, "image 1 is a web address .* save the file"),
    "torn": ({"prompt": "Q", "images": "torn.png"}, r"image 1 \(torn.png\) is truncated"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_one_sentence_or_its_row_is_skipped(write, tmp_path, name):
    data = save_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[:-60])
    row, words = BAD_IMAGES[name]
    path = write(GOOD, row, GOOD | {"images": "a.png"})
    with pytest.raises(UserError, match=f"^{path}, line 2: .*{words}.*(?<!\\.)\\.$"):
        load_prompts(path)
    loaded = load_prompts(path, bad_rows="skip")
    assert (loaded.rows, loaded.skipped, len(loaded.prompts)) == (3, 1, 2)


def test_the_first_bad_row_is_told_whichever_thread_is_first(write, tmp_path):
    """The first row's image takes long to decode, and the rows after it fail immediately."""
    make_image(3000, 2000).save(tmp_path / "large.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "large.png").read_bytes()[:-60])
    rows = [{"prompt": "Q", "images": "torn.png"}, *({"prompt": "Q", "images": "none.png"} for _ in range(100))]
    with pytest.raises(UserError, match=r"line 1: .*torn.png\) is truncated"):
        load_prompts(write(*rows))
    loaded = load_prompts(write(GOOD, *rows), bad_rows="skip")
    assert loaded.skipped == 101 and "line 2" in str(loaded.first_skipped)


def test_rows_that_share_a_picture_share_its_bytes(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")

    import pyarrow

    data = encode_image(make_image())
    rows = [{"prompt": f"Q{n}", "images": [{"bytes": data, "path": None}]} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    prompts = load_prompts(tmp_path / "p.parquet").prompts
    assert len(prompts) == 3 and len({id(p.images[0].data) for p in prompts}) == 1


def test_a_saved_dataset_with_images_is_read_as_it_was_encoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = save_image(tmp_path / "a.jpg")
    features = datasets.Features({"prompt": datasets.Value("string"), "images": [datasets.Image()]})
    table = datasets.Dataset.from_dict({"prompt": ["Q", "R"], "images": [[str(path)], []]}, features=features)
    table.save_to_disk(tmp_path / "one")
    path.unlink()
    first, second = load_prompts(tmp_path / "one").prompts
    assert open_image(first.images[0]).size == (24, 16) and first.question == f"{IMAGE}Q"
    assert second.images == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "there are no prompts: it has no rows"),
        (b"\n\n", "there are no prompts: it has no rows"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: the file is UTF-16"),
        (b"not json\nat all\n", "line 1: is not valid JSON"),
    ],
)
def test_files_without_prompts(write, content, words):
    with pytest.raises(UserError, match=words):
        load_prompts(write(content))


def test_when_every_row_is_skipped_the_first_says_why(write):
    with pytest.raises(UserError, match=r"none of its 2 rows can be used; .*line 1: .*empty"):
        load_prompts(write({"prompt": ""}, "torn"), bad_rows="skip")


def test_other_files(tmp_path, write):
    for path, words in [
        (tmp_path / "none.jsonl", "no such file"),
        (write("x", name="pool.dat"), "is neither .jsonl nor .json nor .csv .* say what it is by data.format"),
        (write(b"PK\x03\x04", name="pool.xlsx"), "is compressed with zip, which is not read"),
        (write("x", name="pool.parquet"), "cannot be read"),
        (tmp_path, "is a folder, but not one saved by the datasets library"),
    ]:
        with pytest.raises(UserError, match=words):
            load_prompts(path)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")

    import pyarrow

    path = tmp_path / "pool.parquet"
    day = datetime.date(2024, 2, 29)
    chat = [{"role": "user", "content": "chat"}]
    rows = [
        {"prompt": chat, "reference": 3.0, "day": day, "raw": b"\xff"},
        {"prompt": chat * 2, "reference": None, "day": None, "raw": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = load_prompts(path).prompts
    assert (first.question, first.reference, first.metadata["day"]) == ("chat", "3", "2024-02-29")
    json.dumps(first.metadata)
    assert len(second.messages) == 2
    parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(UserError, match=r"pool\.parquet, row 2: column 'prompt' cannot be used: it is missing or null"):
        load_prompts(path)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"pool\.parquet: cannot be read"):
            load_prompts(path)


def test_parquet_text_that_is_not_utf8(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")

    import pyarrow

    column = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet, row 2: cannot be read"):
        load_prompts(tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet", bad_rows="skip").skipped == 1


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "reference": [1, 2]})
    table.save_to_disk(tmp_path / "one")
    assert [prompt.reference for prompt in load_prompts(tmp_path / "one").prompts] == ["1", "2"]
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        load_prompts(tmp_path / "two")
    assert len(load_prompts(tmp_path / "two" / "test").prompts) == 2


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=8),
    st.sampled_from(["", " ", "\0", "\ud800", "user", "system", "assistant", "good"]),
)  # fmt: skip
keys = st.sampled_from(["prompt", "reference", "images", "role", "content", "x", "\ud800", "line\nend"])
cells = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
rows = st.dictionaries(keys, cells, max_size=4) | st.fixed_dictionaries({"prompt": cells, "reference": cells}) | cells


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    """Draw a JSON row of any shape, perhaps truncated, re-encoded, or with stray marks or bytes."""
    text = json.dumps(draw(rows), ensure_ascii=draw(st.booleans()))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-7"]))
    errors = "surrogatepass" if encoding.startswith("utf-8") or encoding == "utf-16" else "replace"
    line = text.encode(encoding, errors)
    if draw(st.booleans()):
        position = draw(st.integers(0, len(line)))
        line = line[:position] + draw(st.binary(max_size=4)) + line[position + draw(st.integers(0, 3)) :]
    return line + draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"", b"\n\n", b"\0\n"]))


def check_any_file(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(lines))
    for bad_rows in ("fail", "skip"):
        try:
            loaded = load_prompts(path, bad_rows=bad_rows)
        except UserError as error:
            message = str(error)
            assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
            message.encode()
            if bad_rows == "fail":
                assert any(part in message for part in ("line ", "there are no prompts", "is compressed with"))
        else:
            assert loaded.rows == len(loaded.prompts) + loaded.duplicates + loaded.skipped
            for prompt in loaded.prompts:
                assert json.loads(json.dumps(prompt.metadata)) == prompt.metadata
                assert prompt.messages[-1].role == "user" and prompt.question.strip()
                prompt.question.encode()


@settings(max_examples=400, deadline=None)
@given(lines=st.lists(damaged_lines(), min_size=1, max_size=5))
def test_no_file_of_rows_ends_in_a_traceback(tmp_path_factory, lines):
    check_any_file(tmp_path_factory.mktemp("any") / "pool.jsonl", lines)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None, derandomize=False)
@given(lines=st.lists(damaged_lines(), min_size=1, max_size=5))
def test_no_file_of_rows_ends_in_a_traceback_ten_thousand_times(tmp_path_factory, lines):
    check_any_file(tmp_path_factory.mktemp("any") / "pool.jsonl", lines)


pools = st.lists(st.integers(0, 10**6), max_size=60, unique=True).map(
    lambda numbers: [Prompt.from_text(f"question {n}") for n in numbers]
)


@given(pool=pools, fraction=st.floats(0, 0.99), seed=st.integers(0, 3), rng=st.randoms())
def test_a_split_parts_the_pool_whatever_its_order(pool, fraction, seed, rng):
    train, held_out = split_pool(pool, fraction, seed)
    assert sorted(p.id for p in train + held_out) == sorted(p.id for p in pool)
    assert exclude_prompts(train, held_out) == train
    assert [p for p in pool if p in train] == train, "the order of the rows is kept"
    if len(pool) > 1 and fraction > 0:
        assert train and held_out
    shuffled = rng.sample(pool, len(pool))
    assert {p.id for p in split_pool(shuffled, fraction, seed)[1]} == {p.id for p in held_out}


def test_a_split_has_the_size_asked_for_and_rows_added_later_move_nothing():
    pool = [Prompt.from_text(f"question {n}") for n in range(4000)]
    _, held_out = split_pool(pool, 0.1)
    assert 320 < len(held_out) < 480  # 400 ± 4 standard deviations
    _, before = split_pool(pool[:2000], 0.1)
    assert set(before) == set(held_out) & set(pool[:2000])
    assert set(before) != set(split_pool(pool[:2000], 0.1, seed=1)[1])
    assert split_pool(pool, 0.0) == (pool, [])


@real_data
@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("instructions_gpt4o.jsonl", Columns(), 300),
        ("competition_math.jsonl", Columns(prompt="problem", reference="solution"), 250),
    ],
)
def test_real_files(name, columns, rows):
    loaded = load_prompts(REAL / name, columns)
    assert loaded.rows == rows == len(loaded.prompts) + loaded.duplicates
    assert all(prompt.reference for prompt in loaded.prompts)
    pool, held_out = split_pool(loaded.prompts, 0.1)
    assert len(pool) + len(held_out) == len(loaded.prompts)
    assert held_out


@real_data
def test_real_answers_match_every_real_prompt():
    from purld.clients.anchors import collect_anchors
    from purld.clients.answer_file import AnswerFileClient
    from purld.config.clients import AnswerFile, FileColumns

    path = REAL / "instructions_gpt4o.jsonl"
    prompts = load_prompts(path).prompts
    client = AnswerFileClient(AnswerFile(kind="file", path=str(path), columns=FileColumns(answer="teacher")))
    collection = collect_anchors(prompts, client)
    rows = {row["prompt"]: row["teacher"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert len(collection.anchors) == len(prompts)
    assert [anchor.text for anchor in collection.anchors] == [rows[prompt.question] for prompt in prompts]

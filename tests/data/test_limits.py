"""Files that never end or expand to more than memory holds are refused in one sentence, in bounded time and memory."""

import gzip
import json
import os

import pytest

from purld.config.schema import Columns
from purld.data import limits, tables
from purld.data.prompts import load_prompts
from purld.errors import UserError
from purld.tasks.registry import load_task


@pytest.fixture
def small_limits(monkeypatch):
    """Lower what is free, so that files of kilobytes meet the limits."""
    monkeypatch.setattr(limits, "_FREE", 20_000)
    monkeypatch.setattr(limits, "MAX_LINE", 50_000)
    monkeypatch.setattr(tables, "_FREE_ROWS", 2000)


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for path in ("/dev/zero", tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl"):
        with pytest.raises(UserError, match=r": is not a regular file; a device or a pipe is not read"):
            load_prompts(path)
        with pytest.raises(UserError, match=r": is not a regular file; "):
            load_prompts(path, format="csv")
    with pytest.raises(UserError, match="is not a regular file"):
        load_task("competition_math", str(tmp_path / "zero.jsonl"))


def test_a_line_without_end_is_refused(tmp_path, small_limits):
    for name in ("a.jsonl", "a.csv", "a.json"):
        with (tmp_path / name).open("wb") as handle:
            handle.truncate(10**12)  # a sparse file of a terabyte
        with pytest.raises(UserError, match=r"has more than [\d,]+ bytes") as caught:
            load_prompts(tmp_path / name, format=name[2:])
        assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"\0", b"\n", b'{"prompt": "a"}\n'])
def test_a_compressed_file_expands_within_limits(tmp_path, small_limits, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content * (400_000 // len(content))))
    with pytest.raises(UserError, match=r"expands to more than 200 times|has more than 50,000 bytes"):
        load_prompts(path, Columns(prompt='{"prompt": "a"}') if "csv" in name else None, "skip")


def test_a_compressed_file_of_plain_text_is_read(tmp_path):
    rows = "".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(3000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert load_prompts(tmp_path / "a.jsonl.gz").rows == 3000


def test_a_table_of_repeated_rows_is_refused(tmp_path, small_limits):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    for texts, words in [
        (["a"] * 20_000, r"has 20,000 rows in [\d,]+ bytes; nearly all of them repeat others\.$"),
        (["x" * 10_000] * 1500, r"expands to more than 200 times its [\d,]+ bytes"),
    ]:
        repeated = pyarrow.array(texts).dictionary_encode()
        pyarrow.parquet.write_table(pyarrow.table({"prompt": repeated}), path, compression="zstd")
        assert path.stat().st_size < 5_000
        with pytest.raises(UserError, match=words):
            load_prompts(path)


def test_a_column_that_expands_when_it_is_decompressed_is_refused(tmp_path, small_limits):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["x" * 8_000_000]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 30_000
    with pytest.raises(UserError, match="expands to more than 200 times"):
        load_prompts(path)

"""How a command that failed ends: the sentence, the status, and the log."""

import errno
import os
import sqlite3
import sys

import pytest

from purld.cli import main
from purld.errors import UserError
from purld.failures import describe_failure, hide_secret


def wrapped(cause):
    try:
        try:
            raise cause
        except type(cause) as inner:
            raise RuntimeError("the library gave up") from inner
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("row 3 is wrong."), "row 3 is wrong."),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/.lock"), "/x/.lock: access is not allowed"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: the disk can only be read"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/" + "n" * 300), "255 bytes"),
        (FileExistsError(errno.EEXIST, "File exists", "/x/run"), "/x/run: is in the way"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"/x/run"), "/x/run: a part of this path is a file"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "the disk failed"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk failed"),
        (RuntimeError("basic_ios::clear: iostream error"), "the disk failed"),
        (sqlite3.OperationalError("disk I/O error"), "the disk failed"),
        (wrapped(OSError(errno.EIO, "Input/output error", "/x/w")), "/x/w: the disk failed (Input/output error)"),
        (FileExistsError(errno.EEXIST, "File exists"), "a file or folder is in the way"),
        (MemoryError(), "the memory is not enough"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory is not enough"),
        (wrapped(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "the memory is not enough (RuntimeError"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "the memory is not enough"),
    ],
)
def test_what_the_user_can_mend_is_a_sentence_with_status_two(error, words, tmp_path):
    sentence, status = describe_failure(error, tmp_path)
    assert status == 2
    assert words in sentence and sentence.endswith(".") and len(sentence) < 400
    assert list(tmp_path.iterdir()) == []


def raised_while_handling(handled):
    try:
        try:
            raise handled
        except OSError:
            return 1 / 0
    except ZeroDivisionError as error:
        return error


def test_an_error_that_code_goes_on_after_explains_none_that_comes_later(tmp_path):
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/cache/x")
    assert describe_failure(raised_while_handling(missing), tmp_path)[1] == 1
    assert describe_failure(wrapped(missing), tmp_path)[0].startswith("/cache/x: is missing")
    full = OSError(errno.ENOSPC, "No space left on device", "/x")
    assert describe_failure(raised_while_handling(full), tmp_path)[0].startswith("/x: the disk is full")


def raised(message):
    try:
        raise ZeroDivisionError(message)
    except ZeroDivisionError as error:
        return error


def test_what_nobody_foresaw_is_a_sentence_with_status_one_and_a_log_without_secrets(tmp_path, monkeypatch):
    hide_secret("from-a-file-1234")
    monkeypatch.setenv("TEACHER_KEY", "from-the-environment")
    monkeypatch.setattr(sys, "argv", ["purld", "run", "c.yaml"])
    text = "from-a-file-1234 from-the-environment Bearer abcdefgh12 sk-abcdefgh12\nsecond line"
    sentence, status = describe_failure(raised(text), tmp_path)
    assert status == 1
    [log] = tmp_path.iterdir()
    assert str(log) in sentence and "\n" not in sentence
    written = log.read_text()
    assert "Traceback" in written and "purld run c.yaml" in written and "second line" in written
    for secret in ("from-a-file", "from-the-environment", "abcdefgh12"):
        assert secret not in written + sentence
    assert log.stat().st_mode & 0o077 == 0


def test_without_a_run_directory_the_log_is_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sentence, _ = describe_failure(raised("x"), tmp_path / "none")
    assert str(tmp_path / "purld-error-") in sentence


def failing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("purld.config.load.load_config", fail)
    monkeypatch.setattr(sys, "argv", ["purld", "run", "c.yaml"])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_command_line_ends_so_and_shows_the_traceback_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert failing(monkeypatch, raised("by zero")) == 1
    said = capsys.readouterr().err
    assert said.startswith("purld: an unexpected error ended this command (ZeroDivisionError: by zero)")
    monkeypatch.setenv("PURLD_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        failing(monkeypatch, raised("by zero"))
    assert failing(monkeypatch, UserError("no.")) == 2


def test_a_library_that_exits_with_a_text_has_failed(monkeypatch, capsys):
    assert failing(monkeypatch, SystemExit("no such device.")) == 1
    assert capsys.readouterr().err == "purld: no such device.\n"
    assert failing(monkeypatch, SystemExit()) == 0


def run_python(code, **environment):
    import subprocess

    values = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    command = [sys.executable, "-c", code, "methods"]
    return subprocess.run(command, env=values | environment, capture_output=True, check=True)


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_an_ascii_locale_stops_neither_output_nor_paths(tmp_path, environment):
    code = (
        "from purld import cli; from pathlib import Path\n"
        "def show():\n"
        f"    print('Ω █'); Path({str(tmp_path)!r}, 'Größe').write_text('ß')\n"
        "cli.app = show\n"
        "cli.main()"
    )
    code = code.encode("ascii", "backslashreplace").decode()
    shown = run_python(code, **environment).stdout.decode().split()
    assert shown == (["Ω", "█"] if "LC_ALL" in environment else ["?", "?"])
    assert (tmp_path / "Größe").read_text() == "ß"

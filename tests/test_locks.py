"""Locks between processes: they die with their process, name their holder, and do not disturb those that look."""

import multiprocessing
import os
import signal
import socket

import pytest

from purld import locks
from purld.locks import describe_holder, is_locked, open_locked, try_lock


def hold(path, ready):
    handle = open_locked(path)
    ready.set()
    signal.pause()
    handle.close()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    context, path = multiprocessing.get_context("fork"), tmp_path / "a.lock"
    ready = context.Event()
    process = context.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(30)
    before = path.read_bytes()
    assert is_locked(path) and open_locked(path, wait=0.05) is None
    assert path.read_bytes() == before, "who fails leaves no trace"
    assert describe_holder(path) == f"another purld process ({process.pid})"
    process.kill()
    process.join()
    assert not is_locked(path)
    with open_locked(path):
        assert describe_holder(path) == f"another purld process ({os.getpid()})" and is_locked(path)
    assert not is_locked(path)


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        ("12 elsewhere\n", "another purld process (12 on elsewhere)"),
        (f"12 {socket.gethostname()}\n", "another purld process (12)"),
        ("", "another purld process"),
        ("no number", "another purld process"),
        ("12 \x1b[2J", "another purld process"),
    ],
)
def test_holders_in_words(tmp_path, text, holder):
    (tmp_path / "a.lock").write_text(text)
    assert describe_holder(tmp_path / "a.lock") == holder
    assert describe_holder(tmp_path / "missing") == "another purld process"


def test_a_folder_is_locked_without_a_file(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert try_lock(first) and not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)
    assert list(tmp_path.iterdir()) == []


def test_those_that_look_do_not_see_each_other(tmp_path):
    path = tmp_path / "a.lock"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_SH)  # another process that looks at this moment
    assert not is_locked(path)
    os.close(descriptor)
    assert not is_locked(tmp_path / "missing")


def test_a_full_disk_does_not_stop_a_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locks.os, "write", full)
    with open_locked(tmp_path / "a.lock") as handle:
        assert handle is not None and open_locked(tmp_path / "a.lock") is None

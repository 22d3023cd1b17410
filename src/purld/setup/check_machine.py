"""Look at the machine: versions of libraries, devices, memory, disk, clock and locale."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import purld
from purld.errors import reason_of
from purld.locks import try_lock
from purld.pipeline.plan_sheet import format_bytes
from purld.runs.files import nearest_folder
from purld.setup.finding import Finding

if TYPE_CHECKING:
    from purld.pipeline.plan_machine import UpdatePlan

_DAY = 86_400
_LITTLE_DISK, _NO_DISK = 20 * 2**30, 2**30  # bytes; an adapter of an 8B model takes gigabytes with its checkpoints
_LITTLE_MEMORY = 4 * 2**30
_CGROUP = Path("/sys/fs/cgroup")


def check_versions() -> Iterator[Finding]:
    """Compare the installed libraries with the ranges that purld was tested with, and Python with the one it needs."""
    from packaging.requirements import Requirement

    try:
        package = metadata.metadata("purld")
        requirements = [Requirement(line) for line in metadata.requires("purld") or []]
    except metadata.PackageNotFoundError:
        yield Finding("warning", "versions", "purld is not installed, so its ranges are not known", "pip install purld")
        return
    yield _check_python(next(iter(package.get_all("Requires-Python") or []), None))
    good = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # an optional one
        found = _installed_version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            good.append(f"{requirement.name} {found}")
        else:
            wanted = f"{requirement.name}{requirement.specifier}"
            text = f"{requirement.name} {found or 'is not installed'}; purld needs {requirement.specifier}"
            yield Finding("wrong", "versions", text, f"pip install '{wanted}'")
    yield Finding("ok", "versions", f"purld {purld.__version__}, {', '.join(good)}")


def _check_python(wanted: str | None) -> Finding:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("wrong", "python", f"Python {version}; purld needs {wanted}", f"use Python {wanted}")
    return Finding("ok", "python", f"Python {version} at {sys.executable}")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_devices() -> Iterator[Finding]:
    """List the GPUs that torch can use, or say why there is none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except Exception as error:  # a damaged installation raises what it likes
        yield Finding("wrong", "devices", f"torch cannot be imported: {reason_of(error)}", "install torch again")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("ok", "devices", f"{name}: {format_bytes(free)} of {format_bytes(total)} are free")
    elif torch.version.cuda is None and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        yield Finding(
            "wrong",
            "devices",
            f"this machine has an NVIDIA driver, and torch {torch.__version__} is built without CUDA",
            "install torch with CUDA: https://pytorch.org/get-started/locally",
        )
    elif torch.version.cuda is not None:
        yield Finding(
            "warning", "devices", f"torch is built for CUDA {torch.version.cuda} and finds no GPU", "see nvidia-smi"
        )
    yield Finding("ok", "devices", f"CPU cores: {cores}, threads of torch: {torch.get_num_threads()}")


def check_memory(training: int | None = None, update: UpdatePlan | None = None) -> Finding:
    """Compare the memory where the student will be with what its training takes.

    Args:
        training: bytes of weights, gradients and optimiser; None if they are not known.
        update: what an update of Stage II needs; None if it is not known, or for a run without Stage II.
    """
    place, free = _free_memory()
    text = f"{format_bytes(free)} of {place} are free"
    if training is None:
        little = free < _LITTLE_MEMORY
        return Finding("warning" if little else "ok", "memory", text, "end other programs" if little else "")
    if training > free:
        text += f", and the student needs {format_bytes(training)} for weights, gradients and optimiser alone"
        return Finding("wrong", "memory", text, "set student.lora, lower student.lora.r, or take a smaller student")
    if update is None:
        return Finding("ok", "memory", f"{text}; the student needs {format_bytes(training)}, and activations on top")
    from purld.training.memory import describe_need, fits

    text += f"; Stage II needs about {describe_need(update.need, format_bytes)}"
    if fits(update.need, free):
        return Finding("ok", "memory", text)
    if (micro_batch := update.largest_fitting(free)) is not None:
        return Finding("warning", "memory", text, f"set align.micro_batch_size={micro_batch}, or end other programs")
    remedy = "set student.lora, or lower align.max_new_tokens or align.prompts_per_step"
    return Finding("wrong", "memory", f"{text}, too much in any micro-batch", remedy)


def _free_memory() -> tuple[str, int]:
    """Return where the student will be, in words, and the free bytes there."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return "GPU memory", int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    try:  # a container may have less than its machine
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return "memory", free


def check_disk(run: Path) -> Iterator[Finding]:
    """Look at the disk where runs go: room, permission, and the locks and syncs that a ledger needs."""
    folder = nearest_folder(run)
    free = shutil.disk_usage(folder).free
    text = f"{format_bytes(free)} are free in {folder}"
    if free < _NO_DISK:
        yield Finding("wrong", "disk", text, "free some space, or give another --run-dir")
    else:
        little = free < _LITTLE_DISK
        remedy = "enough for an adapter; all weights of a large student need more" if little else ""
        yield Finding("warning" if little else "ok", "disk", text, remedy)
    if problem := _durability_problem(folder):
        yield Finding("wrong", "disk", f"{folder}: {problem}", "give a --run-dir on a local disk that can be written")
    else:
        yield Finding("ok", "disk", f"{folder} can be written, locked and synced")


def _durability_problem(folder: Path) -> str | None:
    """Return what keeps a ledger from working in a folder; None if nothing does. What is tried is removed again."""
    try:
        with tempfile.TemporaryDirectory(prefix=".purld-doctor-", dir=folder) as name:
            with (Path(name) / "lock").open("w") as handle:
                try_lock(handle.fileno())
                handle.write("x")
                os.fsync(handle.fileno())
            database = sqlite3.connect(Path(name) / "trial.sqlite")
            try:
                mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                database.execute("CREATE TABLE t (x)")
            finally:
                database.close()
            return None if mode == "wal" else f"SQLite cannot keep a write-ahead log here (mode {mode})"
    except (OSError, sqlite3.Error) as error:
        return f"cannot be used for a run ({reason_of(error)})"


def check_clock(now: float | None = None) -> Finding:
    """Compare the clock with the time at which purld was installed; certificates are judged by the clock."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < Path(str(purld.__file__)).stat().st_mtime - _DAY:
        remedy = "set the clock; certificates of endpoints count as not valid yet"
        return Finding("wrong", "clock", f"{shown} is before purld was installed", remedy)
    return Finding("ok", "clock", shown)


def check_locale() -> Finding:
    """Say which encoding texts and paths have on this terminal."""
    encoding = locale.getpreferredencoding(False)
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:
        named = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "")
        return Finding("warning", "locale", f"{named} is not installed here", "export LC_ALL=C.UTF-8")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    if "utf" not in encoding.lower():
        text = f"texts and paths are {encoding}, which lacks most characters"
        return Finding("warning", "locale", text, "export LC_ALL=C.UTF-8")
    return Finding("ok", "locale", f"texts and paths are {encoding}")

"""The images install what the project pins, from files that the build can see. They are not built here."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions():
    """The instructions of the Dockerfile, each with the stage that it belongs to."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    stage = None
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stage = rest.rpartition(" AS ")[2]
            yield stage, name, rest


def test_there_is_a_stage_for_cpus_and_one_for_gpus_and_every_stage_that_is_used_exists():
    stages = [stage for stage, name, _ in instructions() if name == "FROM"]
    assert {"cpu", "cuda"} <= set(stages)
    for _, name, rest in instructions():
        if name == "FROM":
            assert rest.startswith("python:") or rest.split()[0] in stages
        if found := re.search(r"--from=(\S+)", rest):
            assert found[1] in stages


def copied_files():
    return [
        source
        for _, name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]


@pytest.mark.parametrize("source", copied_files())
def test_what_is_copied_exists_and_is_sent_to_the_builder(source):
    assert (ROOT / source).exists()
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    last = [rule for rule in rules if fnmatch.fnmatch(source, rule.lstrip("!"))][-1]
    assert last.startswith("!")


def test_both_images_install_the_wheel_with_the_pins_and_run_as_nobody_special():
    for wanted in ("cpu", "cuda"):
        lines = [(name, rest) for stage, name, rest in instructions() if stage == wanted]
        installs = [rest for name, rest in lines if name == "RUN" and rest.startswith("pip install")]
        assert all("--constraint /constraints.txt" in rest for rest in installs)
        assert "/wheels/*.whl" in installs[-1]
        assert ("USER", "1000") in lines
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

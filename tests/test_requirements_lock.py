"""requirements.lock: the versions of constraints.txt, each with hashes, for all that is needed but torch."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from version_bounds import read_project

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, str]:
    """Return the versions in a file of requirements by name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^\s;\\]+)", line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_it_holds_what_the_package_needs_in_the_tested_versions():
    locked, tested = pinned("requirements.lock"), pinned("constraints.txt")
    needed = {canonicalize_name(Requirement(line).name) for line in read_project()["dependencies"]}
    assert needed - locked.keys() == {"torch"}
    assert locked == {name: tested.get(name) for name in locked}


def test_every_package_has_hashes_and_no_address_is_named():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(pinned("requirements.lock"))
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").split("\n")
        assert hashes and all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes), first
    assert "://" not in text and "nvidia" not in text

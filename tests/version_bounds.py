"""Print the constraints under which pip installs the lowest releases that pyproject.toml allows, or the newest.

    python tests/version_bounds.py lowest > constraints.txt

The lowest are the lower bounds themselves: if no release satisfies them together, pip fails, and the bounds are wrong.
The newest are what pip takes without a constraint. Dependencies of dependencies are not constrained.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def read_project() -> dict[str, Any]:
    """Return the `project` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    return table


def lower_bounds(project: Mapping[str, Any]) -> dict[str, str]:
    """Return the lower bound of every requirement that has one, extras included."""
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for lines in extras for line in lines)]
    matches = (re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in matches if match}


def main(end: str) -> None:
    """Print the constraints of one end of the ranges."""
    if end == "lowest":
        for name, version in lower_bounds(read_project()).items():
            print(f"{name}=={version}")
    elif end != "newest":
        sys.exit("usage: version_bounds.py lowest|newest")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The wheel holds the package and nothing else, and asks for the ranges that pyproject.toml states."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from version_bounds import PROJECT, lower_bounds, read_project

ROOT = PROJECT.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from a copy of what it needs, so that no build folder stays in the project."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests" / "no_network", folder / "tests")  # must be left out
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_it_holds_every_file_of_the_package_and_no_other(wheel):
    source = ROOT / "src"
    package = {
        path.relative_to(source).as_posix()
        for path in (source / "purld").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package
    assert "purld/py.typed" in package
    assert any(Path(name).parent.name == "assets" for name in package)


def test_its_requirements_are_those_of_the_project(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    project = read_project()
    stated = [Requirement(line) for line in project["dependencies"]]
    for extra, lines in project["optional-dependencies"].items():
        stated += [Requirement(f'{line}; extra == "{extra}"') for line in lines]
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert sorted(map(str, found)) == sorted(map(str, stated))
    assert metadata["Requires-Python"] == project["requires-python"]


def test_every_range_of_the_package_has_both_ends():
    project = read_project()
    lowest = lower_bounds(project)
    for line in [*project["dependencies"], *(project["optional-dependencies"][extra][0] for extra in ("math", "gguf"))]:
        requirement = Requirement(line)
        assert requirement.name in lowest, line
        assert any(part.operator == "<" for part in requirement.specifier), line

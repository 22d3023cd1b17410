"""The wheel holds the package and nothing else, and asks for the ranges that pyproject.toml states."""

import os
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
def source(tmp_path_factory):
    """A copy of what a build needs, so that no build folder stays in the project."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests" / "no_network", folder / "tests")  # must be left out
    return folder


def build_wheel(folder):
    """The wheel that pip builds of a folder of sources."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_file(source):
    return build_wheel(source)


@pytest.fixture(scope="module")
def wheel(wheel_file):
    with zipfile.ZipFile(wheel_file) as archive:
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


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel(source, wheel, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "README.md"} <= {path.name for path in folder.iterdir()}
    with zipfile.ZipFile(build_wheel(folder)) as again:
        assert {name: again.read(name) for name in again.namelist() if not name.endswith("RECORD")} == {
            name: wheel.read(name) for name in wheel.namelist() if not name.endswith("RECORD")
        }


@pytest.mark.slow
def test_the_installed_wheel_runs_on_its_own_data(wheel_file, tmp_path):
    """Students, templates, the page's scripts: a command that needs each works where only the wheel is installed."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([*command, str(wheel_file)], check=True, capture_output=True)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(sys.executable, str(site / "bin" / "purld"), "--version").startswith("purld ")
    assert run(sys.executable, "-c", "import purld; print(purld.__file__)").startswith(str(site))
    settings = [
        "data.max_prompts=16",
        "data.max_eval_prompts=4",
        "sft.epochs=1",
        "align.steps=1",
        "align.candidates=2",
        "align.weak_signal=continue",
    ]
    run(sys.executable, str(site / "bin" / "purld"), "demo", "--run-dir", "run", *settings)
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000

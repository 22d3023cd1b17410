"""docs/extending.md: every example is applied to a copy of the package and run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from forked import ForkedPython

import purld
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(
    r"```python\n# (?P<file>\S+), (?P<how>new file|before: |replace: )(?P<text>.*)\n(?P<code>(?s:.*?))```"
)


def sections():
    """The examples of the page by heading: (file, how, text, code) of each block."""
    page = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: [match.groups() for match in BLOCK.finditer(part)] for part in parts}


def apply(package, file, how, text, code):
    path = package.parent / file
    if how == "new file":
        path.write_text(code)
        return
    text = text.replace(r"\n", "\n")
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{file} holds {text!r} {source.count(text)} times"
    if how == "before: ":
        code += text
    elif not text.endswith("\n"):
        code = code.rstrip("\n")
    path.write_text(source.replace(text, code))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with all examples of the page in it."""
    package = tmp_path_factory.mktemp("extended") / "purld"
    shutil.copytree(Path(purld.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(Path(purld.__file__).parent / "report" / "assets", package / "report" / "assets")
    for blocks in sections().values():
        for block in blocks:
            apply(package, *block)
    return package


COMMAND = """
import sys
from pathlib import Path
folder = sys.argv.pop(1)
for name in [name for name in sys.modules if name.partition(".")[0] == "purld"]:
    del sys.modules[name]
sys.path.insert(0, folder)
import purld.cli
assert Path(purld.cli.__file__).is_relative_to(folder)
purld.cli.main()
"""


def command(extended, said, *arguments):
    """Run the copy's command line; return what it printed."""
    said.unlink(missing_ok=True)
    process = ForkedPython(COMMAND, extended.parent, *arguments, said=said)
    assert process.wait() == 0, said.read_text()
    return said.read_text()


def test_each_extension_touches_two_files_besides_the_configuration_at_most():
    files = {name: {file for file, *_ in blocks} for name, blocks in sections().items()}
    assert {name: len([f for f in touched if "/config/" not in f]) for name, touched in files.items()} == {
        "A method": 1,
        "A scorer": 1,
        "A sampler": 1,
        "A task": 2,
    }


def test_the_method_the_scorer_and_the_sampler_run(extended, tiny_config, tmp_path):
    settings = ["align.method=best_of_k", "align.score=length", "student.engine={kind: longer}", "data.check=none"]
    short = ["sft.epochs=1", "align.steps=2", "evaluate.samples=1"]
    command(extended, tmp_path / "said", "run", tiny_config, *settings, *short, "--run-dir", tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert list(read_json(run.results)["models"]) == ["base", "sft", "best_of_k"]
    assert all("best_length" in row for row in read_rows(run.metrics) if row["stage"] == "align")
    groups = read_rows(run.groups)
    assert all(0 <= score <= 1 for group in groups for score in group["scores"])
    assert {group["anchor_score"] for group in groups} == {1.0}
    # The tiny student's limit is 8 tokens, and it seldom ends by itself.
    assert max(length for group in groups for length in group["lengths"]) > 8


def test_the_task_is_listed_and_read(extended, tiny_config, tmp_path):
    problems = tmp_path / "problems"
    problems.mkdir()
    for split, count in (("train", 6), ("test", 2)):
        rows = [{"question": f"What is {n} + {n} in the {split}ing room?", "answer": str(2 * n)} for n in range(count)]
        (problems / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "word_problems" in command(extended, tmp_path / "said", "tasks")
    data = f"data={{task: word_problems, path: {problems}}}"
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(
            json.dumps({"prompt": f"What is {n} + {n} in the training room?", "answer": "x"}) + "\n" for n in range(6)
        )
    )
    settings = [data, f"teacher={{kind: file, path: {answers}}}", "--run-dir", tmp_path / "r"]
    plan = command(extended, tmp_path / "said", "check", tiny_config, *settings)
    assert "6 for training, 2 held out" in plan

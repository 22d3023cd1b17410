"""The notebook is whole, was executed in order, has small outputs, and its code is that of this version."""

import ast
import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_is_one():
    assert NOTEBOOKS


def test_it_has_the_form_that_readers_expect(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert all(isinstance(line, str) for line in cell["source"])


def test_it_was_executed_in_order_with_small_outputs_and_no_error(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert len(json.dumps(outputs)) < 20_000


def test_its_code_compiles_and_imports_what_exists(notebook):
    for cell in code_cells(notebook):
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("purld"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_its_links_lead_somewhere(notebook):
    for cell in notebook["cells"]:
        for part in "".join(cell["source"]).split("](")[1:] if cell["cell_type"] == "markdown" else []:
            assert (FOLDER / part.split(")")[0].split("#")[0]).resolve().exists()

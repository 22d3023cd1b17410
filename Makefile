# `make demo` and `make test` need Python 3.11 or newer with venv, pip and git; all else they install.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo miniature test test-slow lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Creating .venv ..."; $(PYTHON) -m venv .venv; }
	@echo "Installing purld and what it needs (a few minutes the first time; torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/purld demo

# Hours; what is done is kept in runs/miniature and not done again. `make miniature QUICK=--quick` takes five minutes.
miniature: setup
	@$(BIN)/python benchmarks/miniature.py $(QUICK)

lint: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto

test-slow: setup
	$(BIN)/pytest -m slow

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache

# `make demo` and `make test` need Python 3.11 or newer with venv, pip and git; all else they install.
PYTHON ?= python3
BIN := .venv/bin

# What `make test-lowest` and `make test-newest` run.
TESTS ?= tests

.PHONY: setup demo miniature real docs test test-slow test-lowest test-newest lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Creating .venv ..."; $(PYTHON) -m venv .venv; }
	@echo "Installing purld and what it needs (a few minutes the first time; torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/purld demo

# Hours; what is done is kept in runs/miniature and not done again. `make miniature QUICK=--quick` takes about ten minutes.
miniature: setup
	@$(BIN)/python benchmarks/miniature.py $(QUICK)

# The documentation as a site, in site/; a broken link is an error.
docs: .venv/installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

.venv/installed-docs: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Hours on real students, resumed like the miniature: make real STUDENTS="--student smollm2=DIR" PROBLEMS=FILE TEST=FILE
real: setup
	@$(BIN)/python benchmarks/real.py $(STUDENTS) --problems $(PROBLEMS) --test $(TEST) $(QUICK)

lint: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

# Neighbours share what their module has trained: each worker gets half of the tests in a row, and takes over at the end.
test: lint
	$(BIN)/pytest -n auto --dist worksteal

test-slow: setup
	$(BIN)/pytest -m slow

# The hashes of what a user installs, on Linux with Python 3.11; needs uv. torch is left out, because its builds differ
# by accelerator: an override that never applies takes it out of the resolution.
requirements.lock: pyproject.toml constraints.txt
	echo "torch; python_version < '3'" | uv pip compile pyproject.toml --constraint constraints.txt --overrides /dev/stdin \
	  --generate-hashes --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-emit-index-url --output-file $@

# The lowest and the newest releases that pyproject.toml allows, each in an environment of its own. A newest environment
# is as old as its folder: remove it to try what was released since.
test-lowest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/pytest -n auto --dist worksteal $(TESTS)

.venv-%/installed: pyproject.toml tests/version_bounds.py
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python tests/version_bounds.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-$*/constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf site .venv .venv-lowest .venv-newest runs .pytest_cache .mypy_cache .ruff_cache

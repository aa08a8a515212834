# Every target builds its own .venv on a fresh machine, then works. Needs git, python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-fast lint bench docs clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / - /'

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

install: $(STAMP)  ## build .venv with everything in it

demo: $(STAMP)  ## run the quickstart, serve its bundle, ask it, stop
	$(BIN)/python docs/demo.py

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## the tests that take less than ten seconds each
	$(BIN)/python -m pytest -m 'not slow'

lint: $(STAMP)  ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)  ## the side-by-side measurements
	$(BIN)/python -m benchmarks

docs: $(STAMP)  ## write the generated reference anew
	$(BIN)/python docs/generate.py

clean:  ## remove .venv and caches, not the store
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

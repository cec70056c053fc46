# `make demo` walks the whole road; `make test` runs the whole suite; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint

setup: $(STAMP)

# The versions that the tests ran with; the ranges of pyproject.toml alone where a registry or a Python lacks one of them.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'

$(STAMP): pyproject.toml tests/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint tests/constraints.txt || $(INSTALL)
	@touch $(STAMP)

# DATA=DIR walks the road on a folder of real images, BUDGET=30m bounds each training.
demo: setup
	$(BIN)/python -m pipeline.demo $(if $(DATA),--data '$(DATA)') $(if $(BUDGET),--budget '$(BUDGET)')

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

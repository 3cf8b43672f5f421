# Every target makes .venv when it is missing, from the tested set in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench quality
demo: .venv/installed
	$(BIN)/sae demo --out runs/demo --overwrite

test: .venv/installed
	$(BIN)/pytest -n auto

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/pytest tests/benchmarks --ignore tests/benchmarks/test_bench_quality.py -o addopts= --benchmark-only --benchmark-columns=median,min,rounds

quality: .venv/installed
	$(BIN)/pytest tests/benchmarks/test_bench_quality.py -o addopts= --benchmark-only --benchmark-columns=median,rounds

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

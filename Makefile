# nbgate: everything one does with this tree. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= config.example.toml
FUZZ_S ?= 60

.DEFAULT_GOAL := help
.PHONY: help install run test test-long lint types fuzz bench bench-quick clean

help:
	@echo "make install      Make .venv and install nbgate into it."
	@echo "make run          Start on http://127.0.0.1:8080 with config.example.toml (another: CONFIG=FILE)."
	@echo "make test         Run the linter, the type checker and the tests (under 10 minutes)."
	@echo "make test-long    Run the tests that take minutes each."
	@echo "make lint         Run ruff."
	@echo "make types        Run mypy --strict."
	@echo "make fuzz         Run each fuzz target for FUZZ_S seconds (60)."
	@echo "make bench        Measure CPU per request and per stream beside nginx (about six minutes)."
	@echo "make bench-quick  Measure the main figures in about a minute."
	@echo "make clean        Remove what the tools made; data/ and .venv stay."

# The stamps make a second start quick: pip runs again only when the metadata changed.
$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing; install Python 3.11 or newer (apt install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old; nbgate needs 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment; apt install python3-venv"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: setup.cfg pyproject.toml | $(PY)
	@echo "installing nbgate into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(PY)
	@echo "installing nbgate and its tools into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.base $@

install: $(VENV)/.base

run: $(VENV)/.base
	@exec $(PY) -m nbgate serve -c $(CONFIG)

lint: $(VENV)/.dev
	$(PY) -m ruff check .

types: $(VENV)/.dev
	$(PY) -m mypy --strict nbgate

test: lint types
	$(PY) -m pytest -n 2 -q

test-long: $(VENV)/.dev
	$(PY) -m pytest -q -m long

fuzz: $(VENV)/.dev
	@found=0; for target in tests/fuzz/fuzz_*.py; do \
	  [ -e "$$target" ] || continue; found=1; echo "$$target"; \
	  $(PY) "$$target" -max_total_time=$(FUZZ_S) || exit 1; \
	done; [ $$found = 1 ] || echo "there are no fuzz targets in tests/fuzz"

bench: $(VENV)/.dev
	$(PY) bench/saturate.py

bench-quick: $(VENV)/.dev
	$(PY) bench/saturate.py --quick

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find nbgate tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

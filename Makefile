# nbgate: everything one does with this tree. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= config.example.toml
FUZZ_SECONDS ?= 60

# The hot rooms, as `make compile` builds them with mypyc; the .py files stay the only source.
HOT := $(addprefix server/,wire head waiter cycle splice protocol) \
  call relay deliver judge channels allowance auth body meter sse json_scan outbound exchange upstream_wire upstream \
  pins app routes logs metrics $(addprefix dialects/,model openai_chat)
BUILT := build/compiled
SOURCES := $(shell find nbgate -name '*.py')
# Once compiled rooms are there, they are what runs, and they are kept up to date.
COMPILED := $(if $(wildcard $(BUILT)/.stamp),$(BUILT)/.stamp)
USE_COMPILED := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(BUILT)

.DEFAULT_GOAL := help
.PHONY: help install run compile test test-compiled test-long lint types fuzz bench bench-quick clean

help:
	@echo "make install      Make .venv and install nbgate into it."
	@echo "make run          Start on http://127.0.0.1:8080 with config.example.toml (another: CONFIG=FILE)."
	@echo "make compile      Build the hot rooms to machine code in build/compiled (needs gcc and Python's headers)."
	@echo "make test         Run the linter, the type checker and the tests (under 10 minutes)."
	@echo "make test-compiled  Run the tests of the data plane on the compiled rooms."
	@echo "make test-long    Run the tests that take minutes each."
	@echo "make lint         Run ruff."
	@echo "make types        Run mypy --strict."
	@echo "make fuzz         Run all fuzz targets, FUZZ_SECONDS together (60)."
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

run: $(VENV)/.base $(COMPILED)
	@exec env $(if $(COMPILED),$(USE_COMPILED)) $(PY) -m nbgate serve -c $(CONFIG)

compile: $(BUILT)/.stamp

$(BUILT)/.stamp: $(SOURCES) Makefile | $(VENV)/.dev
	@echo "compiling the hot rooms (about a minute)"
	@rm -rf $(BUILT) && mkdir -p $(BUILT) && cp -r nbgate $(BUILT)/
	@cd $(BUILT) && $(CURDIR)/$(VENV)/bin/mypyc --ignore-missing-imports $(HOT:%=nbgate/%.py) >compile.log 2>&1 \
	  || { tail -n 20 compile.log; echo "compiling failed; it needs gcc and Python's headers (apt install gcc python3-dev)"; exit 1; }
	@rm -rf $(BUILT)/build && touch $@

lint: $(VENV)/.dev
	$(PY) -m ruff check .

types: $(VENV)/.dev
	$(PY) -m mypy --strict nbgate

test: lint types
	$(PY) -m pytest -n 2 -q

test-compiled: $(BUILT)/.stamp
	NBGATE_TEST_TREE=$(CURDIR)/$(BUILT) $(USE_COMPILED):$(CURDIR)/bench $(PY) -m pytest -n 2 -q tests/server tests/sdk tests/test_relay.py tests/test_upstream*.py \
	  tests/test_body.py tests/test_meter.py tests/test_allowance.py tests/test_auth.py tests/test_channels.py tests/test_logs.py tests/test_metrics.py tests/test_overload.py \
	  tests/dialects --deselect tests/test_metrics.py::test_labels_stay_bounded_whatever_clients_send

test-long: $(VENV)/.dev
	$(PY) -m pytest -q -m long

fuzz: $(VENV)/.dev
	$(PY) tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

bench: $(BUILT)/.stamp
	$(PY) bench/saturate.py

bench-quick: $(BUILT)/.stamp
	$(PY) bench/saturate.py --quick

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find nbgate tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

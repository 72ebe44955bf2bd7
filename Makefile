# Each target makes the environment it needs in .venv, once; it is brought up to date when pyproject.toml or
# constraints.txt change. `make test ARGS="tests/quant -k gptq"` passes arguments on to pytest.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(INSTALLED)  ## make the environment (.venv) with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## fetch a real model, quantize it to 4 bits, compare, generate; all in demo/
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/demo.sh

test: $(INSTALLED)  ## run the tests, as many at a time as there are cores
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(INSTALLED)  ## run the linter and the type checker
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove what the demo and the tools left, but not the environment
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# Two commands do everything on a machine that has Python 3.11, make and PyPI:
#   make demo    the whole path on a real model and real data     make test    every test that needs no GPU
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
METHOD ?= dora
# processes that share the tests out
WORKERS ?= 2
# remembers what was installed from which files; a second run needs no network
STAMP := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# make slow: the tests on the real model, once make demo has fetched it
# make test-cpus: the tests of numbers as other CPU models compute
.PHONY: demo test test-cpus slow check format bench tables docs clean

demo: $(STAMP)
	$(BIN)/doralib demo --method $(METHOD)

test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q -m "not slow" --numprocesses $(WORKERS) --dist worksteal

test-cpus: $(STAMP)
	WORKERS=$(WORKERS) PYTEST=$(BIN)/pytest tests/cpus.sh

slow: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/pytest -q -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/doralib bench all --out benchmarks/results
	$(MAKE) tables

# README's and docs/bench.md's figures from the files of the last `make bench`
tables: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from doralib.experiments.bench.readme import update_pages; update_pages(Path('README.md'), Path('docs/bench.md'), Path('benchmarks/results'))"

# the site, in site/index.html; its tools have an environment of their own, which needs no torch
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_STAMP): constraints-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement constraints-docs.txt
	touch $(DOCS_STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt) --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(DOCS_VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

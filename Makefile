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

# make slow: the tests on the real model, once make demo has fetched it
.PHONY: demo test test-cpus slow check format bench clean

demo: $(STAMP)
	$(BIN)/doralib demo --method $(METHOD)

test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q -m "not slow" --numprocesses $(WORKERS) --dist worksteal

# the tests of numbers as other CPU models compute
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
	$(BIN)/python -c "from pathlib import Path; from doralib.bench.readme import update_readme; update_readme(Path('README.md'), Path('benchmarks/results'))"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt) --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

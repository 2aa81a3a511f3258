# make run       makes .venv, installs vramplan, and estimates one run
# make test      installs what tests need, then lint, types and tests
# make lowest    the tests that need no torch, with the oldest versions that pyproject.toml allows
# make bench     what importing vramplan and one estimate cost, as ratios within one run
# make accuracy  writes docs/accuracy.md: predictions against the measured runs
# make pages     writes the other pages of measured runs: examples, step times, choice, attention
# make trace-matrix  writes docs/trace-matrix.md: estimates against traces, families x regimes (hours)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test lint types lowest bench accuracy pages trace-matrix clean
.DEFAULT_GOAL := run

# 1 says "it does not fit", which is an answer and no failure of make.
run: $(VENV)/.installed
	@$(BIN)/vramplan estimate meta-llama/Llama-3.1-8B --gpu 24GB || test $$? -eq 1

test: lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest

bench: $(VENV)/.installed
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

accuracy: $(VENV)/.installed
	$(BIN)/python benchmarks/accuracy.py

pages: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/examples.py
	$(BIN)/python benchmarks/step_time.py --write
	$(BIN)/python benchmarks/choice.py
	$(BIN)/python benchmarks/attention_memory.py

trace-matrix: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/trace_matrix.py $(MATRIX)

clean:
	rm -rf $(VENV) $(VENV)-lowest .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Editable: a change of the source needs no new installation, one of these files does.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --editable .
	@touch $@

# DeepSpeed comes as source, and asks torch for its version while it is built. No op is compiled.
$(VENV)/.installed-dev: $(VENV)/.installed
	@$(INSTALL) torch setuptools wheel
	@test "$$(uname)" != Linux || DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	@$(INSTALL) --editable '.[dev]'
	@touch $@

LOWEST = $(shell sed -n '/^dependencies = /,/^]/s/.*"\([^"]*\)>=\([^";]*\).*/\1==\2/p' pyproject.toml)

$(VENV)-lowest/.installed: pyproject.toml
	@test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	@$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable . pytest hypothesis $(LOWEST)
	@touch $@

# make demo    train a model on drawn birds, take a quarter of its work away, and restore its accuracy
# make test    the tests that take seconds; those of the page of `ulsam explore` in Chromium, if there is one
# make lint    style and types
# make test-slow  the tests that guard rare paths
# make results  whether README.md and docs/ say what the files under results/ say
# make docs    the documentation site in build/site, with warnings as errors
# make bench   the attention layer against a loop over groups and a copy, in 3 minutes
# Either makes .venv on its first run; a later run installs again only if pyproject.toml, constraints.txt or the C kernels changed,
# or if the kernels are not there although there is a compiler now.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# one thread a test worker: two workers with a thread pool each would fight for the cores
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# installed without kernels, and now there is a compiler
ifeq ($(wildcard src/ulsam/layer/ops/kernels.so),)
ifneq ($(shell for one in "$${CC%% *}" cc gcc clang; do command -v "$$one"; done; true),)
AGAIN := again
endif
endif

.PHONY: again demo test test-slow results docs bench lint format wheel-test clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard src/ulsam/layer/ops/*.[ch]) $(AGAIN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ulsam needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1): try 'make PYTHON=python3.12'" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/ulsam demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/ulsam

test: $(INSTALLED)
	$(PYTEST) -m "not slow" --timeout 300

# what failed beside other tests is tried once more by itself: some wait for processes that they start
test-slow: $(INSTALLED)
	$(PYTEST) -m slow || $(BIN)/python -m pytest -m slow --last-failed --last-failed-no-failures none

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(INSTALLED)
	$(BIN)/python benchmarks/tables.py --check

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m doctest scripts/api_docstrings.py
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/network.py --seconds 30
	$(BIN)/python benchmarks/inside.py

wheel-test: $(INSTALLED)
	scripts/wheel_test.sh

clean:
	rm -rf .venv build dist src/ulsam/layer/ops/*.so src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The project's verbs. `make` lists them.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS := constraints.txt
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PLUGIN_FILES := $(wildcard plugins/*/pyproject.toml plugins/*/*.py plugins/*/*/*.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-slow test-faults check fix docs bench clean

help:
	@echo "make demo       teach a micro model a new shape, with the real commands: pictures and a LoRA in demo/"
	@echo "make test       run the tests (12 minutes at most on two cores)"
	@echo "make test-long  run the tests that take longer: test-slow, and test-faults, which searches for new faults"
	@echo "make check      formatting, lint, types, generated docs"
	@echo "make fix        format, fix what lint can, regenerate docs"
	@echo "make docs       regenerate the reference pages"
	@echo "make bench      measure speed and memory (BENCH=--help lists its parts, BENCH=loading measures one)"
	@echo "make setup      only make $(VENV) with everything for development"

# pyproject.toml's classifiers list the versions that were tested. The code is passed in the environment, since shells
# differ in quoting, and must run in any Python 3
define CHECK_PYTHON
import re, sys
with open("pyproject.toml", encoding="utf-8") as file:
    tested = sorted(int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", file.read()))
this = "{}.{}".format(*sys.version_info)
if tuple(sys.version_info[:2]) < (3, tested[0]):
    sys.exit("hyimg needs Python 3.{0} or later, and `$(PYTHON)` is {1}: run `make PYTHON=python3.{2}`, or another that is installed".format(tested[0], this, tested[-1]))
if tuple(sys.version_info[:2]) > (3, tested[-1]):
    print("warning: hyimg was tested with Python 3.{} to 3.{}, and `$(PYTHON)` is {}".format(tested[0], tested[-1], this))
endef
export CHECK_PYTHON

# What each verb needs is installed once, and again when the project's requirements change
$(VENV)/made:
	@$(PYTHON) -c 'import os; exec(os.environ["CHECK_PYTHON"])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/made pyproject.toml $(CONSTRAINTS)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

# The example plugins as a user installs them, again whenever one of their files changes; what builds them is in the extra
$(VENV)/plugins-%: $(VENV)/installed-% $(PLUGIN_FILES)
	$(PIP) install --quiet --no-deps --no-build-isolation --no-index --force-reinstall $(addprefix ./,$(PLUGINS))
	@rm -rf plugins/*/build plugins/*/*.egg-info
	@touch $@

setup: $(VENV)/plugins-dev

demo: $(VENV)/installed
	$(BIN)/hyimg demo demo --overwrite

test: $(VENV)/plugins-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-long: test-slow test-faults

test-slow: $(VENV)/plugins-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long --ignore tests/robustness/test_untrusted_input.py

test-faults: $(VENV)/plugins-test
	$(BIN)/python -m pytest -m long tests/robustness/test_untrusted_input.py  # which runs two processes itself

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/cog --check -r docs/*.md

fix: $(VENV)/installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/cog -r docs/*.md

docs: $(VENV)/installed-dev
	$(BIN)/cog -r docs/*.md

bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf demo bench build *.egg-info plugins/*/build plugins/*/*.egg-info

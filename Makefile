# Each target does all its own set-up: it needs Python 3.11 or newer, a C compiler and make.
#   make run     the example: a handler over a queue of webhook events
#   make test    every test          make bench   the figures, with rivals
#   make chaos   a million messages through consumers that are killed, clocks that jump, networks that fail
#   make soak    a minute of real load, watched and plotted (make soak MINUTES=60)
#   make lint    style and types     make wheel   sdist and wheel in dist/

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check
# What some extras ask for: installing them by name would compile the package once more.
REQUIREMENTS = $(PY) -c 'import sys, tomllib; \
    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
    print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")' $(1)
CORE := $(wildcard queue_runtime/_core/*.pyx queue_runtime/_core/*.pxd queue_runtime/_core/*.h)

.PHONY: run test bench chaos soak lint wheel clean

run: $(VENV)/built
	cd examples && ../$(PY) -m queue_runtime run webhooks:handle --provider memory:// --queue webhooks \
	    --feed webhooks.jsonl --session-key repository.full_name,pull_request.number

test: $(VENV)/built $(VENV)/tools
	$(PY) -m pytest

bench: $(VENV)/built $(VENV)/tools
	$(PY) -m bench $(ONLY)

SEED ?= 1
MESSAGES ?= 1000000
SESSIONS ?= 10000

chaos: $(VENV)/built $(VENV)/tools
	CHAOS_SEED=$(SEED) CHAOS_MESSAGES=$(MESSAGES) CHAOS_SESSIONS=$(SESSIONS) \
	    $(PY) -m pytest tests/test_chaos.py -k many_messages -s -o timeout=3600

MINUTES ?= 1

soak: $(VENV)/built $(VENV)/tools
	$(PY) -m bench.soak --minutes $(MINUTES)

lint: $(VENV)/built $(VENV)/tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: $(VENV)/tools
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

# Only what `make run` needs: a new user waits for no test tools.
$(VENV)/base: pyproject.toml
	@echo "Setting up $(VENV) (once; under a minute with what follows)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@$(call REQUIREMENTS,cli) > $(VENV)/cli.txt
	@$(PIP) --group build -r $(VENV)/cli.txt
	@touch $@

$(VENV)/built: $(VENV)/base setup.py pyproject.toml $(CORE)
	@echo "Compiling the core"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/tools: pyproject.toml | $(VENV)/built
	@echo "Installing the tools for tests and benchmarks"
	@$(call REQUIREMENTS,bench uvloop) > $(VENV)/tools.txt
	@$(PIP) --group test --group package -r $(VENV)/tools.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info queue_runtime/_core/*.c queue_runtime/_core/*.so

# Each target does all its own set-up: it needs Python 3.11 or newer, a C compiler and make.
#   make run     the example: a handler over a queue of webhook events
#   make test    every test          make bench   the figures, with rivals
#   make lint    style and types     make wheel   sdist and wheel in dist/

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORE := $(wildcard queue_runtime/_core/*.pyx queue_runtime/_core/*.pxd queue_runtime/_core/*.h)

.PHONY: run test bench lint wheel clean

run: $(VENV)/built
	cd examples && ../$(PY) -m queue_runtime run webhooks:handle --provider memory:// --queue webhooks \
	    --feed webhooks.jsonl --session-key repository.full_name,pull_request.number

test: $(VENV)/built $(VENV)/tools
	$(PY) -m pytest

bench: $(VENV)/built $(VENV)/tools
	$(PY) -m bench

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
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet --disable-pip-version-check --group build 'click>=8.1' 'rich>=13.7'
	touch $@

$(VENV)/built: $(VENV)/base setup.py pyproject.toml $(CORE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[cli]'
	touch $@

$(VENV)/tools: pyproject.toml | $(VENV)/built
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --group test --group package --editable '.[bench,uvloop]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info queue_runtime/_core/*.c queue_runtime/_core/*.so

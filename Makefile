# What a person types: make demo, make app, make test, make lint, make sass. Each sets up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo app test lint sass clean

demo: $(READY)
	$(BIN)/python -m comfy_sage3 compare --out runs/demo-compare

# The page at http://127.0.0.1:7860; other flags: python gradio_app.py --help.
app: $(READY)
	$(BIN)/python gradio_app.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy comfy_sage3

# Registers, spills and loops of every kernel for every architecture. Needs no GPU: the compiler comes from PyPI.
sass: $(VENV)/.build-ready
	$(BIN)/python -m comfy_sage3 sass

$(VENV)/.build-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build]'
	touch $@

# torch comes first and alone, so that nothing else chooses its version.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo 'error: $(PYTHON) cannot make a virtual environment; install python3-venv and run make again.' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { test -e $(BIN)/pip || rm -rf $(VENV); exit 1; }  # nothing half-made stays behind
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[app,test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info

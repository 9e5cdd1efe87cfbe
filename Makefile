# Two commands: `make demo` and `make test`. Both set up .venv first, if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Data sets that lie beside the checkout are used where there are any; see the README of examples/mnist.
FEDBUS_DATA_DIR ?= $(wildcard ../shared/data)
export FEDBUS_DATA_DIR
# The tests start hundreds of processes that import the same.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint types unit faults bench docs try-compose clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fedbus needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## the whole life of a model, on this machine
	$(BIN)/fedbus demo $(DEMO)

test: lint types unit  ## what CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST)

test-all: $(READY)  ## the slow ones too
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not bench" $(PYTEST)

faults: $(READY)  ## kills and freezes things
	$(BIN)/pytest -m fault $(PYTEST)

bench: $(READY)  ## fedbus beside Flower's own deployment, in one run
	$(BIN)/python -m benchmarks.noop_round $(BENCH)

docs: $(READY)  ## writes the generated pages anew
	$(BIN)/python -m fedbus.app.docs_generator.pages docs

try-compose: $(READY)  ## brings the compose stack up and sends a run through it; needs root and Debian
	PIP=$(BIN)/pip deploy/try-compose $(TRY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

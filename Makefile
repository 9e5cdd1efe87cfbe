# The main commands are `make demo` and `make test`. Both create .venv first, if it does not exist.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COLLECTED := $(VENV)/.collected

# Data sets next to the checkout are used if they exist; see examples/mnist/README.md.
FEDBUS_DATA_DIR ?= $(wildcard ../shared/data)
export FEDBUS_DATA_DIR
# The tests start hundreds of processes that import the same modules; byte code saves time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint types unit faults test-flower bench bench-simulation docs try-compose clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fedbus needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## the whole life of a model, on this machine
	$(BIN)/fedbus demo $(DEMO)

test: lint  ## what CI runs
	$(MAKE) --no-print-directory --jobs 2 types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Writes the byte code of the tests once, before six workers would each do it. An error is for `unit` to show.
$(COLLECTED): $(READY)
	-$(BIN)/pytest --collect-only -q > /dev/null
	touch $@

unit: $(COLLECTED)
	$(BIN)/pytest -n 6 --dist loadfile --no-loadscope-reorder $(PYTEST)

test-all: $(READY)  ## all tests, including the slow ones
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not bench and not differential" $(PYTEST)

faults: $(READY)  ## fault tests: they kill and freeze processes
	$(BIN)/pytest -m fault --ignore tests/simulation/fleet $(PYTEST)
	FLEET_SEEDS=$(or $(FLEET_SEEDS),1000) $(BIN)/pytest -n 2 -m fault tests/simulation/fleet

# Another version of Flower needs other versions of the packages that Flower itself pins: these are not constrained.
FLOWER_PINS := flwr|certifi|uv
FLOWER_VENV := $(if $(VERSION),.venv-flower-$(VERSION),$(VENV))

test-flower: $(FLOWER_VENV)/.ready  ## the tests that depend on Flower; VERSION=1.42.0 installs that version
	$(FLOWER_VENV)/bin/pytest -p no:cacheprovider -m "not bench" tests/learning $(PYTEST)
	$(FLOWER_VENV)/bin/pytest -p no:cacheprovider -m differential tests/differential $(PYTEST)

.venv-flower-$(VERSION)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^($(FLOWER_PINS))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e '.[dev]' 'flwr==$(VERSION)'
	touch $@

bench: $(READY)  ## compare fedbus with Flower's own deployment
	$(BIN)/python -m benchmarks.noop_round $(BENCH)

build/pfl: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ 'pfl>=0.6,<0.7' multiprocess dill \
		dp-accounting prv-accountant dm-tree attrs

bench-simulation: $(READY) build/pfl  ## compare simulated rounds with plain torch, pfl and Flower's own simulation
	$(BIN)/python -m benchmarks.simulation $(BENCH)

docs: $(READY)  ## generate the reference pages
	$(BIN)/python -m fedbus.app.docs_generator.pages docs

try-compose: $(READY)  ## start the compose stack and execute runs in it; needs root and Debian
	PIP=$(BIN)/pip deploy/try-compose $(TRY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

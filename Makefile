# make demo       fresh machine -> environment, tiny Qwen2.5-VL, RL on real handwritten digits, a plot
# make test       the same environment -> the tests; JOBS=4 takes more cores, ARGS goes to pytest
# make test-all   the same environment -> all tests, slow ones included
# make lint       style, and which package may import which (both in pyproject.toml)
# make venv       the environment alone; VLLM=--cuda on a login node without a GPU
# make gpu        the same environment, on a GPU -> GPU-only tests and benchmarks: speed and memory of kernels and updates, the weight sync
PYTHON ?= python3
SEED ?= 0
RUN_DIR ?= runs/demo
JOBS ?= 2
ARGS ?=
VLLM ?=
VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS)

.PHONY: venv demo test test-all gpu lint clean

venv: $(VENV)/.installed

# Install torch first, so that later installs keep this build.
$(VENV)/.installed: setup.py mssr/versions.py constraints.txt mssr/rollout/vllm/install.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"MSSR needs Python 3.11 or newer, this is {v[0]}.{v[1]}; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[train,dev]'
	$(BIN)/python -m mssr.rollout.vllm.install $(VLLM)
	@touch $@

demo: venv
	$(BIN)/python -m examples.digits.demo --seed $(SEED) --run-dir $(RUN_DIR)

test: venv
	$(PYTEST) -m "not slow" $(ARGS)

test-all: venv
	$(PYTEST) $(ARGS)

# The peers are optional: what is not installed is listed as such.
gpu: venv
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -n 3 --dist loadfile --timeout 240 --confcutdir tests/gpu tests/gpu; \
	tests=$$?; TRITON_INTERPRET=0 $(BIN)/python -m bench.gpu && exit $$tests

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

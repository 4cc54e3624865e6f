# make repro · make test · make lint · make docs · make bench · make drill: each makes the environment it needs.
PYTHON ?= python3.11
UV_VERSION := 0.13.8
READY := .venv/.ready
BIN := $(CURDIR)/.venv/bin# quoted where it is used: the path may hold spaces
export PATH := $(BIN):$(PATH)
# Nothing phones home, and nothing waits for a model hub.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1

.PHONY: repro repro-long test lint docs bench drill env lock
repro: env
	python -m pipelines.repro

# The longer budget as a DVC experiment: it changes params.yaml and results/ here; `git checkout . && dvc checkout` goes back.
repro-long: env
	dvc exp run --name long --set-param preset=long
	python -m benchmarks.keep long

test: env
	pytest

lint: env
	ruff check .
	ruff format --check .
	mypy
	mypy tests/typing/misuse.py

# The pages under docs/ as a site; a link that leads nowhere, or a name that is not there, is an error.
docs: env
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir site

bench: env
	python -m benchmarks.preprocess
	python -m benchmarks.train_step
	python -m benchmarks.evaluate
	python -m benchmarks.waiting
	python -m benchmarks.predict

# What training loses when something dies; as root in namespaces of its own. DRILL=--short is what .ci/run does.
drill: env
	python -m benchmarks.drill $(DRILL)

env: $(READY)

# Compiled here, once: where Python may not write bytecode, each process, each worker too, would compile all that it imports.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	"$(BIN)"/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	"$(BIN)"/uv pip sync --quiet --compile-bytecode --system-certs --python "$(BIN)"/python --require-hashes requirements.lock
	"$(BIN)"/uv pip install --quiet --python "$(BIN)"/python --no-deps --no-build-isolation --editable .
	touch $(READY)

lock:
	"$(BIN)"/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra dev pyproject.toml --output-file requirements.lock

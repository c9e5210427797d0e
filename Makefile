# Two commands matter: `make demo` and `make test`. Each works on a fresh machine with Python 3.11 and make.

PYTHON       ?= $(shell command -v python3.11 || command -v python3)
TORCH        ?= torch==2.13.0
AXOLOTL      ?= axolotl==0.19.*
VENV         := .venv
VENV_AXOLOTL := .venv-axolotl
PYTEST       := -m pytest -q -n 2 --dist loadfile

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export AXOLOTL_DO_NOT_TRACK = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

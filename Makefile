# From a checkout to a trained model with `make train`. Needs make, a C++20 compiler and Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= jobs/configs/synthetic.yaml
ARGS ?=

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one environment would get in each other's way

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
# What pip would do on one core. A few files of some packages are templates and no Python: pip passes over them, too.
compile = $(bin)/python -m compileall -qq -j 0 $$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || true
kernels := $(wildcard cuda_ext/*.cpp cuda_ext/*/*.cpp cuda_ext/*/*.cu)
headers := $(wildcard cuda_ext/*.h cuda_ext/*/*.h)

# What pyproject.toml asks for: torch and setuptools come first because the kernels are built against the installed torch.
requirements = $(bin)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb")); print(*($(1)), sep="\n")'
run_needs = project["build-system"]["requires"] + project["project"]["dependencies"]
dev_needs = project["project"]["optional-dependencies"]["dev"]

# The store's tests with its kernels built to stop at the first wrong access, overflow or undefined shift; of one build and one device,
# so without those that compare several. The runtimes come before Python; leaks are not looked for, because the interpreter itself never
# frees what it interns.
sanitized := build/sanitize/lib

.PHONY: help setup train test sanitize lint format ui clean emulation cuda-check

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1\t/'

setup: $(VENV)/.built  ## make .venv, install what is needed, build the kernels

train: $(VENV)/.built $(if $(findstring synthetic,$(CONFIG)),data/synthetic)  ## train on synthetic data; other settings: make train ARGS="budget=64MiB train.workers=4"
	@echo "==> training by $(CONFIG) $(ARGS)"
	@$(bin)/python jobs/train.py --config $(CONFIG) $(ARGS)

test: $(VENV)/.built $(VENV)/.emulated $(VENV)/.dev  ## the whole test suite
	@$(bin)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 20 tests

emulation: $(VENV)/.emulated  ## build the CUDA sources for the CPU, as the tests run them

cuda-check: $(VENV)/.python  ## compile the CUDA sources for GPUs where nvcc is; no GPU is needed, and `make test` runs them emulated
	@$(bin)/python cuda_ext/nvcc.py build/cuda

sanitize: $(VENV)/.dependencies $(VENV)/.dev  ## the store's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@FIITED_RAY_SANITIZE=1 $(bin)/python setup.py -q build --build-base build/sanitize --build-lib $(sanitized)
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(sanitized) \
	  $(bin)/python -P -m pytest -q -n 2 -p no:cacheprovider tests/store \
	    --ignore tests/store/test_builds.py --ignore tests/store/test_devices.py -k "not emulated" --capture=sys

lint: $(VENV)/.built $(VENV)/.dev  ## formatting, lint and types
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/clang-format --dry-run --Werror $(kernels) $(headers)

format: $(VENV)/.dev  ## rewrite the sources in the house style
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .
	@$(bin)/clang-format -i $(kernels) $(headers)

ui: $(VENV)/.built  ## MLflow's pages for the runs in mlflow.db, on http://127.0.0.1:5000
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(bin)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db

clean:  ## remove .venv and what was built; data, runs and mlflow.db stay
	rm -rf $(VENV) build *.egg-info fiited_ray/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

data/synthetic: | $(VENV)/.built
	@echo "==> writing synthetic data to $@"
	@rm -rf $@.part
	@$(bin)/python jobs/prepare.py synthetic --output $@.part
	@mv $@.part $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not that; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dependencies: pyproject.toml requirements.lock | $(VENV)/.python
	@echo "==> installing dependencies: some minutes the first time, for PyTorch and Ray are large"
	@$(call requirements,$(run_needs)) > $(VENV)/requirements.txt
	@sed -e '/--hash=/d' -e 's/ \\$$//' requirements.lock > $(VENV)/constraints.txt
	@$(pip) install --quiet --no-compile --constraint $(VENV)/constraints.txt --requirement $(VENV)/requirements.txt
	@$(compile)
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py $(kernels) $(headers)
	@echo "==> building the kernels: about a minute"
	@$(pip) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.emulated: $(VENV)/.built
	@echo "==> building the CUDA sources for the CPU"
	@FIITED_EMULATION=1 $(bin)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.dev: $(VENV)/.dependencies
	@echo "==> installing test and lint tools"
	@$(call requirements,$(dev_needs)) > $(VENV)/requirements-dev.txt
	@$(pip) install --quiet --constraint $(VENV)/constraints.txt --requirement $(VENV)/requirements-dev.txt
	@touch $@

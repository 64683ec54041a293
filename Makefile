# What to run: make demo, make test. Everything they need (venv, pinned libraries, build) they set up themselves.
PYTHON ?= python3
OUT ?= bench/results
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built
CODE := $(shell find csrc -type f)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format cuda-check gpu full-data build clean

demo: build  ## the main job: train and compare a digit classifier, then time Conv2d against nn.Conv2d
	$(BIN)/dlkernels run basic_classifiers
	$(BIN)/dlkernels bench conv2d --suite quick

test: build  ## every test that needs no GPU and no data files
	$(RUN) -m pytest -m "not data" -n auto --dist worksteal

build: $(BUILT)

$(INSTALLED): constraints.txt pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch  # first, so that the build finds it and downloads no other
	$(RUN) -m pip install -q -c constraints.txt setuptools ninja pybind11
	touch $@

$(BUILT): $(INSTALLED) setup.py tools/build_backend.py $(CODE)
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e '.[experiments,test,dev]'
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CODE)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CODE)

cuda-check: $(INSTALLED)  ## compile every CUDA file; needs nvcc, no GPU
	tools/cuda_check.sh $(abspath $(RUN))

full-data: build  ## the slow checks on real data files, in the folder DLKERNELS_DATA
	@test -n "$$DLKERNELS_DATA" || { echo "make full-data: set DLKERNELS_DATA to the folder with the data files"; exit 1; }
	$(RUN) -m pytest -m data

gpu:  ## build, CUDA tests and tables with PYTHON's own torch (ninja, pybind11, setuptools, pytest); no network
	DLKERNELS_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -q -m cuda -p no:cacheprovider
	mkdir -p $(OUT)
	$(PYTHON) -m dlkernels info
	$(PYTHON) -m dlkernels check
	for op in $$($(PYTHON) -c "from dlkernels.bench.cli import operators; print(*operators())"); do \
	  for dtype in float32 bfloat16; do \
	    $(PYTHON) -m dlkernels bench $$op --suite quick --device cuda --dtype $$dtype \
	      --table $(OUT)/$${op}_quick_$${dtype}_cuda.tsv || exit 1; \
	  done; \
	done

clean:
	rm -rf build dist *.egg-info dlkernels/*.so dlkernels/lib/*.so $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

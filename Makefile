# Everything from a fresh clone with Python >= 3.11 and make:
#   make demo    scan a real pretrained model and draw its sinks
#   make test    every check that CI runs
#
# TORCH says what to install as torch; `make test TORCH=torch==2.13.0` pins it.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch>=2.11,<3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
MODELS := smollm2-135m minilm-l6
export HF_HUB_OFFLINE ?= 1

.PHONY: setup models demo test lint types notebooks-html clean

setup: $(VENV)/.installed

# One stamp file: pip runs again only when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[dev,notebook]"
	touch $@

models: setup
	for model in $(MODELS); do $(BIN)/sinkscope models install $$model || exit 1; done

demo: setup
	$(BIN)/sinkscope models install smollm2-135m
	$(BIN)/sinkscope scan smollm2-135m --texts prose --prompts 16 --length 256 --out out/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

test: models lint types
	$(BIN)/python -m pytest

# Runs the six lessons from fresh kernels, some minutes, and draws them as pages that need no network.
notebooks-html: models
	$(BIN)/jupyter nbconvert --execute --to html --config notebooks/html/nbconvert_config.py \
	  --output-dir out/notebooks notebooks/0*.ipynb

clean:
	rm -rf $(VENV) out

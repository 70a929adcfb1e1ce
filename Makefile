# make demo   all steps on a small scale, on this machine
# make test   lint, types and the whole test suite (CPU)
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SOURCES := tensorlm kernels parallel launcher tests

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON): needs Python 3.11 or newer (make PYTHON=python3.12 ...)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON): has no venv (apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# Only the source distribution contains transformers' own tests of models.
	@mkdir -p .venv/share; cd .venv/share && \
	  ../bin/pip download --quiet --no-deps --no-binary transformers \
	    --constraint ../../constraints.txt transformers && \
	  tar -xzf transformers-*.tar.gz --wildcards '*/tests/*' && rm transformers-*.tar.gz || \
	  echo "note: transformers' own tests were not fetched (test_hf_mixins.py is skipped)" >&2
	@touch $@

.PHONY: demo
demo: .venv/.installed ## prepare, train, resume, evaluate, export, generate on this machine
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launcher/demo.sh

.PHONY: adapt
adapt: .venv/.installed ## adapt a pretrained Llama to each kind of attention, and compare them
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[adapt]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launcher/adapt.sh

.PHONY: install
install: .venv/.installed-dev ## install the project, editable, with everything for development

.PHONY: lint
lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: check
check: lint ## check lint, format and types
	$(BIN)/mypy tensorlm kernels parallel launcher tests

.PHONY: fix
fix: .venv/.installed-dev ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test
test: lint ## lint, types and the whole suite, on the CPU
	@# One worker more than cores: many tests wait for processes that they have started.
	@# The processes that tests start read compiled modules, also where the shell keeps none.
	@# Types are checked meanwhile, on one core; what that finds is printed last.
	@log=$$(mktemp); $(BIN)/mypy $(SOURCES) >"$$log" 2>&1 & types=$$!; \
	  CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest \
	    -m 'not gpu and not multi_gpu and not faults' -n $$(($$(nproc) + 1)) \
	    --dist loadfile --no-loadscope-reorder; tests=$$?; \
	  wait $$types; types=$$?; cat "$$log"; rm "$$log"; exit $$((tests + types))

.PHONY: test-faults
test-faults: .venv/.installed-dev ## run the long tier of fault injection (docs/reliability.md; an hour)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m faults -n auto \
	  tests/reliability tests/slurm tests/train tests/data

.PHONY: test-gpu
test-gpu: .venv/.installed-dev ## run the tests that need a GPU
	@# Compiling kernels takes most of their time.
	$(BIN)/python -m pytest -m gpu -n 8
	$(BIN)/python -m pytest -m multi_gpu

.PHONY: clean
clean: ## remove the files of make demo
	rm -rf runs/demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The newest run that has a checkpoint.
CHECKPOINT ?= $(patsubst %/checkpoints/last.ckpt,%,$(firstword $(shell ls -t runs/*/checkpoints/last.ckpt 2>/dev/null)))
# A file of tests stays in one process: fixtures and the golden account belong to it. Files of few, long tests do not come last.
TOGETHER := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## prepare .venv from requirements.lock, byte-compiled

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"expected Python 3.11, 3.12 or 3.13; got {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@awk '/^[^ #]/ {keep = /^uv==/} keep' requirements.lock > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r $(VENV)/uv.txt
	$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
	@touch $@

train: $(READY) ## train the default model (2 CPU cores: minutes); options: make train ARGS="mode=ict"
	$(BIN)/python src/train.py $(ARGS)

demo: $(READY) ## serve a page for trying a checkpoint: the newest run, or CHECKPOINT=<run or file>
	@test -n "$(CHECKPOINT)" || { echo 'no run in runs/: make train first, or make demo CHECKPOINT=<run or file>'; exit 2; }
	$(BIN)/python src/demo.py "checkpoint=$(CHECKPOINT)" $(ARGS)

dashboard: $(READY) ## make a W&B workspace for the runs of a project: make dashboard ENTITY=<team> PROJECT=<project>
	@test -n "$(ENTITY)" || { echo 'make dashboard ENTITY=<a team or user of W&B> PROJECT=<project>'; exit 2; }
	$(BIN)/python src/dashboard.py "entity=$(ENTITY)" "project=$(or $(PROJECT),consistency)" $(ARGS)

compare: $(READY) ## compare nine modes at equal training time (170 s each; fewer: ARGS="modes=[ect,cd]")
	$(BIN)/python src/compare.py $(ARGS)

test: $(READY) ## run the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not kill" $(TOGETHER) $(ARGS)

test-slow: $(READY) ## run the long tests
	$(BIN)/python -m pytest -m slow $(TOGETHER) $(ARGS)

test-kill: $(READY) ## kill a hundred runs and compare each with one that was never stopped
	$(BIN)/python -m pytest -m kill $(ARGS)

docs: $(READY) ## build the documentation site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'open site/index.html, or with its search: $(BIN)/python -m http.server -d site'

pictures: $(READY) ## draw the pictures of the documentation, of the runs that docs/first-run.md and docs/data.md train
	PYTHONPATH=tests/support $(BIN)/python tests/tools/pictures.py

oracle: $(READY) ## train every mode on a law with exact answers, three times a minute of CPU each (50 minutes), and print the errors
	@PYTHONPATH=tests/support $(BIN)/python tests/tools/oracle.py $(ARGS)

gpu: $(READY) ## run what needs a GPU, tests and benchmarks (8 minutes); says so in one line where there is none
	@PYTHONPATH=tests:tests/support:tests/golden $(BIN)/python tests/tools/gpu.py $(ARGS)

mutations: $(READY) ## plant known mistakes; the tests must notice each
	$(BIN)/python tests/tools/mutations.py $(ARGS)

lint: $(READY) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## pin every dependency anew in requirements.lock
	$(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --all-extras --group dev --quiet -o requirements.lock

# uv reads pins from a script's head; it ends with 2 where it could not look, and with 1 where it found something.
audit: $(READY) ## compare the locked packages with the known advisories, where there is a network
	@{ echo '# /// script'; sed -n 's/^requires-python/# &/p' pyproject.toml; echo '# dependencies = ['; \
	awk '/^[^ #]/ {sub(/ *\\$$/, ""); print "#   \"" $$0 "\","}' requirements.lock; echo '# ]'; echo '# ///'; } > $(VENV)/locked.py
	@$(BIN)/uv audit --preview-features audit --script $(VENV)/locked.py $(ARGS) 2> $(VENV)/audit.txt; status=$$?; \
	if [ $$status -eq 2 ]; then echo "not checked: $$(grep -m1 ^error $(VENV)/audit.txt)"; \
	else cat $(VENV)/audit.txt; exit $$status; fi

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

.PHONY: help setup train demo dashboard compare test test-slow test-kill oracle gpu mutations lint format docs pictures lock audit clean

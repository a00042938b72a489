# Two commands matter on a fresh machine: `make run` and `make test`.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# Two steps, so that `make run` need not wait for the tools of `make test`.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it with PYTHON=python3.12"; exit 2; }
	@echo "Building the environment in $(VENV) (once, less than a minute)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,s3,azure,sandbox]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Adding the tools that check and test (once, less than a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,s3,azure,sandbox,dev]'
	@touch $@

# The last release, as its users have it: its code and its dependencies, for tests of both versions on one Redis.
LAST := .venv-last
LAST_COMMIT := $(shell cat tests/chaos/last_version.txt)
$(LAST)/$(LAST_COMMIT):
	@echo "Building the last version in $(LAST) (once, less than a minute)"
	@rm -rf $(LAST) && $(PYTHON) -m venv $(LAST) && mkdir $(LAST)/source
	@git archive $(LAST_COMMIT) | tar x -C $(LAST)/source
	@$(LAST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LAST)/source/constraints.txt -e '$(LAST)/source[worker]'
	@touch $@

last-version: ## the last release, for the test of an upgrade
	@if git cat-file -e "$(LAST_COMMIT)^{commit}" 2>/dev/null; then $(MAKE) --no-print-directory $(LAST)/$(LAST_COMMIT); \
	else echo "The last version ($(LAST_COMMIT)) is not in this clone, so the test of an upgrade is skipped: git fetch --unshallow"; fi

run: $(VENV)/.ready ## everything on this laptop, with sample images; ONCE=1 ends after the table
	@$(BIN)/python -m sandbox.demo $(if $(ONCE),--once)

OHIF := 3.12.10

.run/ohif/index.html:
	@command -v npm >/dev/null || { echo "npm is needed to fetch OHIF; without it studies open on a page of the sandbox"; exit 2; }
	@echo "Fetching OHIF $(OHIF) (once, 48 MB)"
	@rm -rf .run/ohif .run/fetched && mkdir -p .run/fetched
	@cd .run/fetched && npm pack --silent @ohif/app@$(OHIF) >/dev/null && tar xzf ohif-app-$(OHIF).tgz
	@mv .run/fetched/package/dist .run/ohif && rm -rf .run/fetched

viewer: .run/ohif/index.html ## fetch the OHIF viewer (needs npm); `make run` then opens studies in it

worker: $(VENV)/.ready ## a worker for the servers in PACS_CONFIG
	@$(BIN)/celery -A worker.app worker --loglevel=INFO

flower: $(VENV)/.ready ## Flower on 127.0.0.1:5555; elsewhere only with FLOWER_BASIC_AUTH
	@$(BIN)/python -m worker.flower

check: $(VENV)/.ready-dev ## style, types, import floors, compose file
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

# What is killed and starved is not to be starved by neighbours too: chaos runs alone. It waits for the rest, so that what
# failed stands at the end of the output, where people and CI look.
test: check last-version ## the gate: check and the whole suite
	@$(BIN)/pytest -n 2 --dist loadfile --ignore tests/chaos
	@$(BIN)/pytest tests/chaos

fuzz: $(VENV)/.ready-dev ## broken files, answers, messages and URLs by the thousand
	@$(BIN)/python -m tests.fuzz

chaos: $(VENV)/.ready-dev last-version ## workers, Redis and servers killed, cut and starved; writes docs/guarantees.md
	@$(BIN)/python -m tests.chaos

bench: $(VENV)/.ready-dev ## figures, as ratios within one run
	@$(BIN)/python -m benchmarks.machine
	@$(BIN)/python -m benchmarks.startup
	@$(BIN)/python -m benchmarks.latency
	@$(BIN)/python -m benchmarks.uploads
	@$(BIN)/python -m benchmarks.scaling
	@$(BIN)/python -m benchmarks.drain
	@$(BIN)/python -m benchmarks.bulk
	@$(BIN)/python -m benchmarks.migration

.PHONY: help last-version run viewer worker flower check test fuzz chaos bench

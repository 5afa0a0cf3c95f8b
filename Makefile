# Needs make and Python >= 3.11. Everything else goes into .venv, pinned and checked by hash; pip takes its own
# configuration (index, proxy, certificates) from where it always does.
.DELETE_ON_ERROR:
.PHONY: demo test test-systemd packages lint docs bench bench-guard bench-peers bench-scaling chaos chaos-long
.PHONY: chaos-mutants lock clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install
# --upgrade: a pin moves only in pyproject.toml's bounds, and `make lock` is how it moves.
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" pyproject.toml

demo: .venv/.runtime-installed  ## the whole path on an embedded broker and database
	@$(BIN)/consumerd demo

test: .venv/.dev-installed  ## unit, integration and acceptance tests, on a real Kafka and a real Postgres
	@echo "Running the tests (the first run fetches Kafka, about 50 MB)"
	@$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

test-systemd: .venv/.dev-installed  ## docs/install.md typed in a Debian that is booted for it (root; the first run makes the tree)
	@$(BIN)/python -m pytest tests/systemd

# What tests of the page, the alerts, the units and docker-compose.yml need beside Java and Maven; without one of them its
# tests are skipped. RUNLEVEL=1: no service of theirs is started.
packages:  ## Debian's packages for all of the tests (as root)
	@echo "Installing chromium, debootstrap, docker-compose, prometheus, systemd-container"
	@apt-get update -qq
	@RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
		chromium debootstrap docker-compose prometheus systemd-container >/dev/null

lint: .venv/.dev-installed  ## ruff, mypy, the rules of import
	@echo "Checking with ruff, mypy and import-linter"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

docs: .venv/.dev-installed  ## docs/configuration.md, from the config's own types
	@$(BIN)/python -m tests.reference

bench: .venv/.dev-installed  ## rows/s, next to a raw COPY
	@$(BIN)/python -m tests.bench

# REF=... compares with another commit than the last but one.
bench-guard: .venv/.dev-installed  ## instructions per row of the pure core, next to the commit before (needs valgrind)
	@$(BIN)/python -m tests.bench.guard $(REF)

bench-peers: .venv/.dev-installed  ## rows/s, next to other ways to carry a topic into a table
	@echo "Fetching the peers (the first run takes a few minutes), then measuring for half an hour"
	@$(BIN)/python -m tests.bench.peers

bench-scaling: .venv/.dev-installed  ## the curves: latency, then handlers, processes, partitions, sizes, columns, batches
	@$(BIN)/python -m tests.bench.latency
	@$(BIN)/python -m tests.bench.scaling
	@$(BIN)/python -m tests.bench.plot
	@$(BIN)/python -m tests.bench.report

# SEED=... repeats a run. The same command goes on with a run that was interrupted.
CHAOS = $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --report
chaos: .venv/.dev-installed  ## about 15 minutes of faults, each record compared with what was sent
	@$(CHAOS) build/chaos --segments 3 --seconds 230 --records 500000 --faults 50

chaos-long: .venv/.dev-installed  ## about 90 minutes: 10 million records, 1,000 faults
	@$(CHAOS) build/chaos-long --segments 20 --seconds 215 --records 505000 --faults 52

chaos-mutants: .venv/.dev-installed  ## the daemon broken on purpose, once for each promise; each must be caught
	@$(BIN)/python -m tests.chaos.mutants $(if $(SEED),--seed $(SEED))

lock: .venv/.dev-installed  ## new pins in both requirements files
	@echo "Resolving requirements.txt and requirements-dev.txt"
	@$(COMPILE) --extra demo --extra build --output-file requirements.txt
	@$(COMPILE) --all-extras --constraint requirements.txt --output-file requirements-dev.txt

clean:  ## what make made; the cached Kafka stays
	@echo "Removing .venv and caches"
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find consumerd tests handlers -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.venv/.runtime-installed: requirements.txt pyproject.toml | .venv/bin/python
	@echo "Installing what the demo needs into .venv"
	@$(PIP) --require-hashes -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev-installed: requirements-dev.txt pyproject.toml | .venv/bin/python
	@echo "Installing what tests and lint need into .venv"
	@$(PIP) --require-hashes -r requirements-dev.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/bin/python:
	@for python in python3.13 python3.12 python3.11 python3; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		echo "Making .venv with $$("$$python" --version)"; \
		"$$python" -m venv .venv && exit 0; \
		rm -rf .venv; \
		echo "$$python could not make a virtual environment: install its venv module (Debian: apt-get install python3-venv)." >&2; \
		exit 1; \
	done; \
	echo "consumerd needs Python 3.11 or newer, and found none as python3.13, python3.12, python3.11 or python3: install it (Debian: apt-get install python3 python3-venv)." >&2; \
	exit 1

# `make demo` shows the main job, `make test` runs everything. Both do all the set-up that they need.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo run lint unit servers test bench

help:
	@echo "make demo     the main job on an embedded PostgreSQL, in two minutes"
	@echo "make run      the same on your own database: DATABASE_URL=postgresql://... make run"
	@echo "make test     lint, servers, every test"
	@echo "make unit     the tests that need no server, in under a minute"
	@echo "make lint     ruff, mypy, import rules"
	@echo "make servers  downloads the servers of the tests"
	@echo "make bench    speed, beside its peers: an hour on a quiet machine; BENCH='drain --rounds 1' for a part"
	@echo "make setup    the Python environment in $(VENV)"

setup: $(INSTALLED)

# Made anew when dependencies, entry points or the compiled part change. pip knows dependency groups since 25.1.
$(INSTALLED): pyproject.toml setup.py $(wildcard src/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[demo]' --group dev
	@touch $@

demo: setup
	$(BIN)/spillway demo

run: setup
	@if [ -z "$$DATABASE_URL" ]; then \
		echo "set DATABASE_URL, for example DATABASE_URL=postgresql://user:password@host/database make run" >&2; exit 2; \
	fi
	$(BIN)/spillway run examples/own-database.yml

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(BIN)/pytest tests/unit

servers: setup
	scripts/servers install

# One run for all; conftest.py puts those without servers first.
test: lint servers
	$(BIN)/pytest --durations=25 --durations-min=1

# The peers come with it: Debezium's jars and pgsync (300 MB), and pg_recvlogical if Debian's is not there.
bench: servers
	$(BIN)/python -m pip install --quiet --group bench
	scripts/servers install bench
	$(BIN)/python bench/speed $(or $(BENCH),--full)

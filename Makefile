# Every recipe delegates to a script or to the `regreen` command. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export REGREEN_HOME ?= $(CURDIR)/build/home
# Without byte code every process compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
STAMP := .venv/.regreen-setup
PYTEST_ARGS ?=

.PHONY: help setup demo study up down up-docker down-docker images status logs test test-fast check fmt bench bench-sandbox bench-dataset bench-rl bench-load dashboards observe chart soak soak-queue soak-train soak-load fuzz mutate proto proto-check clean ranks

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s '|'

setup: $(STAMP) ## Install everything into .venv
$(STAMP): $(wildcard requirements/*.txt) pyproject.toml infra/scripts/setup.sh
	@infra/scripts/setup.sh

demo: $(STAMP) ## Run the whole loop on real broken builds and write a report (QUICK=1: shorter)
	@$(BIN)/regreen demo $(if $(filter-out 0 no false,$(QUICK)),--quick)

SEEDS ?= 1,2,3
study: $(STAMP) ## Train and measure with three seeds on held-out tasks; hours, resumable; writes docs/results (SEEDS=1,2,3)
	@$(BIN)/regreen study --seeds $(SEEDS) --out docs/results

up: $(STAMP) ## Start the local stack; it stays up (TLS=1, TOKENS=1: callers show certificates, tokens)
	@$(BIN)/regreen up $(if $(TLS),--tls) $(if $(TOKENS),--tokens)

down: $(STAMP) ## Stop the local stack
	@$(BIN)/regreen down

up-docker: $(STAMP) ## Start Postgres, all services and Prometheus in containers (GPU=1 MODEL=DIR: SGLang too; PORTS=any)
	@GPU="$(GPU)" MODEL="$(MODEL)" PORTS="$(PORTS)" infra/scripts/compose.sh up

down-docker: $(STAMP) ## Stop the containers; their volumes stay (WIPE=1: go too)
	@infra/scripts/compose.sh down $(if $(WIPE),--volumes)

images: $(STAMP) ## Build the services' images from a wheelhouse (BASE_IMAGE, BUILD_ARGS, NAMES="dataset judge")
	@infra/scripts/images.sh $(NAMES)

status: $(STAMP) ## Show the local stack
	@$(BIN)/regreen status

logs: $(STAMP) ## Print the ends of the services' logs
	@$(BIN)/regreen logs

test: $(STAMP) ## Run every test, fast ones first
	@infra/scripts/test.sh $(PYTEST_ARGS)

test-fast: $(STAMP) ## Run the unit tests
	@$(BIN)/pytest tests/unit $(PYTEST_ARGS)

check: $(STAMP) proto-check ## Format, lint, types, import rules, proto drift and breaking changes
	@infra/scripts/check.sh

dashboards: $(STAMP) ## Write the Grafana dashboards and the chart's copy of the alerts from infra/observability
	@$(BIN)/python infra/observability/generate.py

observe: $(STAMP) ## Ask a real Prometheus over a stack that trains for every panel and alert (needs the program `prometheus`)
	@$(BIN)/python -m tests.load.observe || [ $$? = 77 ]

chart: $(STAMP) ## Render the Helm chart and its overlays; check them by API and CRD schemas and by policy
	@infra/scripts/chart.sh || [ $$? = 77 ]

fmt: $(STAMP) ## Format code and protos
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/buf format -w proto

bench: $(STAMP) ## Measure against named peers; tables here, JSON under build/bench
	@$(BIN)/regreen bench

bench-sandbox: $(STAMP) ## Measure the sandbox service: against the kernel, Docker, cold validations, pytest; and every task
	@$(BIN)/regreen bench sandbox sandbox-service sandbox-warm sandbox-failures sandbox-prepare sandbox-tasks

bench-dataset: $(STAMP) ## Measure the dataset service: the queue against bare Postgres, a million trajectories
	@$(BIN)/regreen bench dataset-queue dataset-store

bench-rl: $(STAMP) ## Measure whole GRPO steps against TRL's trainer, and how they grow; about 40 minutes
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements/peer.txt
	@$(BIN)/regreen bench rl

bench-load: $(STAMP) ## Measure the whole stack under 1 to 1,000 scripted episodes at a time, and a few that build; about 10 minutes
	@$(BIN)/regreen bench load --builds real

soak: $(STAMP) ## Run 10,000 sandboxes under random operations and kill -9; nothing may be left or lost
	@.venv/bin/python -m tests.load.soak

soak-queue: $(STAMP) ## Commit 20,000 rollouts from 200 workers under kill -9 and restarts of Postgres, each exactly once
	@.venv/bin/python -m tests.load.queue

soak-train: $(STAMP) ## Train twice while any process is killed at random, KILLS=50 times each; no group lost or used twice
	@.venv/bin/python -m tests.load.train --kills $(or $(KILLS),50) --seed $(or $(SEED),1)

ranks: $(STAMP) ## Train on two hosts (network namespaces) while ranks, a machine and the network are lost; equal losses
	@.venv/bin/python -m tests.load.ranks || [ $$? = 77 ]

soak-load: $(STAMP) ## Run 24 episodes at a time for MINUTES=30 while any process is killed at random; none lost or doubled, memory flat
	@.venv/bin/python -m tests.load.episodes --minutes $(or $(MINUTES),30) --seed $(or $(SEED),1) $(if $(SPARE),--spare $(SPARE))

fuzz: $(STAMP) ## Send 100,000 random and mutated requests to the sandbox service
	@.venv/bin/python -m tests.load.fuzz

mutate: $(STAMP) ## Change every line of the learning maths; its tests must fail for at least 90 % of the changes
	@.venv/bin/python -m tests.load.mutate

proto: $(STAMP) ## Regenerate the stubs from proto/
	@infra/scripts/proto.sh

proto-check: $(STAMP) ## Lint contracts, find drift of the stubs and breaking changes
	@infra/scripts/proto_check.sh

clean: ## Remove everything that was built or downloaded here
	@[ ! -x $(BIN)/regreen ] || $(BIN)/regreen down
	@rm -rf .venv build sandbox_svc/backends/spawner/built .mypy_cache .ruff_cache .pytest_cache

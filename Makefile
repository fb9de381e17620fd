# Everything starts here; the virtual environment makes itself.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/demo.yaml
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch

.PHONY: help demo test test-fast lint format prepare train baselines generate evaluate report all sweep status plan push backbone bench bench-gpu rehearsal clean

help: ## list the targets
	@echo "make TARGET [CONFIG=configs/demo.yaml] [ARGS='--force KEY=VALUE ...']"
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / { \
		if (length($$1) < 12) printf "  %-12s%s\n", $$1, $$2; \
		else printf "  %s\n  %12s%s\n", $$1, "", $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV); the first time, this takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY) ## the whole pipeline on real MRI slices, no GPU, minutes
	$(BIN)/python -m pipeline run --config configs/demo.yaml $(ARGS)

test: $(READY) ## all tests (CPU, minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(READY) ## the quick tests, for between edits (under 90 s)
	$(BIN)/python -m pytest -n 2 --dist loadfile --fast $(ARGS)

lint: $(READY) ## ruff, types, import rules, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell pipeline data_prep train_controlnet train_baselines train_backbone models generate evaluate configs tests benchmarks docs README.md CHANGELOG.md

format: $(READY) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

prepare train baselines generate evaluate report: $(READY) ## one stage of CONFIG
	$(BIN)/python -m pipeline run --config $(CONFIG) --from $@ --to $@ $(ARGS)

all: $(READY) ## all stages
	$(BIN)/python -m pipeline run --config $(CONFIG) $(ARGS)

sweep: $(READY) ## compare generators, or the variants of CONFIG, in one table
	$(BIN)/python -m pipeline sweep --config $(if $(filter command line,$(origin CONFIG)),$(CONFIG),configs/experiments/generators.yaml) $(ARGS)

status: $(READY) ## what is done, stale or missing
	$(BIN)/python -m pipeline status --config $(CONFIG) $(ARGS)

plan: $(READY) ## does CONFIG fit a GPU of 24, 16, 12 GB
	$(BIN)/python -m train_controlnet plan --config $(CONFIG) $(ARGS)

push: $(READY) ## upload the trained weights to the Hub, private; ARGS=--dry-run only lists them
	$(BIN)/python -m pipeline push --config $(CONFIG) $(ARGS)

backbone: $(READY) ## train assets/nano-sd anew (hours on two cores)
	$(BIN)/python -m data_prep --config configs/backbone_mni152.yaml
	$(BIN)/python -m data_prep --config configs/backbone_phantom.yaml
	$(LAUNCH) -m train_backbone --config configs/backbone.yaml $(ARGS)

bench: $(READY) ## the measured comparisons
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.caching
	$(BIN)/python -m benchmarks.data_prep

bench-gpu: $(READY) ## what only a GPU can show, minutes; ARGS="--reference FILE --packages FOLDER"
	$(BIN)/python -m benchmarks.gpu --out runs/bench-gpu $(ARGS)

rehearsal: $(READY) ## the configurations for 24 GB at full size, without a GPU and with random weights; resumable
	$(BIN)/python -m benchmarks.rehearsal runs/rehearsal $(ARGS)

clean: ## delete the demo's run
	rm -rf runs/demo

# Everything starts here; the virtual environment makes itself.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/demo.yaml
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch

.PHONY: help demo test lint format prepare train baselines generate evaluate report all sweep status plan push backbone bench clean

help: ## list the targets
	@grep -hE '^[a-z ]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 44

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY) ## the whole pipeline on real MRI slices, no GPU, minutes: runs/demo/report.html
	$(BIN)/python -m pipeline run --config configs/demo.yaml $(ARGS)

test: $(READY) ## all tests (CPU, minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY) ## ruff, types, import rules, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell pipeline data_prep train_controlnet train_baselines generate evaluate configs tests benchmarks docs README.md CHANGELOG.md

format: $(READY) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

prepare train baselines generate evaluate report: $(READY) ## one stage of CONFIG
	$(BIN)/python -m pipeline run --config $(CONFIG) --from $@ --to $@ $(ARGS)

all: $(READY) ## all stages
	$(BIN)/python -m pipeline run --config $(CONFIG) $(ARGS)

sweep: $(READY) ## every generator family, or every variant of CONFIG, in one table
	$(BIN)/python -m pipeline sweep --config $(if $(filter command line,$(origin CONFIG)),$(CONFIG),configs/experiments/generators.yaml) $(ARGS)

status: $(READY) ## what is done, stale or missing
	$(BIN)/python -m pipeline status --config $(CONFIG) $(ARGS)

plan: $(READY) ## does CONFIG fit a GPU of 24, 16, 12 GB
	$(BIN)/python -m train_controlnet plan --config $(CONFIG) $(ARGS)

push: $(READY) ## the trained weights of CONFIG to the Hugging Face Hub, private; ARGS=--dry-run shows what would go
	$(BIN)/python -m pipeline push --config $(CONFIG) $(ARGS)

backbone: $(READY) ## train assets/nano-sd anew (hours on two cores)
	$(BIN)/python -m data_prep --config configs/backbone_mni152.yaml
	$(BIN)/python -m data_prep --config configs/backbone_phantom.yaml
	$(LAUNCH) -m train_backbone --config configs/backbone.yaml $(ARGS)

bench: $(READY) ## the measured comparisons
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.caching
	$(BIN)/python -m benchmarks.data_prep

clean: ## delete the demo's run
	rm -rf runs/demo

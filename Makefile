# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv and demo/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-vision test lint format bench clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c "import torch, torchvision, timm, transformers"
	touch $@

demo: $(VENV)/.ready ## prune all-MiniLM-L6-v2 to 0.7 and 0.5 of its MACs and print what that does
	$(BIN)/python benchmarks/demo.py

DATA ?= cifar10
demo-vision: $(VENV)/.ready ## prune the zoo's CIFAR-10 ViT; DATA=FOLDER holds CIFAR-10, or names it on the hub
	$(BIN)/python benchmarks/demo_vision.py --data $(DATA)

test: $(VENV)/.ready ## the test suite; needs no hub and no data
	$(BIN)/python -m pytest -n logical --maxprocesses 8

lint: $(VENV)/.ready ## format and static checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready ## the numbers of benchmarks/RESULTS.md; needs ../shared
	$(BIN)/python benchmarks/main_job.py

clean:
	rm -rf $(VENV) demo

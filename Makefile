# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv and demo/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what is imported is compiled then: compiling all of torch and transformers takes longer than all that tests import
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
TEST := -m pytest -n logical --maxprocesses 8
# the newest torch and torchvision that are tested together; `make lock` resolves everything else around them
LOCKED := torch==2.14.1 torchvision==0.29.1

# an environment that forbids bytecode would have every process compile the libraries again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-vision test test-fast test-all test-oldest test-latest lint format versions bench docs docs-pages tutorial \
	lock dist clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt pip
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c "import torch, torchvision, timm, transformers"
	touch $@

demo: $(VENV)/.ready ## prune all-MiniLM-L6-v2 to 0.7 and 0.5 of its MACs and print what that does
	$(BIN)/python benchmarks/demo.py

DATA ?= cifar10
demo-vision: $(VENV)/.ready ## prune the zoo's CIFAR-10 ViT; DATA=FOLDER holds CIFAR-10, or names it on the hub
	$(BIN)/python benchmarks/demo_vision.py --data $(DATA)

test: $(VENV)/.ready ## the test suite; needs no hub and no data
	$(BIN)/python $(TEST)

test-fast: $(VENV)/.ready ## about a minute: what opens no model and starts no process
	$(BIN)/python $(TEST) -m fast

test-all: export OPTIN_EXAMPLES := all
test-all: $(VENV)/.ready ## the slow tests, too: more examples of what the others check, real models and data
	$(BIN)/python $(TEST) -m ""

test-oldest: ## the tests with the oldest version of everything that pyproject.toml admits
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/pins.py floors > .venv-oldest/floors.txt
	.venv-oldest/bin/python $(PIP) --constraint .venv-oldest/floors.txt --editable '.[demo,test]'
	.venv-oldest/bin/python .ci/pins.py versions
	.venv-oldest/bin/python $(TEST)

test-latest: ## the tests with the newest version of everything
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[demo,test]'
	.venv-latest/bin/python .ci/pins.py versions
	.venv-latest/bin/python $(TEST)

lock: ## make constraints.txt anew: the set that `make demo` and `make test` install
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) --upgrade pip
	.venv-lock/bin/python $(PIP) --dry-run --ignore-installed --report .venv-lock/report.json pip $(LOCKED) --editable '.[dev]'
	.venv-lock/bin/python .ci/pins.py lock < .venv-lock/report.json > constraints.txt
	rm -rf .venv-lock

dist: $(VENV)/.ready ## build sdist and wheel, and run the wheel's commands from an empty venv
	rm -rf dist .venv-dist
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python $(PIP) --constraint constraints.txt "$$(ls dist/*.whl)[demo]"
	cd dist && ../.venv-dist/bin/python -W error -c "import optin_cli"
	cd dist && ../.venv-dist/bin/optin --help > help.txt && ../.venv-dist/bin/optin families > families.txt
	cd dist && ../.venv-dist/bin/optin prune demo:minilm --data builtin:prose --flops 0.6 -o m-60/
	cd dist && ../.venv-dist/bin/optin eval m-60/ --baseline demo:minilm --data builtin:prose

lint: $(VENV)/.ready ## format and static checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

versions: $(VENV)/.ready ## what the tests run with
	$(BIN)/python .ci/pins.py versions

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready ## the numbers of benchmarks/RESULTS.md; needs ../shared
	$(BIN)/python benchmarks/main_job.py

docs-pages: $(VENV)/.ready ## write the generated parts of docs/ from the code
	$(BIN)/python docs/cli_page.py
	$(BIN)/python docs/field_tables.py

docs: docs-pages ## build the site into site/; fails on a broken link
	$(BIN)/mkdocs build --strict --quiet

tutorial: $(VENV)/.ready ## run docs/tutorial.ipynb and keep what it shows
	$(BIN)/python docs/notebooks.py docs/tutorial.ipynb

clean:
	rm -rf $(VENV) .venv-oldest .venv-latest .venv-dist demo dist site

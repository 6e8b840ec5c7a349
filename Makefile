# Two commands: `make demo` and `make test`. Both create .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A second `make demo` goes on with, or shows, the run in this folder; `make demo DEMO_DIR=runs/another` begins a new one.
DEMO_DIR ?= runs/demo
STAMP := $(VENV)/.installed

.PHONY: demo test lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("worldmpc needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,hockey]"
	touch $@

demo: $(STAMP)
	$(BIN)/worldmpc train preset=cpu task=dmc/cartpole-swingup steps=60000 train.until_return=750 optim.lr=1e-3 eval_freq=5000 eval.episodes=3 run_dir=$(DEMO_DIR) resume=auto

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m worldmpc.report.tables --check README.md docs/tdmpc2.md docs/performance.md docs/results.md docs/planners.md docs/variants.md docs/director.md docs/hockey.md docs/two_players.md
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info

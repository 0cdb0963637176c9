# make lab    set up on first use, then open JupyterLab on the first notebook   (LAB_ARGS="--no-browser --port=8899")
# make test   set up on first use, then run every test                         (PYTEST_ARGS="-k parity")
# make lint   set up on first use, then check style and layering
#
# Set-up takes minutes once and nothing after that; it is repeated when pyproject.toml or constraints.txt change.
# pip's own variables pass through. On Linux without a GPU, this one saves about 2 GB of CUDA libraries:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq

.PHONY: lab test lint

lab: .venv/.ready
	$(BIN)/gemmascope lab -- $(LAB_ARGS)

test: .venv/.ready .venv/.browser
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gemmascope needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@echo "Setting up .venv (once): 1/3 virtual environment"
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) --upgrade pip
	@echo "Setting up .venv (once): 2/3 PyTorch"
	@$(PIP_INSTALL) -c constraints.txt torch
	@echo "Setting up .venv (once): 3/3 gemmascope and everything else"
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

# The browser tests drive the system's Chromium. Where it is missing and cannot be installed, they skip and say why.
.venv/.browser: .venv/.ready
	@if ! { command -v chromium || command -v chromium-browser; } >/dev/null \
	    && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "Installing Chromium for the browser tests (once)"; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null || \
		echo "Chromium could not be installed: the browser tests will skip."; \
	fi
	@touch $@

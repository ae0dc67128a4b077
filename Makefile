# Two commands do all set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP_VENV ?= .venv-interop
INTEROP := $(INTEROP_VENV)/.installed

.PHONY: demo test interop lint format bench gpu clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/quantkit convert -r recipes/demo.yaml -o out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

interop: $(INTEROP)
	$(INTEROP_VENV)/bin/python -m pytest -m interop tests/interop

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

# The engines that read what quantkit writes: larger, and parts are compiled. They have a venv of their
# own, because gptqmodel pins an older numpy than the one that `make test` uses. llama.cpp is compiled, which
# takes ten minutes; without what is special to this processor, so that the same wheel runs anywhere.
$(INTEROP): pyproject.toml constraints.txt
	test -x $(INTEROP_VENV)/bin/python || $(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(INTEROP_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,compressed-tensors,gptq,awq,bitsandbytes,hqq,gguf]' \
		'auto-round>=0.16,<0.17'
	CMAKE_ARGS=-DGGML_NATIVE=OFF CMAKE_BUILD_PARALLEL_LEVEL=2 \
		$(INTEROP_VENV)/bin/python -m pip install --quiet -c constraints.txt llama-cpp-python
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP_VENV) out .pytest_cache .mypy_cache .ruff_cache

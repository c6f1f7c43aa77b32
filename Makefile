# `make demo` and `make test` set everything up by themselves, into .venv.
#
#   PYTHON=python3.12 make test     another Python
#   TORCH=torch==2.11.0 make test   another torch; any arguments of pip install (after `make clean`)
#   MNIST=folder make bench         the quality benchmark too, on the idx files of that folder
#   PYTHON=python3 make gpu         GPU tests and benchmarks, in a Python that has a CUDA torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
RESULTS := benchmarks/results

.PHONY: demo test lint bench gpu clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --slow sample

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.mlp --out $(RESULTS)
	$(BIN)/python -m benchmarks.gpt_block --out $(RESULTS)
	$(BIN)/python -m benchmarks.lstm --out $(RESULTS)
	$(BIN)/python -m benchmarks.dropconnect --out $(RESULTS)
	$(BIN)/python -m benchmarks.saves --out $(RESULTS)
	$(if $(MNIST),$(BIN)/python -m benchmarks.quality --out $(RESULTS) --mnist $(MNIST))
	$(if $(MNIST),$(BIN)/python -m benchmarks.quality_saves --out $(RESULTS) --mnist $(MNIST))

# The metadata under src/ is what lets torch find the backend by name with nothing installed.
gpu: export PYTHONPATH := src
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'this torch sees no CUDA device'"
	$(PYTHON) -c "import setuptools; setuptools.setup()" -q egg_info
	$(PYTHON) -m pytest -m cuda || [ $$? -eq 5 ]  # 5: there are no such tests
	$(PYTHON) -m benchmarks.mlp --device cuda --out $(RESULTS)
	$(PYTHON) -m benchmarks.gpt_block --device cuda --out $(RESULTS)
	$(PYTHON) -m benchmarks.saves --device cuda --out $(RESULTS)
	$(PYTHON) -m benchmarks.lstm --device cuda --out $(RESULTS)
	$(PYTHON) -m benchmarks.dropconnect --device cuda --out $(RESULTS)

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch first and alone: what the second install asks for then holds already, so it keeps this one.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

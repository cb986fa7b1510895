# make demo, make test: each sets up what it needs in .venv and runs. Nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench bench-quick clean

demo: $(VENV)/ready-demo
	$(BIN)/llama4-convert demo demo-out

test: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(VENV)/ready-test
	$(BIN)/python benchmarks/convert.py

# Does the benchmark still run? Its figures at this size mean nothing.
bench-quick: $(VENV)/ready-test
	$(BIN)/python benchmarks/convert.py --layers 1 --experts 2 --vocab 4096 --pairs 1
	$(BIN)/python benchmarks/convert.py --layers 1 --experts 2 --vocab 4096 --pairs 1 --recipe int4

clean:
	rm -rf $(VENV) demo-out build *.egg-info

$(VENV)/ready-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[transformers]'
	touch $@

# Meta's code without its dependencies (it asks for more than it uses). torchvision goes beside the environment, not into
# it: its operators may not fit the installed torch, and Transformers imports whatever torchvision it finds.
$(VENV)/ready-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llama-models fairscale
	$(PIP) --no-deps --target $(VENV)/torchvision --upgrade torchvision
	touch $@

# make demo, make test: each sets up what it needs in .venv and runs. Nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/$(INSTALL)
# On as many cores as there are; the 20 slowest are printed.
PYTEST := python -m pytest -n auto --maxprocesses 8 --durations=20
TESTS := $(BIN)/$(PYTEST)

.PHONY: demo test oldest readers torture fuzz audit bench bench-quick clean

demo: $(VENV)/ready-demo
	$(BIN)/llama4-convert demo demo-out

test: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TESTS)

# The tests on the oldest versions that pyproject.toml allows, in an environment of their own.
oldest: $(VENV)-oldest/ready
	$(VENV)-oldest/bin/$(PYTEST)

# Other programs read what we write, each in an environment of its own, and docs/readers.md says what they made of it: an hour.
readers: $(VENV)/ready-test
	$(BIN)/python -m tests.readers

# All of tests/torture, of which `make test` runs a share: a kill at every change of the disk, 100,000 damaged files.
torture: $(VENV)/ready-test
	TORTURE=1 $(TESTS) tests/torture

# The readers under a coverage-guided fuzzer, ten minutes; what it finds is left as crash-*.
fuzz: $(VENV)/ready-test
	$(BIN)/python -m tests.torture.fuzz -max_total_time=600 $(VENV)/fuzz-corpus

# Are there known vulnerabilities in what is installed? Says so where the database cannot be reached.
audit: $(VENV)/ready-test
	$(BIN)/python .ci/audit.py

# Everything that README's figures come from, beside the peers: 40 GB of disk, allow two hours on 2 cores.
bench: $(VENV)-bench/ready
	$(VENV)-bench/bin/python benchmarks

# Do the benchmarks still run? Their figures at this size mean nothing, and nothing is written.
bench-quick: $(VENV)/ready-test
	$(BIN)/python benchmarks --quick

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-oldest demo-out build *.egg-info

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

# What the project names in its lowest versions, what that asks for in the latest that fit.
$(VENV)-oldest/ready: pyproject.toml .ci/oldest.py
	rm -rf $(VENV)-oldest
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/$(INSTALL) packaging
	$(VENV)-oldest/bin/python .ci/oldest.py > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-oldest/constraints.txt -e '.[test]'
	$(VENV)-oldest/bin/$(INSTALL) --no-deps llama-models fairscale
	$(VENV)-oldest/bin/$(INSTALL) --no-deps --target $(VENV)-oldest/torchvision torchvision
	touch $@

# The peers without their dependencies: they ask for older versions of each other than they need.
$(VENV)-bench/ready: pyproject.toml constraints.txt
	test -x $(VENV)-bench/bin/python || $(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/$(INSTALL) -e '.[bench]'
	$(VENV)-bench/bin/$(INSTALL) --no-deps llmcompressor==0.14.0.1 auto-round==0.16.1 torchao==0.18.0 hqq==0.2.8.post1 llama-models
	touch $@

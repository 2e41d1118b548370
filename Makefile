# The two commands a newcomer needs: make demo, make test. Both create the environment first.
VENV   ?= .venv
PYTHON ?= python3
OUT    ?= runs/demo
# test files at a time: one more than two cores, since the ranks of a test wait for each other
JOBS   ?= 3
PY      = $(VENV)/bin/python
# one line for each step, and errors: pip's warnings (run as root, no cache, ...) are nobody's business
PIP     = @$(PY) -m pip install -qq --disable-pip-version-check -c constraints-dev.txt
READY   = $(VENV)/.installed

.PHONY: demo test test-slow test-random test-families test-multinode test-soak check bench bench-multinode gpu clean

# torch first and deepspeed without build isolation: its setup.py imports torch
$(READY): pyproject.toml setup.py constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "found Python %d.%d, expected 3.11 or newer: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "1/5 make the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/5 install pip, setuptools, wheel, ninja"
	$(PIP) --upgrade pip setuptools wheel ninja
	@echo "3/5 install torch"
	$(PIP) torch numpy py-cpuinfo
	@echo "4/5 build and install deepspeed"
	$(PIP) --no-build-isolation deepspeed
	@echo "5/5 install moe-locality and what its tests need"
	$(PIP) --no-build-isolation -e ".[deepspeed,hf,wandb,report,mpi,dev]"
	@touch $@

demo: $(READY) ## the main job: train, record, place, run again, compare; report in runs/demo/report.html
	$(VENV)/bin/moe-locality demo --out $(OUT)

# in the order of the folders: tests/distributed has the long files, and xdist would begin with the short ones
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(READY) ## the tests that need no GPU, JOBS files at a time
	$(PYTEST)

test-slow: $(READY) ## the long ones: real launchers, soaks, compilations, the wider cases
	$(PYTEST) -m "slow and not gpu and not multinode and not families"

test-random: $(READY) ## the property tests with other examples each time; SEED=N repeats a run
	MOE_LOCALITY_HYPOTHESIS=random $(PYTEST) -m "hypothesis and not gpu and not multinode" $(if $(SEED),--hypothesis-seed=$(SEED))

test-families: $(READY) ## all families of transformers (make test runs some of them), JOBS at a time
	$(PY) -m pytest -n $(JOBS) -m families

test-multinode: $(READY) ## tests on nodes made of network namespaces: root, iproute2, openssh-server, pdsh
	$(PY) -m pytest -m multinode tests/multinode

test-soak: $(READY) ## ten minutes of the serving engine on four ranks: memory, threads and files do not grow
	$(PY) benchmarks/soak.py --serving 10

check: $(READY) ## style, types, and the compile check of csrc/ where nvcc is
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	@if command -v nvcc >/dev/null; then MOE_LOCALITY_CUDA=check $(PY) setup.py -q build_ext; \
	else echo "csrc/ was not compiled: nvcc is not on PATH"; fi

bench: $(READY) ## benchmarks that run on a CPU; rows go to benchmarks/results.csv
	$(PY) benchmarks/main_job.py
	$(PY) benchmarks/recorder_overhead.py --model demo --csv benchmarks/results.csv
	@if [ -n "$$MOE_LOCALITY_DATA" ]; then $(PY) benchmarks/placement.py --csv benchmarks/results.csv; \
	else echo "benchmarks/placement.py was not run: MOE_LOCALITY_DATA names no directory of traces"; fi

bench-multinode: $(READY) ## bytes and times on nodes with slow links, tables and pictures of docs/multinode.md; needs root, MOE_LOCALITY_DATA
	$(PY) benchmarks/multinode.py --csv benchmarks/results.csv --page docs/multinode.md

# It may run where there is no internet: it takes the python that has the CUDA torch, and installs nothing.
GPU_PYTHON ?= python3
PART       ?= build,test,sanitize,ours,peers,quantize,layer
PEERS      ?=
gpu: ## build, test and measure the kernels on an NVIDIA GPU; PART=ours does one part, DRY=1 needs no GPU, PEERS=DIR holds peers (docs/kernels.md)
	PYTHONPATH=.$(if $(PEERS),:$(PEERS)) $(GPU_PYTHON) benchmarks/kernels.py --part $(PART) $(if $(DRY),--dry,--csv benchmarks/results.csv)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs

# The two commands a newcomer needs: make demo, make test. Both create the environment first.
VENV   ?= .venv
PYTHON ?= python3
OUT    ?= runs/demo
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip install -q --disable-pip-version-check -c constraints-dev.txt
READY   = $(VENV)/.installed

.PHONY: demo test test-multinode check bench bench-multinode gpu clean

# torch first and deepspeed without build isolation: its setup.py imports torch
$(READY): pyproject.toml setup.py constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja
	$(PIP) torch numpy py-cpuinfo
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e ".[deepspeed,hf,wandb,report,mpi,serve,dev]"
	touch $@

demo: $(READY) ## the main job: train, record, place, run again, compare; report in runs/demo/report.html
	$(VENV)/bin/moe-locality demo --out $(OUT)

test: $(READY) ## every test that needs no GPU
	$(PY) -m pytest

test-multinode: $(READY) ## tests on nodes made of network namespaces: root, iproute2, openssh-server, pdsh
	$(PY) -m pytest -m multinode tests/multinode

check: $(READY) ## style, types, and the compile check of csrc/ where nvcc is
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
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

# make demo    set up, prepare data, train a GPT with DeepSpeed on what is here
# make study   all twelve (stage, precision) cells with two seeds, and a report: studies/zero-x-precision/report.html
# make test    set up, run the whole test suite
# make test-all    and what takes longer than anybody waits: every combination of the parity gate, every cell's faults
# make test-faults the fault matrix: every kill, flip, full disk, signal and stall, on real ranks (about 40 minutes)
# make test-mutations  more than 10,000 damaged files, words and events for every reader (under ten minutes)
# make test-models every family of models that transformers has, tiny, on real ranks (about 25 minutes)
# make test-slurm  jobs on a real SLURM cluster of two nodes on this machine: limits, preemption, lost nodes (about 25 minutes)
# make measure the memory of real CPU runs against the plan's forecast, into benchmarks/results/memory-cpu.json (half an hour)
# make gpu     what only a GPU can show: its tests, then speed and memory beside their peers (eight minutes), into
#              benchmarks/results/<device>.json
# make check   formatting, lint, types, names, generated files

PYTHON ?= python3
# More words for pip: where to find torch's CPU build, say, on a machine without a GPU.
PIPFLAGS ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo study test test-all test-faults test-mutations test-models test-slurm cluster kernels gpu measure check format setup clean

setup: $(STAMP)

# A compiler is what DeepSpeed's operators need; everything else comes from pyproject.toml at the pinned versions.
$(STAMP): pyproject.toml constraints.txt
	@command -v c++ >/dev/null || { apt-get update -q && apt-get install -qy g++; } || \
	  { echo "Halfstep needs a C++ compiler: install g++ and run make again" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Halfstep needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { apt-get install -qy python3-venv && $(PYTHON) -m venv $(VENV); }
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIPFLAGS) -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIPFLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/halfstep data prepare --source stdlib --out data/stdlib --vocab-size 4096
	$(BIN)/halfstep run model=gpt2-nano zero=2 precision=fp16 data=data/stdlib out=runs/demo batch.global=48 steps=200

study: $(STAMP)
	$(BIN)/halfstep study run zero-x-precision $(ARGS)

# What the cluster in the tests is made of, where it may be installed; without it those tests are skipped and say so.
CLUSTER := slurmctld slurmd sbatch munged shellcheck sshd ssh ssh-keygen pdsh mpirun ip iptables mount hostname
cluster:
	@(for program in $(CLUSTER); do command -v $$program > /dev/null || exit 1; done) || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
	      slurm-wlm munge shellcheck openssh-server openssh-client pdsh openmpi-bin iproute2 iptables mount \
	      hostname; } || \
	  echo "SLURM is not installed and cannot be here: its tests are skipped" >&2

# Where torch has brought no Triton, its interpreter is all that the tests need. It lies beside the packages, not among
# them: there transformers would load it in every rank, which takes 80 MiB more.
kernels: $(STAMP)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' || \
	  [ -d $(VENV)/triton ] || \
	  $(BIN)/pip install --quiet --disable-pip-version-check $(PIPFLAGS) -c constraints.txt --no-deps \
	    --target $(VENV)/triton triton || \
	  echo "Triton is not installed and cannot be here: the tests of its kernels are skipped" >&2

test: $(STAMP) cluster kernels
	$(BIN)/python -m pytest $(ARGS)

test-slurm: $(STAMP) cluster
	$(BIN)/python -m pytest -m 'slurm or process' tests/slurm $(ARGS)

test-all: $(STAMP) cluster kernels
	$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

test-faults: $(STAMP)
	$(BIN)/python -m pytest -m 'faults or process' tests/faults $(ARGS)

test-mutations: $(STAMP)
	$(BIN)/python -m pytest -m 'faults or not faults' tests/mutations $(ARGS)

test-models: $(STAMP)
	$(BIN)/python -m pytest -m 'models or process' tests/models $(ARGS)

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results

measure: $(STAMP)
	$(BIN)/python benchmarks/measure_memory.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/rules/test_names.py
	$(BIN)/python -m tools.catalogue --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs data build dist

# Everything lands in .venv and needs no root; docs/install.md lists the same steps without make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: help setup train test test-all clean

PYTHON ?= python3
NP ?= 2
ARGS ?=
RUN ?= runs/glyphs-$(shell date +%Y%m%d-%H%M%S)
RUN := $(RUN)

# With .venv in front, python3 is .venv's own: it keeps its version until PYTHON= names another.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# A cluster's modules may put packages there, which would hide the pinned ones.
unexport PYTHONPATH
# For ranks that share this machine's cores: one thread each, yield while waiting, no two pinned to one core.
export OMP_NUM_THREADS ?= 1
export OMPI_MCA_mpi_yield_when_idle ?= 1
export OMPI_MCA_hwloc_base_binding_policy ?= none
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
endif

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile
	echo
	echo 'make PYTHON=python3.11 …                 with another Python (3.10, 3.11 or 3.12)'
	echo 'make train NP=4 ARGS="--epochs 2"        more ranks, flags for train.py'
	echo 'make test ARGS="tests/model -x"          a folder of tests, flags for pytest; -n 0: in one process'
	echo 'HOROVOD_GPU_OPERATIONS=NCCL make …       Horovod for GPUs'

# setup.key says what a whole .venv was made for. It is written last and removed first: without it, .venv is not trusted.
setup:  ## make .venv, unless it is there already for this Python, this MPI and these requirements
	@key=$$(PYTHON='$(PYTHON)' .ci/horovod_wheel.sh --key)
	made() { [ -x .venv/bin/python ] && [ "$$(cat .venv/setup.key 2>/dev/null)" = "$$key" ]; }
	if made; then exit; fi
	{ exec 9<Makefile && flock 9; } 2>/dev/null || true  # a second make here waits, then finds it made
	if made; then exit; fi
	PYTHON='$(PYTHON)' .ci/horovod_wheel.sh --check
	python=$$('$(PYTHON)' -c 'import sys; print(sys._base_executable)')  # PYTHON may be in the .venv that goes now
	if [ -e .venv/setup.key ]; then echo "making .venv anew: it was for $$(<.venv/setup.key), this is for $$key"; fi
	rm -f .venv/setup.key && rm -rf .venv && mkdir .venv

	log=.venv/setup.log
	logged() { "$$@" >>$$log 2>&1 || { tail -n 20 $$log; echo "setup: failed; the whole log: $$log"; exit 1; } >&2; }
	echo 'installing the Python packages (about a minute, longer without a pip cache)…'
	logged "$$python" -m venv .venv
	logged .venv/bin/pip install -r <(grep -v '^horovod==' requirements.txt) $$(.ci/horovod_wheel.sh --mpi)
	wheel=$$(PYTHON=.venv/bin/python .ci/horovod_wheel.sh)
	logged .venv/bin/pip install --no-deps "$$wheel"
	logged .venv/bin/python -c 'import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI, horovod.torch'
	echo "$$key" >.venv/setup.key

# The tools write under another name and rename at the end: what is there is whole.
data/glyphs.pack: | setup
	@mkdir -p data
	[ -d data/glyphs ] || python -m data_tools.glyphs data/glyphs --no-system-fonts
	python -m data_tools.pack data/glyphs data/glyphs.pack

train: setup data/glyphs.pack  ## train on sample data: horovodrun with NP ranks (2), train.py with ARGS, into RUN
	horovodrun -np $(NP) python train.py --data data/glyphs.pack --out $(RUN) $(ARGS)
	echo 'train it for longer: make train NP=$(NP) RUN=$(RUN) ARGS="--resume auto --epochs 20"'

# One pytest process per core; tests that start ranks take turns (tests/conftest.py). docs/testing.md says more.
PYTEST := python -m pytest -q -n auto

test: setup  ## run the tests that a change needs, in minutes, then the linter
	$(PYTEST) -m 'not long' $(ARGS)
	ruff check .

test-all: setup  ## run every test that this machine can run, then the linter
	$(PYTEST) --durations=10 $(ARGS)
	ruff check .

clean:  ## remove .venv, the sample data and caches; runs/ and the user's Horovod wheels stay
	rm -f .venv/setup.key
	rm -rf .venv data/glyphs data/glyphs.pack .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# make build    everything that bin/hastd and bin/hastctl need to run from this checkout
# make test     the tests (PYTEST_ARGS adds arguments, JOBS the number of processes)
# make check    ruff, mypy --strict, and a compile with warnings as errors
# make demo     two nodes: the primary is killed in the middle of writing, the other one takes over
# make perf     speed of one node and of two beside other NBD servers, a quarter of an hour (PERF_ARGS adds arguments
#               for both, such as --rounds 1 --seconds 1; PERF_JSON names a directory for the figures)
# make clean    remove what was built; make distclean: the Python environment as well

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
PERF_ARGS ?=
PERF_JSON ?=
VENV := .venv
PY := $(VENV)/bin/python
# Two makes at once must not write the same files.
LOCK := $(shell command -v flock >/dev/null 2>&1 && echo flock .build/lock)

# The packages that pyproject.toml asks for, to run and to develop.
define DEPENDENCIES
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
print("\n".join(sorted({*wanted, *project["build-system"]["requires"]})))
endef
export DEPENDENCIES

.PHONY: build test check demo perf clean distclean ext

build: $(VENV)/.complete ext

$(VENV)/.complete: pyproject.toml
	@PYTHON="$(PYTHON)" tools/requirements.sh build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "make: $(PYTHON) is too old, Python 3.11 or later is needed: make PYTHON=..." >&2; exit 1; }
	@mkdir -p .build
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "$$DEPENDENCIES" >.build/dependencies
	$(LOCK) $(PY) -m pip install -q --disable-pip-version-check -r .build/dependencies
	@touch $@

# Incremental: setup.py compiles what has changed, headers included.
ext: $(VENV)/.complete
	@mkdir -p .build
	@$(LOCK) $(PY) setup.py -q build_ext --inplace

test: build
	@tools/requirements.sh test
	$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: build
	$(PY) -m ruff check .
	$(PY) -m mypy
	@mkdir -p .build
	HAST_WERROR=1 $(PY) setup.py -q build_ext --build-temp .build/check --build-lib .build/check
	@echo "check: no complaint"

demo: build
	@tools/requirements.sh test
	$(PY) tools/demo

perf: build
	@tools/requirements.sh test perf
	$(PY) perf/one_node.py $(PERF_ARGS) $(if $(PERF_JSON),--json $(PERF_JSON)/one_node.json)
	$(PY) perf/two_nodes.py $(PERF_ARGS) $(if $(PERF_JSON),--json $(PERF_JSON)/two_nodes.json)

clean:
	rm -rf .build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f hast/ffi/_hast.c hast/ffi/*.o hast/ffi/*.so
	find hast tests tools perf -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

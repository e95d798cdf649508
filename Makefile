# make build    everything that bin/hastd and bin/hastctl need to run from this checkout
# make test     the tests (PYTEST_ARGS adds arguments, JOBS is the number of processes: most of them wait most of the time)
# make check    ruff, mypy --strict, and a compile with warnings as errors
# make demo     two nodes: the primary is killed in the middle of writing, the other one takes over
# make perf     hast beside other servers and mirrors: an hour and a half. PERF_ARGS chooses (make perf PERF_ARGS=--help),
#               such as "memory --systems 'hast mem*,nbdkit' --jobs '*depth 1' --repeats 1"; results: .build/perf
# make perf-micro   micro-benchmarks beside the result that perf/micro.json keeps: a quarter of a minute
#               (PERF_ARGS=--record keeps the new one)
# make perf-trace   where a write, a read, and a chunk of a resynchronisation spend their time: a minute; .build/perf/trace*
# make clean    remove what was built; make distclean: the Python environment as well

PYTHON ?= python3
JOBS ?= $(shell expr 3 '*' $$(nproc))
PYTEST_ARGS ?=
PERF_ARGS ?=
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

.PHONY: build test check demo perf perf-micro perf-trace clean distclean ext

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
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

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
	@tools/requirements.sh test
	$(PY) -m perf $(PERF_ARGS)

perf-micro: build
	$(PY) -m perf.micro $(PERF_ARGS)

perf-trace: build
	$(PY) -m perf.trace $(PERF_ARGS)

clean:
	rm -rf .build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f hast/ffi/_hast.c hast/ffi/*.o hast/ffi/*.so
	find hast tests tools perf -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Everything runs in .venv, which the first target makes: Python 3.11 or newer and make suffice.
PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
PORTS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-image test-all chaos bench lint types clean

help:  ## Show this help
	@grep -E '^[a-z -]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## */|/' \
	  | while IFS='|' read -r target text; do printf '  make %-12s %s\n' "$$target" "$$text"; done

demo: .venv/example.stamp  ## Run the example: a store and two nodes (PORTS=9081,9082 moves them)
	@exec .venv/bin/python example_project/demo.py $(if $(PORTS),--ports $(PORTS))

test: .venv/test.stamp  ## Run the tests, in three minutes (ARGS="-k name" picks some)
	PYTHONDEVMODE=1 .venv/bin/python -m pytest -n auto -m "not full" $(ARGS)

# Coverage and its floor are those of all tests, not of some that ARGS picks. After "make test",
# ARGS=--rest leaves out what that has run.
test-full: export CLUSTERED_SESSIONS_TEST_SERVERS ?= valkey redis
test-full: .venv/test.stamp  ## Run every test, on Valkey and on Redis: clusters, failovers, browsers, the example
	PYTHONDEVMODE=1 .venv/bin/python -m pytest -n auto -m "not image" --hypothesis-profile=full $(if $(ARGS),,--cov --cov-report=term) \
	  $(if $(findstring tests/,$(ARGS)),,tests) $(ARGS)

test-image: .venv/test.stamp  ## Build the example's image with buildah, as root, in five minutes
	.venv/bin/python -m pytest -m image tests/example/test_image.py $(ARGS)

test-all: .venv/dev.stamp  ## Run the tests on every Python and Django there is support for
	.venv/bin/python -m tox run $(ARGS)

chaos: .venv/test.stamp  ## Stop, kill and cut while locks are held (SECONDS=600 SEED=7 TOPOLOGY=sentinel)
	.venv/bin/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(TOPOLOGY),--topology $(TOPOLOGY))

bench: .venv/benchmark.stamp  ## Compare with other engines (ARGS="--quick --output report.md")
	.venv/bin/python -m benchmarks $(ARGS)

lint types: .venv/dev.stamp  ## Check style; check types
	.venv/bin/python -m tox run -e $@

clean:  ## Remove what the targets made
	rm -rf .venv .tox .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each of the extras in setup.cfg.
.venv/%.stamp: setup.cfg pyproject.toml | .venv/bin/python
	@echo "Installing into .venv (once) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making .venv with $$("$$python" --version) ..."; \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "None of these is a Python 3.11 or newer with venv: $(PYTHON)." >&2; \
	echo "Name one: make PYTHON=/path/to/python" >&2; \
	exit 1

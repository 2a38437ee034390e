# Everything runs in .venv, which the first target makes: Python 3.11 or newer and make suffice.
PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
PORTS ?=
ENCRYPT ?=
EXTRAS = clients,devices,embedded,encryption,msgspec,opentelemetry,prometheus

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-image test-all chaos bench lint types docs release-check clean

help:  ## Show this help
	@grep -E '^[a-z -]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## */|/' \
	  | while IFS='|' read -r target text; do printf '  make %-13s %s\n' "$$target" "$$text"; done

demo: .venv/example.stamp  ## Run the example: a store and two nodes (PORTS=9181,9182 moves them, ENCRYPT=1 encrypts)
	@exec .venv/bin/python example_project/demo.py $(if $(PORTS),--ports $(PORTS)) $(if $(ENCRYPT),--encrypt)

test: .venv/test.stamp  ## Run the tests, in three minutes (ARGS="-k name" picks some)
	PYTHONDEVMODE=1 .venv/bin/python -m pytest -n auto -m "not full" $(ARGS)

# Coverage and its floor are those of all tests, not of some that ARGS picks. After "make test",
# ARGS=--rest leaves out what that has run.
test-full: export CLUSTERED_SESSIONS_TEST_SERVERS ?= valkey redis
test-full: .venv/test.stamp  ## Run every test, on Valkey and on Redis: clusters, failovers, browsers, the example
	PYTHONDEVMODE=1 .venv/bin/python -m pytest -n auto -m "not image" --hypothesis-profile=full $(if $(ARGS),,--cov --cov-report=term) \
	  $(if $(findstring tests/,$(ARGS)),,tests) $(ARGS)

test-image: .venv/test.stamp  ## Build the example's image with buildah and run its composition, as root, in seven minutes
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

docs: .venv/docs.stamp  ## Build the documentation into docs/_build, with warnings as errors
	.venv/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env docs docs/_build $(ARGS)

release-check: .venv/release.stamp  ## Build a release into dist, and check it (ARGS="--tag v1.2.3")
	.venv/bin/python -m tests.release $(ARGS)

clean:  ## Remove what the targets made
	rm -rf .venv .tox .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist docs/_build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each of the dependency groups in pyproject.toml, which a pip older than 25.1 does not know.
# A newer one shows what setuptools says of every editable installation, as a warning.
# To install also compiles the catalogues of translations.
.venv/%.stamp: setup.cfg setup.py pyproject.toml $(wildcard django_clustered_sessions/locale/*/*/*.po) | .venv/bin/python
	@echo "Installing into .venv (once) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' --group '$*'
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

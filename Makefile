# Everything sets itself up: a fresh clone, python3 (3.11 or newer) and make are enough.
PYTHON ?= python3
# Two environments, so that what serves never holds torch.
SERVE := .venv
TEST := .venv-test
PIP := -m pip --disable-pip-version-check --quiet install --no-compile

.DEFAULT_GOAL := help
.PHONY: help serve test test-triton test-page docs coverage lint format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

serve: $(SERVE)/.ready ## run the server (SACCADE_PORT, SACCADE_HOST and every other SACCADE_* setting apply)
	@exec $(SERVE)/bin/saccade serve

test: $(TEST)/.ready ## run the tests (ARGS="-k depth" passes on to pytest)
	@exec $(TEST)/bin/python -m pytest -q $(ARGS)

test-triton: $(TEST)/.ready ## run the tests that need the real Triton server, which it fetches once (150 MB, to SACCADE_TEST_CACHE)
	@$(TEST)/bin/python -m tests.triton.server
	@exec $(TEST)/bin/python -m pytest -q -m triton $(ARGS)

test-page: $(TEST)/.ready ## run the tests of the page, in Chromium (on the path, or SACCADE_TEST_CHROMIUM)
	@command -v "$${SACCADE_TEST_CHROMIUM:-chromium}" >/dev/null || { echo "No Chromium: apt-get install chromium, or set SACCADE_TEST_CHROMIUM" >&2; exit 1; }
	@exec $(TEST)/bin/python -m pytest -q -m browser $(ARGS)

docs: $(TEST)/.ready ## make the site of the documents, in site/
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict

coverage: $(TEST)/.ready ## run the tests and say which lines they reach
	$(TEST)/bin/python -m coverage erase
	$(TEST)/bin/python -m coverage run -m pytest -q $(ARGS)
	$(TEST)/bin/python -m coverage combine -q
	$(TEST)/bin/python -m coverage report

lint: $(TEST)/.ready ## check style and types
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/mypy

format: $(TEST)/.ready ## put the code into the house style
	$(TEST)/bin/ruff check --fix
	$(TEST)/bin/ruff format

clean: ## remove the environments and every cache
	rm -rf $(SERVE) $(TEST) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SERVE)/.ready: pyproject.toml | python
	@echo "Setting up $(SERVE) ..."
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python $(PIP) -e '.[cpu,video]'
	@touch $@

$(TEST)/.ready: pyproject.toml | python
	@echo "Setting up $(TEST) ..."
	@test -x $(TEST)/bin/python || $(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/python $(PIP) -e '.[cpu,test]'
	@touch $@

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Saccade needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }

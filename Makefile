# Every target sets up what it needs: a virtual environment in .venv with this package and its dependencies.
#   make demo          search, fine-tune and search again on rendered people (writes output/demo)
#   make test          lint, format check and every test
#   make test-strict   the tests, with the deprecations that libraries announce as errors
#   make format        let ruff rewrite the code
#   make docs          the pages and an API reference as a site in build/docs, warnings as errors
#   make soak          kill a training forty times and compare it with an undisturbed one (some minutes)
#   make timm-suite    timm's own model tests on every model of this package (needs the network)
#   make clean         remove what the other targets made, except output/
# PYTHON=... chooses the interpreter of a new .venv.

.PHONY: demo test test-strict format docs soak timm-suite clean

# The first interpreter that is new enough.
PYTHON ?= $(shell for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done)
# Two processes; the tests of a file stay together, since they share what they have prepared.
TWO := -n 2 --dist loadfile
INSTALLED := .venv/installed
DOCS_INSTALLED := .venv/installed-docs

demo: $(INSTALLED)
	.venv/bin/vireid demo --output output/demo

test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest $(TWO)

test-strict: $(INSTALLED)
	.venv/bin/python -m pytest $(TWO) -W error

format: $(INSTALLED)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: $(DOCS_INSTALLED)
	.venv/bin/mkdocs build

soak: $(INSTALLED)
	.venv/bin/python tests/soak.py

timm-suite: $(INSTALLED)
	.venv/bin/python tests/timm_suite/run.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

# Touched last, so an interrupted set-up starts again. PYTHON is expanded once, because its search runs interpreters.
$(INSTALLED): setup.cfg pyproject.toml
	@python="$(PYTHON)"; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
		echo "Python 3.10 or newer is needed (tried $${python:-python3, python, python3.10 and later});" \
			"name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$python" --version): some minutes, once"; \
	rm -rf .venv && "$$python" -m venv .venv
	.venv/bin/python -m pip install --editable '.[test]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	.venv/bin/python -m pip install --editable '.[docs]'
	@touch $@

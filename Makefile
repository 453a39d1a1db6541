# make demo: the whole loop on embedded data.  make test: every test.  Both install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test quick fuzz lint docs dist wheel wheel-fresh clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "peso needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: install
	$(BIN)/peso demo
	@echo "peso is installed in $(VENV): call $(BIN)/peso, or run 'source $(BIN)/activate' once and call peso"

# two processes of one thread each: what a laptop has, and what the time limits of the tests are meant for.
# Each begins with one half of the tests, so that what a file's tests share is made once. Bytecode is kept even where
# the environment says otherwise: tests start many processes
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: install
	$(PYTEST) --dist worksteal

# the subset for daily use; a file's tests stay together, so that what they share is made once
quick: install
	$(PYTEST) --dist loadfile -m 'not slow and not fuzz'

# random damage to logs and workspaces
fuzz: install
	PESO_FUZZ_SECONDS=$${PESO_FUZZ_SECONDS:-3600} $(PYTEST) --dist loadfile -m fuzz

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# the documentation as a site that is read from files: open site/index.html. The tutorials are run for it; to look
# at other pages, DOCS_EXECUTE=false leaves that out
docs: $(VENV)/.docs  # (--quiet would silence the warnings that --strict fails on)
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || \
	  { echo "make docs needs Python 3.11.5 or newer: make docs VENV=.venv-docs PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

dist: install
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

# what is in the wheel works outside of the checkout: an environment with the wheel alone, beside .venv's packages
wheel: dist
	$(BIN)/python -m venv --without-pip build/wheel
	$(BIN)/python -m pip --python build/wheel/bin/python install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	cd build/wheel && ./bin/peso --version && ./bin/peso demo --quick -o demo

# what a user of the wheel gets: everything is downloaded and installed anew
wheel-fresh: dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/wheel && ./bin/peso demo -o demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist site *.egg-info

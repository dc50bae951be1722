# odis-path: `make demo` runs the whole chain, `make test` the tests, `make docs` builds the site; each sets up what it needs.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
OUT ?= demo_out
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

# The chain on your own slides: make demo SLIDES=path [GEOJSON=path] [ASSUME_MPP=0.5] [POINT_SIZE=12um] [CONFIG=name] [LABELS=csv] [ARGS="..."]
DEMO_ARGS := $(if $(SLIDES),--slides "$(SLIDES)") $(if $(GEOJSON),--geojson "$(GEOJSON)") \
    $(if $(ASSUME_MPP),--assume-mpp "$(ASSUME_MPP)") $(if $(POINT_SIZE),--point-size "$(POINT_SIZE)") \
    $(if $(MANIFEST),--manifest "$(MANIFEST)") $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

.PHONY: demo test lint docs setup clean
demo: $(STAMP)
	$(BIN)/odis-path demo --out "$(OUT)" $(DEMO_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP)
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --clean
	@echo "the docs are in site/index.html"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found: install one, or say make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,cluster]"
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) $(OUT) site

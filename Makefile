# Thin verbs. What they do is in kdutils, the notebooks and the tests.

STUDY ?=
SCALE ?= smoke
ENGINE ?=
PYTHON ?= python3
BIN := .venv/bin
CORES = $(shell getconf _NPROCESSORS_ONLN)
# One more than cores, since tests also wait for what they have started, and at most eight.
WORKERS = $(shell echo $$(( $(CORES) < 8 ? $(CORES) + 1 : 8 )))
STUDIES = $(or $(STUDY),$(patsubst notebooks/params/%.smoke.yaml,%,$(wildcard notebooks/params/*.smoke.yaml)))
# The notebooks that are pages; others may lie beside them.
PAGES = $(shell sed -n 's|.*: \(notebooks/.*\)|\1.ipynb|p' _toc.yml)

.DEFAULT_GOAL := help
.PHONY: help reproduce env test book serve sync crate bench

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile
	@echo "variables: STUDY=eskd (all if left out) SCALE=smoke|laptop|paper ENGINE=... PYTHON=python3"

# Smallest runs are serial, so as many studies run side by side as there are cores, and the book.
reproduce: env ## rerun the studies, build the book, say where both are
	@$(MAKE) --no-print-directory $(if $(filter smoke,$(SCALE)),-j $(CORES)) book $(STUDIES:%=rerun-%)
	@echo "The rerun notebooks: $(CURDIR)/_build/notebooks/"
	@echo "The book:            $(CURDIR)/_build/html/index.html"

rerun-%: env
	$(BIN)/python -m kdutils run $* --scale $(SCALE) $(if $(ENGINE),--engine $(ENGINE))

env: .venv/.stamp ## make the environment in .venv, once

# The stamp keeps later calls from asking the network anything.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else 'This needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d; name another with PYTHON=...' % v)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[book,cluster,crate,edge,test,train]"
	@touch $@

test: env ## run every test: unit, house, notebooks, book, stored outputs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--nbval --nbval-current-env --nbval-cell-timeout=600 tests $(PAGES)

book: env ## build the book from the notebooks' stored outputs
	$(BIN)/jupyter-book build . -W -n --keep-going

serve: env ## show the built book at http://localhost:8000
	$(BIN)/python -m http.server --directory _build/html

sync: env ## carry the edited notebooks/*.md over to the .ipynb and run those
	$(BIN)/python -m kdutils sync $(STUDY)

crate: env ## write ro-crate-metadata.json: which runs made each claim, as linked data
	$(BIN)/python tools/write_crate.py

bench: env ## time the training loop against bare steps
	$(BIN)/python tests/bench.py

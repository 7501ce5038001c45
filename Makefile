# vpenc: `make table1` re-runs the paper's Table 1 here; `make test` and `make test-browser` are what CI runs.
PYTHON ?= python3
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= outputs/table1
export OMP_NUM_THREADS ?= 1

.PHONY: table1 bair test test-browser docs check lab install dev reference clean help

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.runtime: setup.py settings.ini constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -m pip install -q -e '.[notebook]' -c constraints.txt
	@touch $@

$(BIN)/.dev: $(BIN)/.runtime
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	@touch $@

install: $(BIN)/.runtime  ## .venv with vpenc and JupyterLab
dev: $(BIN)/.dev          ## .venv with what developers need as well

table1: install  ## data, every row of Table 1 and its floors, the table (a second call does only what is missing)
	$(BIN)/vpenc data sim
	$(BIN)/vpenc run table1 --jobs $(JOBS) --out $(OUT)
	$(BIN)/vpenc table $(OUT)

bair: install  ## the paper's own situation: make bair ARCHIVE=bair_robot_pushing_dataset_v0.tar LABELS=export.zip [ARGS="--weights MODEL"]
	$(BIN)/vpenc bair $(if $(ARCHIVE),--archive $(ARCHIVE)) --labels $(LABELS) --jobs $(JOBS) $(ARGS)

lab: install  ## JupyterLab in nbs/analysis
	cd nbs/analysis && ../../$(BIN)/jupyter lab

check: dev  ## notebooks and library in step, README made from nbs/index.ipynb, import rules, ruff
	$(BIN)/nbdev_export
	@mkdir -p vpenc/notebooks && cp nbs/analysis/ablation.ipynb nbs/analysis/results.ipynb nbs/analysis/futures.ipynb nbs/analysis/latents.ipynb nbs/analysis/models.ipynb vpenc/notebooks/
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tools/readme.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/house.py
	$(BIN)/ruff check .
	git diff --exit-code --stat

test: dev check  ## sync, library notebooks, tests/
	$(BIN)/nbdev_test --n_workers $(JOBS) --skip_folder_re '^(analysis|_)' --timing
	$(BIN)/python -m pytest tests

$(BIN)/.browser: $(BIN)/.dev
	$(BIN)/python -m pip install -q -e '.[browser]' -c constraints.txt
	@touch $@

test-browser: $(BIN)/.browser  ## notebooks in JupyterLab and Chromium (from the system; skipped without), pictures in outputs/browser
	$(BIN)/python -m pytest tests/browser -rs

$(BIN)/.docs: $(BIN)/.dev
	$(BIN)/python -m pip install -q -e '.[docs]' -c constraints.txt
	@touch $@

docs: $(BIN)/.docs  ## the documentation in _docs/site, links checked; RUN=1 runs the library notebooks, to show what they draw
	$(BIN)/python tools/docs.py $(if $(RUN),--run)

reference: install  ## publish the last `make table1` in outputs/reference, for the README
	$(BIN)/python tools/reference.py $(OUT)

clean:  ## remove build products (data and outputs stay)
	rm -rf build dist *.egg-info _docs .pytest_cache

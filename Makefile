# `make serve` and `make test` do the whole set-up on a new machine with Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

UPSTREAM_DIFFUSERS ?= diffusers
UPSTREAM_TRANSFORMERS ?= transformers

.PHONY: serve test upstream fuzz train evaluate bench docs clean

serve: $(READY)
	$(BIN)/sfumato serve

ifdef UPSTREAM
test: upstream
else
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --durations=10 --durations-min=1 $(PYTEST)
endif

# What would change with the newest diffusers and transformers. They and what they need anew go into a second
# environment, which finds all else, PyTorch above all, in the first.
upstream: $(READY)
	$(PYTHON) -m venv --clear .venv-upstream
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-upstream/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	echo torch==2.13.0 > .venv-upstream/constraints.txt
	.venv-upstream/bin/python -m pip install --quiet --upgrade --constraint .venv-upstream/constraints.txt \
		"$(UPSTREAM_DIFFUSERS)" "$(UPSTREAM_TRANSFORMERS)"
	PYTHONPATH=src .venv-upstream/bin/python -m benchmarks.upstream

fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.fuzz $(FUZZ)

train: $(READY)
	$(BIN)/python -m training

evaluate: $(READY)
	$(BIN)/python -m training.evaluate

bench: $(READY)
	$(BIN)/python -m benchmarks

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .venv-upstream .venv-clients .venv-ray

# PyTorch first, so that nothing below installs another build of it.
$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# `make serve` and `make test` do the whole set-up on a new machine with Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: serve test fuzz train evaluate bench docs clean

serve: $(READY)
	$(BIN)/sfumato serve

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --durations=10 --durations-min=1 $(PYTEST)

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
	rm -rf .venv

# PyTorch first, so that nothing below installs another build of it.
$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# make demo    set up, then calibrate the built-in model on the built-in text
# make test    set up, then lint, types and tests
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types check benchmark clean

demo: $(INSTALLED)
	$(BIN)/calibrate demo

test: $(INSTALLED) lint types check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A link named kvcal lets mypy see the four folders as the package that they are installed as.
types: $(INSTALLED)
	@mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/kvcal
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p kvcal.artifacts -p kvcal.runtime -p kvcal.calibrate

check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/calibration.py

# torch first and by its exact pin: a looser request would bring several GB of GPU packages.
$(INSTALLED): constraints.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[calibrate,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

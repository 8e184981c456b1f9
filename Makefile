# make demo   install, export the sample models, check and time them on real images, write an HTML report
# make test   the one check that people and CI run: ruff, import-linter, mypy, pytest
# make floor  the runtime's tests in a venv that has the thin runtime alone: no torch, transformers or onnx

PYTHON ?= python3
OUT ?= build/demo

VENV := .venv
BIN := $(VENV)/bin
SOURCES := export quantization runtime benchmarks tests

.PHONY: demo test floor format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev \
	  --editable ".[export,dicom,sample,bench]"
	touch $@

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/demo.sh "$(OUT)"

test: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest

floor:
	rm -rf build/floor
	$(PYTHON) -m venv build/floor/venv
	build/floor/venv/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/floor/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/floor .
	build/floor/venv/bin/python -m pip install --quiet --constraint constraints.txt \
	  build/floor/medgemma_edge-*.whl
	build/floor/venv/bin/python -m pip install --quiet --constraint constraints.txt \
	  pytest pytest-randomly hypothesis
	build/floor/venv/bin/python tests/floor.py
	cd build/floor && venv/bin/python -m pytest -c ../../pyproject.toml --rootdir ../.. ../../tests/runtime

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf build dist

# make demo   install, export the sample models, check and time them on real images, write an HTML report
# make test   the one check that people and CI run: ruff, import-linter, mypy, pytest
# make floor  the runtime's tests in a venv that has the thin runtime alone: no torch, transformers or onnx

PYTHON ?= python3
MODEL ?= sample:medsiglip-tiny
OUT := build/demo

VENV := .venv
BIN := $(VENV)/bin
SOURCES := export quantization runtime benchmarks tests

.PHONY: demo test floor format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev \
	  --editable ".[export,coreml,executorch,dicom,sample,bench]"
	touch $@

demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: $(VENV)/.installed
	rm -rf $(OUT) && mkdir -p $(OUT)
	for precision in fp32 int8 int4; do \
	  medgemma-export --target onnx --model $(MODEL) --precision $$precision --out $(OUT)/$$precision || exit; \
	done
	medgemma-reference record --model $(MODEL) --per-layer --out $(OUT)/reference
	medgemma-parity $(OUT)/fp32 --reference $(OUT)/reference --per-layer --out $(OUT)/parity-fp32.json
	for precision in int8 int4; do \
	  medgemma-reference packing $(OUT)/$$precision --model $(MODEL) --reference $(OUT)/reference \
	    --per-layer --out $(OUT)/packing-$$precision && \
	  medgemma-parity $(OUT)/$$precision --reference $(OUT)/reference --reference $(OUT)/packing-$$precision \
	    --per-layer --out $(OUT)/parity-$$precision.json || exit; \
	done
	medgemma-reference plain-onnx --model $(MODEL) --out $(OUT)/plain.onnx
	for precision in fp32 int8 int4; do \
	  medgemma-bench $(OUT)/$$precision --samples --against plain=$(OUT)/plain.onnx \
	    --out $(OUT)/latency-$$precision.json || exit; \
	done
	medgemma-export --target onnx --model sample:medgemma-tiny --precision int4 --out $(OUT)/medgemma-int4
	medgemma-reference record --model sample:medgemma-tiny --out $(OUT)/medgemma-reference
	medgemma-parity $(OUT)/medgemma-int4 --reference $(OUT)/medgemma-reference \
	  --out $(OUT)/medgemma-parity.json
	medgemma-run generate $(OUT)/medgemma-int4 --max-tokens 12 --prompt "Describe this image." --image \
	  "$$(python -c 'from medgemma_runtime.sample_images import *; print(sample_image_path(SAMPLE_IMAGES[0]))')"
	medgemma-reference quantization --model sample:medgemma-tiny --tokens 16 --row rtn:int4 --row gptq:int4 \
	  --row llama.cpp-q4_0 --out $(OUT)/medgemma-quantization.json
	medgemma-export --target coreml --model sample:medgemma-tiny --scheme mobile --context 512 \
	  --out $(OUT)/medgemma-coreml
	medgemma-run inspect $(OUT)/medgemma-coreml
	medgemma-reference coreml $(OUT)/medgemma-coreml
	medgemma-export --target coreml --units ane --model sample:medgemma-tiny --precision int8 --context 512 \
	  --out $(OUT)/medgemma-ane
	medgemma-run generate $(OUT)/medgemma-ane --max-tokens 4 --prompt "Findings?"
	medgemma-export --target executorch --model $(MODEL) --precision int8 --separate-weights \
	  --out $(OUT)/executorch
	medgemma-parity $(OUT)/executorch --reference $(OUT)/reference --per-layer \
	  --out $(OUT)/parity-executorch.json
	medgemma-report $(OUT)/medgemma-parity.json $(OUT)/medgemma-quantization.json --out $(OUT)/report-medgemma
	medgemma-report $(OUT)/parity-*.json $(OUT)/latency-*.json --out $(OUT)/report

# A process for each core, and one thread for each process.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist loadfile

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

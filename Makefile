# make chat                              set everything up and chat with the default model
# make chat PROMPT="Why is the sky blue?"   one answer
# make test                              set everything up, lint, check types, run the tests
# make test SLOW=1                       and those that take more than ten seconds, as every change is checked with
# make setup                             only set everything up
# make bench MODEL=x.gguf                measure beside llama.cpp's own programs (builds them, once)
# make test-reference                    compare conversions with transformers and llama.cpp's own converter

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	then echo $$p; exit; fi; done; echo python3)
BIN = $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
export PROMPT

.PHONY: chat setup setup-dev test test-reference bench lint format types clean
.DEFAULT_GOAL = chat

setup:
	@$(PYTHON) tools/setup.py

setup-dev:
	@$(PYTHON) tools/setup.py --dev

# On a terminal the program gets a process group of its own, or Ctrl-C would end make, too.
chat: setup
	@if [ -t 0 ]; then set -m; fi; \
	if [ -n "$$PROMPT" ]; then printf '%s' "$$PROMPT" | $(BIN)/qwenlocal run; else $(BIN)/qwenlocal run; fi

test: setup-dev lint types
	@$(BIN)/python -m pytest -n logical --dist loadgroup $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

# Compares with transformers and with llama.cpp's own converter, in a Python of its own that has torch.
test-reference: setup-dev
	@$(BIN)/python tools/reference.py
	@build/reference/bin/python -m pytest -m reference $(PYTEST_ARGS)

bench: setup-dev
	@benchmarks/rival.sh
	@$(BIN)/python benchmarks/against_llama_cpp.py $(if $(MODEL),--model $(MODEL))
	@if [ -n "$(MODEL)" ]; then for settings in equal chosen; do \
		$(BIN)/python benchmarks/engine.py $$settings $(MODEL) || exit 1; done; \
		$(BIN)/python benchmarks/memory.py $(MODEL) && $(BIN)/python benchmarks/lookup.py $(MODEL); fi

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev
	@$(BIN)/mypy

format: setup-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv build dist

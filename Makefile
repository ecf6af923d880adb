# make chat                                 set up and chat with the default model
# make chat PROMPT="Why is the sky blue?"   set up and print one answer
# make test                                 set up, lint, check types, run the tests
# make test SLOW=1                          include the tests that take more than ten seconds, as CI does
# make test LATEST=1                        test against the newest dependencies instead of the locked ones
# make setup                                set up only; make setup-dev also installs what the tests need
# make format                               format and fix lint
# make lock                                 lock the newest dependencies that pyproject.toml allows
# make bench MODEL=x.gguf                   measure side by side with llama.cpp's own programs (builds them once)
# make bench-server MODEL=x.gguf            measure the server side by side with llama-server
# make soak MODEL=x.gguf MINUTES=60         load a server with clients that come and leave
# make test-reference                       compare conversions with transformers and llama.cpp's own converter
# make test-gpu                             compile the Vulkan backend and test it on a GPU in software
# make test-clients                         use the server with LangChain, LlamaIndex, LiteLLM, Node and lm_eval

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	then echo $$p; exit; fi; done; echo python3)
SCRIPTS = $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN = $(if $(LATEST),build/latest,.venv)/$(SCRIPTS)
COMPILE = build/lock/$(SCRIPTS)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --upgrade \
	--no-annotate --custom-compile-command "make lock" pyproject.toml
export PROMPT
unexport PYTHONDONTWRITEBYTECODE  # compiling the tests would take a tenth of the time

.PHONY: chat setup setup-dev test test-reference test-clients test-gpu bench bench-server soak lock lint format types clean
.DEFAULT_GOAL = chat

setup:
	@$(PYTHON) tools/setup.py

setup-dev:
	@$(PYTHON) tools/setup.py $(if $(LATEST),--latest,--dev)

# On a terminal the program gets its own process group; otherwise Ctrl-C would end make as well.
chat: setup
	@if [ -t 0 ]; then set -m; fi; \
	if [ -n "$$PROMPT" ]; then printf '%s' "$$PROMPT" | $(BIN)/qwenlocal run; else $(BIN)/qwenlocal run; fi

test: setup-dev lint types
	@$(BIN)/python -m pytest -n logical -m "$(if $(SLOW),not reference,not slow)" $(PYTEST_ARGS)

# Compares with transformers and llama.cpp's own converter, in a separate virtual environment with torch.
test-reference: setup-dev
	@$(BIN)/python tools/reference.py
	@build/reference/$(SCRIPTS)/python -m pytest -m reference $(PYTEST_ARGS)

# Tests the Vulkan backend, which takes minutes to compile once, on lavapipe: a Vulkan device in software.
test-gpu: setup-dev
	@$(BIN)/python tools/gpu_tests.py
	@GPU=vulkan VULKAN_SDK=$(CURDIR)/build/vulkan/sdk/usr $(PYTHON) tools/setup.py --dev
	@GGML_VK_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# Connects programs that people use a server with, in a separate virtual environment.
test-clients: setup-dev
	@$(BIN)/python tools/clients.py
	@build/clients/$(SCRIPTS)/python -m pytest -m clients tests/test_clients.py tests/test_evaluation.py $(PYTEST_ARGS)

bench: setup-dev
	@benchmarks/rival.sh
	@$(BIN)/python benchmarks/end_to_end.py $(if $(MODEL),--model $(MODEL))
	@if [ -n "$(MODEL)" ]; then for settings in equal chosen; do \
		$(BIN)/python benchmarks/engine.py $$settings $(MODEL) || exit 1; done; \
		$(BIN)/python benchmarks/memory.py $(MODEL) && $(BIN)/python benchmarks/lookup.py $(MODEL); fi

bench-server: setup-dev
	@benchmarks/rival.sh
	@$(BIN)/python benchmarks/server.py $(MODEL)
	@$(BIN)/python benchmarks/server.py $(MODEL) --long

soak: setup-dev
	@$(BIN)/python benchmarks/soak.py $(MODEL) --minutes $(or $(MINUTES),60)

lock:
	@$(PYTHON) -m venv build/lock
	@build/lock/$(SCRIPTS)/python -m pip install --quiet --upgrade uv
	@$(COMPILE) --output-file requirements/run.txt
	@$(COMPILE) --output-file requirements/dev.txt --extra dev --constraint requirements/run.txt
	@build/lock/$(SCRIPTS)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --upgrade \
		--no-annotate --custom-compile-command "make lock" --group build --output-file requirements/build.txt

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

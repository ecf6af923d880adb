#!/usr/bin/env bash
# Builds llama.cpp's own programs in build/rival, from the very source that the bindings were compiled from
# (make setup leaves it in build/), with llama.cpp's own defaults.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$(echo build/llama_cpp_python-*/vendor/llama.cpp)
cmake -S "$source" -B build/rival -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build build/rival --parallel --target llama-bench llama-completion llama-quantize

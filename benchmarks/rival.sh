#!/usr/bin/env bash
# Build llama.cpp's own programs in build/rival, with llama.cpp's defaults, from the source that the bindings were
# compiled from (make setup keeps it in build/).
set -euo pipefail
cd "$(dirname "$0")/.."
source=$(echo build/llama_cpp_python-*/vendor/llama.cpp)
cmake -S "$source" -B build/rival -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build build/rival --parallel --target llama-bench llama-completion llama-export-lora llama-imatrix llama-perplexity \
    llama-quantize llama-server

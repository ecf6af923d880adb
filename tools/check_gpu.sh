#!/bin/sh
# Checks a GPU: sets qwenlocal up for the card that is here, and prints a table of speed, memory and correctness.
#
#     tools/check_gpu.sh MODEL.gguf                     about ten minutes, of which compiling takes most
#     PYTHON=/elsewhere/bin/python tools/check_gpu.sh MODEL.gguf    with an installation made elsewhere; compiles nothing
#
# GPU=vulkan or GPU=cuda chooses the backend, as in `make setup`.
set -eu
model=${1:?Usage: tools/check_gpu.sh MODEL.gguf}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    make --directory="$root" --no-print-directory setup
    PYTHON=$root/.venv/bin/python
fi
exec "$PYTHON" "$root/benchmarks/gpu.py" "$model"

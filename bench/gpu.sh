#!/usr/bin/env bash
# Everything about a GPU in one command, in under nine minutes: builds, checks, measures, writes a record.
#
#   bench/gpu.sh            on a machine with an NVIDIA GPU, torch >= 2.11, triton >= 3.6, and nvcc with g++ and ninja
#   bench/gpu.sh --dry      anywhere: the same code with tiny sizes, by emulator and interpreter
#   bench/gpu.sh --help     all options
#
# OUT               folder for gpu-NAME.json, .md and .log; bench/results by default
# PYTHON            the interpreter that has torch; python3 by default
# HTV_GPU_LIBRARY   a _C.abi3.so built elsewhere (HTV_CUDA=1), which is then loaded instead of building one
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu/run.py "$@"

#!/usr/bin/env bash
# Coverage-guided fuzzing of the packet reader under the address and undefined-behaviour sanitizers.
#   tests/fuzz/fuzz.sh [SECONDS] [BUILD_FOLDER]
# Needs clang with libFuzzer (Debian: clang libclang-rt-dev) and flcore installed for the first seeds.
set -euo pipefail
seconds=${1:-600}
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${2:-$root/build/fuzz}
compiler=${CXX:-$(command -v clang++ || command -v clang++-14)}
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_COMPILER="$compiler" -DFLCORE_PYTHON=OFF -DFLCORE_OPENMP=OFF -DFLCORE_FUZZER=ON \
  -DFLCORE_SANITIZE=address,undefined
cmake --build "$build" --target packet_fuzzer
mkdir -p "$build/corpus"
python "$root/tests/fuzz/seeds.py" "$build/seeds"
"$build/packet_fuzzer" -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=2048 \
  -malloc_limit_mb=256 -print_final_stats=1 "$build/corpus" "$build/seeds"

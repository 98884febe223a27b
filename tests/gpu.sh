#!/usr/bin/env bash
# Checks flcore on a machine with a CUDA device and no network: builds it for that device, runs
# every test marked gpu, compute-sanitizer, and the GPU benchmarks. Under ten minutes.
#
#   tests/gpu.sh [--dry-run] OUT_DIR
#
# OUT_DIR receives a log a step, bench.json, bench.md and summary.txt. A step that fails or runs out
# of time does not stop the next one; the exit status is 1 when any of them failed.
# --dry-run prints the steps and their time limits and runs nothing.
#
# Needs python3 (or $PYTHON) with torch for CUDA, triton, numpy, pytest, pytest-benchmark, hypothesis,
# rich, typer, pybind11, setuptools, cmake and ninja; nvcc; compute-sanitizer. The package goes to a
# temporary folder: neither the Python installation nor the source tree is changed.
set -uo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

dry_run=0
out=
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
failed=0
results=()

if [ "$dry_run" = 1 ]; then
  work=/tmp/flcore-gpu
  architecture=90
else
  mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  architecture=${capability//./}
  architecture=${architecture:-90}
fi
site=$work/site
cd "$root" || exit 2

# step NAME SECONDS LOG COMMAND...: run one step, append its output to OUT_DIR/LOG, note the result
step() {
  local name=$1 limit=$2 log=$3 start=$SECONDS status verdict
  shift 3
  if [ "$dry_run" = 1 ]; then
    printf '%-12s at most %3d s, log %s\n  ' "$name" "$limit" "$out/$log"
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  printf '%-12s ...' "$name"
  { printf '\n== %s:' "$name"; printf ' %q' "$@"; printf '\n'; } >>"$out/$log"
  timeout --kill-after=10 "$limit" "$@" >>"$out/$log" 2>&1
  status=$?
  case $status in
    0) verdict=PASS ;;
    124 | 137) verdict="FAIL (over ${limit} s)" failed=1 ;;
    *) verdict="FAIL (status $status)" failed=1 ;;
  esac
  results+=("$(printf '%-12s %5d s  %-18s %s' "$name" $((SECONDS - start)) "$verdict" "$log")")
  printf '\r%s\n' "${results[-1]}"
  [ "$status" = 0 ] || tail -n 15 "$out/$log" | sed 's/^/    /'
}

sanitize() { # TOOL SECONDS LOG TESTS: compute-sanitizer sees nothing behind torch's memory cache
  step "$1" "$2" "$3" env "PYTHONPATH=$site" FLCORE_REQUIRE_GPU=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 86 \
    "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_gpu_aggregation.py \
    tests/test_gpu_packets.py tests/test_gpu_rotated.py tests/test_gpu_qmatmul_cuda.py -k "$4"
}

environment='
import platform, sys, torch, triton, flcore, flcore.ops
from flcore import _variants
info = flcore.build_info()
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print("device", torch.cuda.get_device_name(0), "of", torch.cuda.device_count(), info["cuda"])
missing = {(op, name): why for op in ("combine", "nonfinite", "random", "select", "gram", "decode", "sparsify", "quantize", "rowloss", "stablemax", "qmatmul", "qmatmul_dx", "qmatmul_int8", "act_quant", "local_step")
           for name, why in _variants.available(op, "cuda:0").items() if name not in ("cpu", "reference") and why}
sys.exit(f"variants that cannot run: {missing}" if missing else 0)
'

[ "$dry_run" = 1 ] || : >"$out/summary.txt"
for log in build tests memcheck sanitizers bench; do
  [ "$dry_run" = 1 ] || : >"$out/$log.log"
done

step build 120 build.log env FLCORE_CUDA=1 "FLCORE_CUDA_ARCHS=$architecture" \
  "FLCORE_BUILD_DIR=$work/build" "$python" -m pip install --no-build-isolation --no-deps \
  --disable-pip-version-check --no-cache-dir --target "$site" .
# without this the tests of a variant that is missing would be skipped, and pass
step variants 20 build.log env "PYTHONPATH=$site" "$python" -c "$environment"
step tests 240 tests.log env "PYTHONPATH=$site" FLCORE_REQUIRE_GPU=1 \
  "$python" -m pytest -q -p no:cacheprovider --durations=10 tests -m gpu
sanitize memcheck 60 memcheck.log 'cuda and (small_calls or unaligned or layers_of)'
for tool in racecheck synccheck initcheck; do
  sanitize "$tool" 40 sanitizers.log 'cuda and small_calls'
done
step benchmarks 110 bench.log env "PYTHONPATH=$site" "$python" -m flcore bench --device cuda \
  --no-compile --json "$out/bench.json" --markdown "$out/bench.md"

[ "$dry_run" = 1 ] && exit 0
{
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -n 2 | head -n 1
  grep -hE '^(python|device) ' "$out/build.log"
  grep -hE '^=+ .*(passed|failed|error)|^[0-9]+ (passed|failed)' "$out/tests.log"
  echo
  printf '%s\n' "${results[@]}"
  echo "total $SECONDS s"
} >"$out/summary.txt" 2>&1
echo
cat "$out/summary.txt"
exit "$failed"

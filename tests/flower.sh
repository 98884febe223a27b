#!/bin/sh
# Runs tests/flower with Flower and Ray, which want an environment of their own:
#   tests/flower.sh [ENVIRONMENT] [PYTEST ARGUMENTS]
# ENVIRONMENT (default: build/flower) is made if it is not there. Needs an flcore built in place, for
# the Python that runs it (pip install -e .), and about 1 GB; takes a minute or two, -m "not slow" seconds.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
case "${1:-}" in
  "" | -*) environment="$root/build/flower" ;;
  *) environment=$1 && shift ;;
esac
if [ ! -x "$environment/bin/flower-superlink" ]; then
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/pip" install -q "flwr[simulation]==1.41.0" torch numpy scikit-learn safetensors \
    rich typer matplotlib pytest pytest-benchmark
fi
cd "$root"
PYTHONPATH="$root/python" OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 \
  exec "$environment/bin/python" -m pytest tests/flower "$@"

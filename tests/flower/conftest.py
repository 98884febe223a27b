"""Tests with Flower run in an environment of their own: tests/flower.sh."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

MISSING = [name for name in ("flwr", "torch") if importlib.util.find_spec(name) is None]
collect_ignore_glob = []

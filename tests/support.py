"""What many tests share: storage types and tolerances, odd memory, one run an instruction set."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HAS_TORCH = importlib.util.find_spec("torch") is not None

# Sizes around the vector widths (4, 8, 16), the tiles (1024, 2048, 4096) and a 16-bit index.
SIZES = (0, 1, 7, 15, 16, 17, 31, 33, 255, 1025, 4095, 4096, 4097, 65537)
DTYPES = ("float64", "float32", "float16", "bfloat16")
# Units in the last place of each storage type, as a relative error.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def np_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of a storage type, bfloat16 included."""
    if name == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def unaligned(values: np.ndarray, offset: int = 1) -> np.ndarray:
    """Copy `values` to an address `offset` bytes off any alignment."""
    buffer = np.empty(values.nbytes + 64, np.uint8)
    start = (-buffer.ctypes.data) % 64 + offset
    view = buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    view[...] = values
    return view


class Guarded:
    """An output array between two guard zones that nothing may write."""

    def __init__(self, n: int, dtype: np.dtype, offset: int = 0) -> None:
        self.zone = 64 + offset * dtype.itemsize
        self.buffer = np.full(2 * self.zone + n * dtype.itemsize, 0xA5, np.uint8)
        self.array = self.buffer[self.zone : self.zone + n * dtype.itemsize].view(dtype)

    def check(self) -> None:
        """Assert that both guard zones are as they were."""
        assert (self.buffer[: self.zone] == 0xA5).all(), "written before the start"
        assert (self.buffer[self.buffer.size - self.zone :] == 0xA5).all(), "written past the end"


def usable_levels() -> list[str]:
    """Instruction-set levels this processor can run, best first."""
    from flcore import _native

    return list(_native.core.build()["isa_usable"])


def run_compiling(script: str, report: bool = False) -> Any:
    """Run `script` where Triton compiles, on any machine, and return what it prints as JSON.

    The script may import `triton_code`; report: it reads registers, which needs a tool that not
    every Triton brings along.
    """
    pytest.importorskip("torch")
    pytest.importorskip("triton", minversion="3.3")  # the signature of ASTSource
    nvidia = pytest.importorskip("triton.backends.nvidia")
    if report and not (Path(nvidia.__file__).parent / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outputs_per_level(script: str) -> dict[str, str]:
    """Run `script` once for each instruction-set level and return what it printed."""
    printed = {}
    for level in usable_levels():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "FLCORE_ISA": level},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{level}: {done.stderr}"
        printed[level] = done.stdout
    return printed

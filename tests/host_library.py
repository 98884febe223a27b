"""CUDA kernels compiled as C++ (tests/cuda_on_host), as a module in the place of flcore._cuda."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from support import ROOT

FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-psabi"),
    "-fno-gnu-unique",  # several of these libraries in a process: each with statics of its own
)
ALWAYS = (
    "kernels/device.cu",
    "csrc/bindings/cuda.cpp",
    "csrc/bindings/cuda_compression.cpp",
    "csrc/bindings/cuda_qmatmul.cpp",
    "tests/cuda_on_host/fibers.cpp",
)


KERNELS = tuple(
    f"kernels/{name}.cu"
    for name in ("select", "gram", "decode", "sparsify", "rotate", "qmatmul", "qmatmul_prepare")
)


@functools.cache
def shared() -> tuple[ModuleType, Callable[[int, bool], None]]:
    """Return `build` of all kernels that run on the host; two such libraries do not get along."""
    return build(Path(tempfile.mkdtemp(prefix="flcore-host-")), KERNELS)


def build(folder: Path, kernels: tuple[str, ...]) -> tuple[ModuleType, Callable[[int, bool], None]]:
    """Return the module and the function that sets multiprocessors and the order of threads."""
    compiler = shutil.which("c++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    import pybind11

    places = (
        *(ROOT / name for name in ("tests/cuda_on_host", "csrc", "kernels")),
        *(pybind11.get_include(), sysconfig.get_path("include")),
    )

    def compiled(source: str) -> str:
        target = str(folder / (source.replace("/", "_") + ".o"))
        command = [compiler, *FLAGS, *(f"-I{p}" for p in places), "-x", "c++", "-c"]
        done = subprocess.run(
            [*command, str(ROOT / source), "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, (*kernels, *ALWAYS)))
    path = folder / "_cuda.so"
    # lazy: the launchers of the other kernels are missing
    link = [compiler, "-shared", "-Wl,-z,lazy", "-Wl,-Bsymbolic", *objects, "-o", str(path)]
    subprocess.run(link, check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
    return module, ctypes.CDLL(str(path)).on_host_set

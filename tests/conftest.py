"""Fixtures of all tests; Triton's interpreter is switched on where there is no GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):  # before any OpenMP: workers share the processors
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

from support import HAS_TORCH, ROOT


def _has_gpu() -> bool:
    if not HAS_TORCH:
        return False
    import torch

    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:  # before triton is imported: its kernels then run in the interpreter, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU; the summary then shows how many did not run.

    FLCORE_REQUIRE_GPU=1 (tests/gpu.sh) lets them fail instead.
    """
    if os.environ.get("FLCORE_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


@pytest.fixture(autouse=True)
def _restore_threads():
    """Put the thread count back, whatever a test set."""
    import flcore

    yield
    flcore.set_num_threads(None)


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the core and tests/native/*.cpp, without Python, under two sanitizers."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):  # one build for all workers
        shared = shared.parent
    folder = shared / "native"
    with open(shared / "native.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            _build_native(folder)
            (folder / "built").touch()
    return folder


def _build_native(folder: Path) -> None:
    generator = ["-GNinja"] if shutil.which("ninja") else []
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), *generator),
        *("-DFLCORE_PYTHON=OFF", "-DFLCORE_NATIVE_TESTS=ON", "-DFLCORE_CUDA=OFF"),
        *("-DFLCORE_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=None"),
        "-DCMAKE_CXX_FLAGS=-O1 -g1",
    ]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

"""Facts about the build: linked libraries, weak symbols, one OpenMP runtime, fork, import cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flcore
from flcore import _arrays, _native
from flcore.errors import InvalidInputError, MissingDependencyError
from support import HAS_TORCH, ROOT


def python(code: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# ---- what is linked ----------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
@pytest.mark.parametrize("module", ["core", "cuda"])
def test_modules_link_neither_torch_nor_the_driver(module):
    loaded = getattr(_native, module)
    if loaded is None:
        pytest.skip(_native.cuda_reason)
    printed = subprocess.run(["ldd", loaded.__file__], capture_output=True, text=True).stdout
    names = set(re.findall(r"^\s*(lib[\w+-]+)", printed, flags=re.M))
    assert names <= {
        "libgomp",
        "libstdc++",
        "libgcc_s",
        "libc",
        "libm",
        "libpthread",
        "libdl",
        "librt",
    }


def test_cuda_module_loads_without_a_driver():
    if _native.cuda is None:
        assert _native.cuda_reason
        return
    count, why = _native.cuda.device_count()
    assert count > 0 or why


def test_isa_objects_have_no_weak_symbols(native_build):
    """An inline function compiled with wide instructions must not be the one the linker keeps."""
    objects = list(Path(native_build).glob("CMakeFiles/flcore_*.dir/csrc/cpu/*.isa.cpp.o"))
    assert len(objects) >= 4, "no objects of *.isa.cpp found"
    for path in objects:
        printed = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True)
        weak = [line for line in printed.stdout.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, (path.name, weak[:3])


# ---- codes that two languages share ------------------------------------------------------------


def test_codes_agree_between_python_and_cpp():
    from flcore.reference import combine as reference

    assert tuple(_arrays.DTYPE_CODES) == _native.core.DTYPES
    assert list(_arrays.DTYPE_CODES.values()) == list(range(4))
    assert reference.BIN_UNIT == _native.core.BIN_UNIT
    assert reference.BIN_LIMIT == _native.core.BIN_LIMIT
    assert reference.NONFINITE == _native.core.COMBINE_NONFINITE
    assert reference.OUT_OF_RANGE == _native.core.COMBINE_OUT_OF_RANGE


def test_every_stem_lives_in_every_room():
    """One stem, one op: kernel, reference, public function, test and benchmark share the name."""
    stems = {p.name.removesuffix(".isa.cpp") for p in (ROOT / "csrc/cpu").glob("*.isa.cpp")}
    helpers = {"probe", "crc32c"}  # a bandwidth probe and a checksum, not ops
    for stem in stems - helpers:
        for path in (
            f"python/flcore/reference/{stem}.py",
            f"python/flcore/ops/{stem}.py",
            f"tests/test_{stem}.py",
            f"tests/bench/bench_{stem}.py",
        ):
            assert (ROOT / path).exists(), path


# ---- import ------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = ("torch", "triton", "rich", "typer", "sklearn", "scipy", "matplotlib")
    code = f"import sys, flcore; print([m for m in {heavy} if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import_takes_under_200_ms_beyond_numpy():
    best = min(
        float(
            python(
                "import numpy, time; t = time.perf_counter(); import flcore;"
                "print(time.perf_counter() - t)"
            ).stdout
        )
        for _ in range(5)  # the least of five: other work on the machine only adds
    )
    assert best < 0.2


def test_lazy_names_resolve():
    for name in dir(flcore):
        getattr(flcore, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flcore.nothing  # noqa: B018


def test_missing_dependency_names_the_extra():
    from flcore._extras import require

    with pytest.raises(MissingDependencyError, match=r"flcore\[train\]"):
        require("a_module_nobody_has", extra="train")


# ---- instruction sets and threads --------------------------------------------------------------


def test_levels_can_be_forced_and_a_wrong_one_is_named():
    for level in _native.core.build()["isa_usable"]:
        done = python("import flcore; print(flcore.build_info()['isa'])", FLCORE_ISA=level)
        assert done.stdout.strip() == level
    done = python("import flcore", FLCORE_ISA="mmx")
    assert done.returncode != 0 and "FLCORE_ISA=mmx" in done.stderr and "usable here" in done.stderr


def test_threads_follow_the_setting():
    flcore.set_num_threads(3)
    assert flcore.get_num_threads() == 3
    assert _native.threads_for(100) == 1 and _native.threads_for(1 << 20) == 3
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(InvalidInputError, match="n: expected a positive number"):
            flcore.set_num_threads(wrong)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("first", ["torch", "flcore"])
def test_one_openmp_runtime(first):
    second = "flcore" if first == "torch" else "torch"
    code = f"""
import {first}, {second}, numpy as np
torch.ones(1 << 20).sum()
flcore.ops.combine(np.ones((4, 1 << 20), np.float32), [1] * 4)
torch.set_num_threads(1)
print(len(flcore.build_info()["openmp_libraries"]), flcore.get_num_threads())
"""
    done = python(code)
    assert done.stdout.split() == ["1", "1"], done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_runs_on_one_thread_and_does_not_hang():
    code = """
import os, numpy as np, flcore
flcore.set_num_threads(2)
x = np.ones((4, 1 << 20), np.float32)
flcore.ops.combine(x, [1] * 4)          # the parent starts a team
pid = os.fork()
if pid == 0:
    flcore.ops.combine(x, [1] * 4)
    os._exit(flcore.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flcore.get_num_threads())
"""
    done = python(code, timeout=30)
    assert done.stdout.split() == ["1", "2"], done.stdout + done.stderr


# ---- reports -----------------------------------------------------------------------------------


def test_build_info_and_its_report():
    info = flcore.build_info()
    assert info["isa"] in info["isa_usable"] and info["version"] == flcore.__version__
    json.dumps(info)
    for arguments in (["info"], ["info", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "flcore", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0 and info["isa"] in done.stdout, done.stderr
    without = python(
        "import sys; sys.modules['typer'] = None; import importlib.util as u; f = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'typer' else f(n, *a);"
        "sys.argv = ['flcore', 'info']; from flcore.__main__ import main; main()"
    )
    assert info["isa"] in without.stdout, without.stderr

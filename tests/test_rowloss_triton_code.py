"""Row losses in Triton compiled for a GPU that need not be there: registers, spills, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flcore import _native

pytest.importorskip("torch")
pytest.importorskip("triton")

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton, triton.backends.nvidia, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flcore.pykernels import rowloss, rowloss_kernels as k, rowloss_split as s

tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"

def compiled(kernel, dtype, arrays, classes, **constants):
    flags = dict.fromkeys(
        "MARGIN SMOOTH ZLOSS TAU SHARD NESTED AGAIN WEIGHTS_ONLY GIVEN".split(), False)
    constants = {**flags, "C": tl.float32, "COLUMNS": 0, **constants}
    pointers = {"labels_ptr": "*i64", "valid_ptr": "*u8", "parts_ptr": "*fp64", "x_ptr": dtype,
                "grad_ptr": dtype, "soft_ptr": dtype}
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name.endswith("_ptr") and name[:-4] in arrays:
            signature[name], aligned[(i,)] = pointers.get(name, "*fp32"), [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            signature[name], values[name] = "constexpr", None
        elif name.endswith("class_stride"):
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i64" if name.endswith("_bits") else "i32"
            if classes % 16 == 0 and name in ("classes", "row_stride", "grad_row_stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": constants["num_warps"]}
    code = triton.compile(ASTSource(kernel, signature, values, aligned),
                          target=GPUTarget("cuda", 90, 32), options=options).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code["cubin"])
        used = subprocess.run([tool, "--dump-resource-usage", file.name], check=True,
                              capture_output=True, text=True).stdout
    report = {n: int(re.search(n + r":(\\d+)", used).group(1)) for n in ("REG", "STACK")}
    report["vectors"] = bool(re.search(r"ld\\.global\\S*\\.v4", code["ptx"]))
    return report

OUT = ("x", "grad", "labels", "loss", "rest", "own", "shift")
found = {}
for map, dtype, classes in ((1, "*bf16", 12), (1, "*fp32", 1008), (0, "*bf16", 16384),
                            (1, "*fp32", 16384)):
    r, a, b, warps = rowloss.tile(classes, True, 32)
    found[f"rows {map} {dtype} {classes}"] = compiled(
        k.row_kernel, dtype, OUT, classes, MAP=map, R=r, A=a, B=b, num_warps=warps,
        COLUMNS=classes if classes <= 16 else 0)
found["smooth"] = compiled(
    k.row_kernel, "*bf16", (*OUT, "weight", "prior", "upstream"), 4096, MAP=0, SMOOTH=True,
    ZLOSS=True, MARGIN=True, AGAIN=True, R=1, A=8, B=512, num_warps=8)
found["partial"] = compiled(
    s.partial_kernel, "*fp32", ("x", "labels", "parts"), 128256, MAP=0, A=8, B=rowloss.PART // 8,
    num_warps=16)
found["finish"] = compiled(
    s.finish_kernel, "*fp32", (*OUT, "parts", "factors"), 128256, MAP=1, R=8, B=16, num_warps=4)
found["gradient"] = compiled(
    s.gradient_kernel, "*bf16", ("x", "grad", "labels", "factors"), 128256, MAP=1, R=1,
    B=rowloss.TILE, num_warps=4)
print(json.dumps(found))
"""


def test_kernels_compile_without_spills_and_with_vector_loads():
    """For compute capability 9.0, with the assembler that Triton brings along."""
    pytest.importorskip("triton", minversion="3.3")  # the signature of ASTSource
    nvidia = pytest.importorskip("triton.backends.nvidia")
    if not (Path(nvidia.__file__).parent / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton brings no cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, report in json.loads(done.stdout).items():
        assert report["STACK"] == 0, (name, report)
        assert report["REG"] <= 128, (name, report)
        if not name.endswith(" 12") and name != "finish":
            assert report["vectors"], name


def test_codes_agree_with_cpp_and_reference():
    from flcore.pykernels import rowloss_terms as terms

    from flcore.ops._rowloss_call import MAPS as names

    assert [names.index(m) for m in ("softmax", "stablemax", "taylor")] == [
        terms.SOFTMAX.value,
        terms.STABLEMAX.value,
        terms.TAYLOR.value,
    ]
    assert tuple(_native.core.ROW_MAPS) == names

"""Row losses in Triton compiled for a GPU that need not be there: registers, spills, wide loads."""

from __future__ import annotations

import pytest

from flcore import _native
from support import run_compiling

pytest.importorskip("torch")
pytest.importorskip("triton")

COMPILE = """
import json, re
import triton.language as tl
from triton_code import compiled as compile_kernel, resources
from flcore.pykernels import rowloss, rowloss_kernels as k, rowloss_split as s

def compiled(kernel, dtype, arrays, classes, **constants):
    flags = dict.fromkeys(
        "MARGIN SMOOTH ZLOSS TAU SHARD NESTED AGAIN WEIGHTS_ONLY GIVEN".split(), False)
    constants = {**flags, "C": tl.float32, "COLUMNS": 0, **constants}
    pointers = {"labels_ptr": "*i64", "valid_ptr": "*u8", "parts_ptr": "*fp64", "x_ptr": dtype,
                "grad_ptr": dtype, "soft_ptr": dtype}
    types, values, aligned = {}, {}, []
    for name in kernel.arg_names:
        if name in constants:
            values[name] = constants[name]
        elif name.endswith("_ptr") and name[:-4] in arrays:
            types[name] = pointers.get(name, "*fp32")
            aligned.append(name)
        elif name.endswith("_ptr"):
            values[name] = None
        elif name.endswith("class_stride"):
            values[name] = 1
        else:
            types[name] = "i64" if name.endswith("_bits") else "i32"
            if classes % 16 == 0 and name in ("classes", "row_stride", "grad_row_stride"):
                aligned.append(name)
    code = compile_kernel(kernel, types, values, aligned, num_warps=constants["num_warps"])
    return {**resources(code), "vectors": bool(re.search(r"ld\\.global\\S*\\.v4", code.asm["ptx"]))}

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
    for name, report in run_compiling(COMPILE, report=True).items():
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

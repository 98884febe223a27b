"""Products with quantized weights in Triton compiled for sm_80 and sm_90: registers and loads."""

from __future__ import annotations

import pytest

from support import run_compiling

pytest.importorskip("torch")
pytest.importorskip("triton")

COMPILE = """
import json, re
from triton_code import compiled, resources
from flcore.pykernels import (
    act_quant, qmatmul as forward, qmatmul_dx as gradient, qmatmul_int8 as integers,
    qmatmul_plan as plans)

N = K = 4096
CAPABILITY = %d
DEVICE = plans.Device((CAPABILITY // 10, 0), 132 if CAPABILITY == 90 else 108)
INT, FLOAT_ZERO, TABLE, E4M3 = range(4)
TYPES = {"codes_ptr": "*i32", "zeros_ptr": "*u8", "table_ptr": "*fp32", "levels_ptr": "*bf16",
         "bias_ptr": "*fp32", "low_ptr": "*fp32", "up_ptr": "*fp32", "sums_ptr": "*i32",
         "sx_ptr": "*fp32", "zx_ptr": "*i8", "parts_ptr": "*fp32", "scales_ptr": "*fp16"}
UNALIGNED = ("m", "steps", "units", "each", "segments", "blocks", "parts")

def report(name, kernel, plan, given=(), types=(), **constants):
    types = {**TYPES, **dict(types)}
    optional = ("zeros_ptr", "table_ptr", "levels_ptr", "bias_ptr", "low_ptr", "up_ptr", "zx_ptr")
    absent = {a: None for a in optional if a in kernel.arg_names and a not in given}
    types |= {a: "i32" for a in kernel.arg_names if a not in types and a not in constants}
    aligned = [a for a in kernel.arg_names if a not in UNALIGNED]
    code = compiled(kernel, types, constants | absent, aligned, CAPABILITY,
                    num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=True)
    ptx = code.asm["ptx"]
    narrow = re.findall(r"cp\\.async\\.c[ag]\\S* \\[.*\\], \\[.*\\], 0x4\\b", ptx)
    found[name] = {**resources(code), "threads": 32 * plan.warps, "wgmma": "wgmma.mma" in ptx,
                   "mma": "mma.sync" in ptx or "wgmma.mma" in ptx,
                   "narrow copies": len(narrow),
                   "v4": bool(re.search(r"ld\\.global\\S*\\.v4", ptx))}

def gemv(name, m, bits, kind=INT, x="*bf16", given=("bias_ptr",), **types):
    plan = plans.plan_gemv(DEVICE, m, N, K // {8: 4, 4: 8}.get(bits, 16))
    report(name, forward.gemv_kernel, plan, given, {"x_ptr": x, "out_ptr": x, **types}, BITS=bits,
           KIND=kind, BM=plan.bm, BN=plan.bn, BJ=plan.bk, SPLIT=False)

def gemm(name, m, bits, kind=INT, x="*bf16", given=("bias_ptr", "low_ptr", "up_ptr"), group=128,
         xp=1, wp=1, half=False, **types):
    plan = plans.plan(DEVICE, "gemm" if xp == wp == 1 else "wide", m, N, K, group)
    report(name, forward.gemm_kernel, plan, given, {"x_ptr": x, "out_ptr": x, **types}, BITS=bits,
           KIND=kind, XP=xp, WP=wp, HALF=half, WHOLE=group == 0, BM=plan.bm, BN=plan.bn,
           BK=plan.bk, SPLIT=False)

def dx(name, m, bits, kind=INT, x="*bf16", given=("low_ptr", "up_ptr"), group=128, xp=2, wp=1,
       **types):
    plan = plans.plan(DEVICE, "dx", m, K, N, group)
    report(name, gradient.dx_kernel, plan, given, {"x_ptr": x, "out_ptr": x, **types}, BITS=bits,
           KIND=kind, XP=xp, WP=wp, BM=plan.bm, BN=plan.bk, BK=plan.bn, SPLIT=False)

def int8(name, m, bits, unit, given=("bias_ptr", "low_ptr", "up_ptr"), kind=INT, **types):
    light = unit == K and "zx_ptr" not in given
    plan = plans.plan_int8(DEVICE, m, N, K // unit, unit, light=light)
    types = {"x_ptr": "*i8", "out_ptr": "*bf16", "codes_ptr": "*u8" if bits == 8 else "*i32",
             **types}
    report(name, integers.int8_kernel, plan, given, types, BITS=bits, KIND=kind,
           ONE=unit <= plan.bk, BM=plan.bm, BN=plan.bn, BK=plan.bk, SPLIT=False)

found = {}
gemv("gemv 1 row", 1, 4)
gemv("gemv 4 rows, 3 bits", 4, 3, given=("zeros_ptr",))
gemv("gemv nf4", 2, 4, TABLE, "*fp32", ("table_ptr",))
gemm("gemm 16 rows", 16, 4)
gemm("gemm 32 rows, zeros", 32, 4, given=("zeros_ptr",))
gemm("gemm 64 rows", 64, 4)
gemm("gemm many rows", 512, 4)
gemm("gemm many rows, 8 bits", 512, 8, x="*fp16", half=True, group=0, scales_ptr="*fp32")
gemm("gemm many rows, 2 bits", 512, 2, group=64, given=("zeros_ptr",))
gemm("gemm many rows, float zero", 512, 4, FLOAT_ZERO, given=("zeros_ptr",), zeros_ptr="*bf16",
     scales_ptr="*bf16")
gemm("gemm float32", 64, 4, x="*fp32", xp=3)
gemm("gemm many rows, nf4", 512, 4, TABLE, given=("levels_ptr",), group=64, wp=2,
     scales_ptr="*fp32")
gemm("gemm nf4, float32", 16, 4, TABLE, "*fp32", ("levels_ptr",), 64, 3, 3, scales_ptr="*fp32")
gemm("gemm fp8", 32, 8, E4M3, group=0, scales_ptr="*fp32")
dx("dx 16 rows", 16, 4)
dx("dx many rows, 3 bits", 512, 3, given=("zeros_ptr",))
dx("dx float32, nf4", 64, 4, TABLE, "*fp32", ("levels_ptr",), 64, 3, 3)
int8("int8 1 row", 1, 8, K, scales_ptr="*fp32")
int8("int8 many rows", 512, 8, K, scales_ptr="*fp32")
int8("int8 many rows, 4 bits", 512, 4, 128)
int8("int8 many rows, asymmetric", 512, 3, 128, ("zeros_ptr", "zx_ptr"))
report("quantise", act_quant.act_quant_kernel, plans.Plan(1, 1, 1, 4, 2), (),
       {"x_ptr": "*bf16", "codes_ptr": "*i8", "scales_ptr": "*fp32"}, ASYMMETRIC=False,
       STORED=False, R=1, T=act_quant.TILE)
report("join", forward.join_kernel, plans.Plan(8, 128, 1, 4, 2), ("bias_ptr",),
       {"out_ptr": "*bf16"}, BM=8, BN=128)
print(json.dumps(found))
"""
REGISTERS = 65536  # of a multiprocessor
SHARED = {80: 164 * 1024, 90: 228 * 1024}
# Most registers of a thread, by the first word of a case; all others may use what one has, 255.
LIMITS = {"gemv": 168, "quantise": 48, "join": 64}


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_without_spills(capability):
    found = run_compiling(COMPILE % capability, report=True)
    assert len(found) == 23
    for name, report in found.items():
        word = name.split()[0].rstrip(",")
        assert report["STACK"] == 0, (name, report)
        assert report["REG"] <= LIMITS.get(word, 255), (name, report)
        # two programs on a multiprocessor, so that one computes while the other loads
        assert 2 * report["threads"] * report["REG"] <= REGISTERS or "many" in name, (name, report)
        assert report["SHARED"] <= SHARED[capability] // 2, (name, report)
        if word in ("gemm", "dx", "int8"):
            assert report["mma"], name
            # one word a thread where a tile has no more; a gather of levels would be dozens
            assert report["narrow copies"] <= 6, (name, report)
            assert report["wgmma"] == (capability == 90 and "many" in name) or "many" not in name
    assert found["gemv 1 row"]["REG"] <= 64 and found["gemv 1 row"]["v4"]

"""GPU code on a machine without a GPU: what compiles, what the compiled code does and does not do.

Triton compiles for a named architecture with the assembler it brings along. nvcc's own report is
read when the toolkit is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from flcore import _native
from support import ROOT, run_compiling

COMPILE = """
import json
import triton_code
from flcore.pykernels import combine, rng

def compiled(*arguments, **options):
    code = triton_code.compiled(*arguments, **options)
    return triton_code.instructions(code, "fma|mul|add|div|sqrt|ld|st")

combine_arguments = {"table_ptr": "*i64", "flags_ptr": "*i32", "rows": "i32", "layers": "i32"}
found = {}
for dtype, accumulate in ((1, 0), (3, 0), (0, 2)):
    for aligned in (True, False):
        constants = dict(D=dtype, A=accumulate, EMPTY=False, HAS_STATE=False, HAS_OUT=True,
                         DIVIDE=False, ALIGNED=aligned, BLOCK=combine.BLOCK)
        found[f"{dtype} {accumulate} {aligned}"] = compiled(
            combine.combine_kernel, combine_arguments, constants, **combine.OPTIONS)
words = ("numel", "skip", "first_block", "k0", "k1", "tensor", "round", "client")
rng_arguments = {"out_ptr": "*fp32", **{w: "i32" for w in words}}
compiled(rng.random_kernel, rng_arguments, dict(FORM=1, BLOCK=rng.BLOCK), enable_fp_fusion=False)
normal = compiled(rng.random_kernel, rng_arguments, dict(FORM=2, BLOCK=rng.BLOCK),
                  enable_fp_fusion=False)
print(json.dumps([found, normal]))
"""


def test_triton_kernels_compile_to_separate_products_and_sums():
    sums, normal = run_compiling(COMPILE)
    assert {i for i in normal if i.startswith(("fma", "div", "sqrt"))} == {
        "div.rn.f32",
        "sqrt.rn.f32",
    }
    for case, instructions in sums.items():
        dtype, _, aligned = case.split()
        assert not [i for i in instructions if i.startswith("fma")], case
        real = "f64" if dtype == "0" else "f32"
        assert {f"mul.rn.{real}", f"add.rn.{real}"} <= set(instructions), case
        wide = {"0": "ld.global.v2.b64"}.get(dtype, "ld.global.v4.b32")  # 16 bytes
        assert (wide in instructions) == (aligned == "True"), case


KERNELS = {  # networks of 1 .. 32 values, two forms; and columns. Three types of x, two of codes
    "select.cu": 66,
    "gram.cu": 7,
    "qmatmul.cu": 13,
    "qmatmul_prepare.cu": 3,
}
RESIDENT = {"qmatmul.cu": 7}  # kernels of which two blocks of 256 threads are to be resident


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["90", pytest.param("80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "kernels").glob("*.cu")))
def test_cuda_kernels_spill_no_register(source, architecture, tmp_path):
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "--expt-relaxed-constexpr"),
            *("-Xptxas=-v", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "kernels")),
            *("-c", str(ROOT / "kernels" / source), "-o", str(tmp_path / "kernel.o")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spilled or source == "device.cu", "no report of the assembler"
    assert len(spilled) == KERNELS.get(source, len(spilled))
    assert all(pair == ("0", "0") for pair in spilled), spilled
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert sum(count <= 128 for count in registers) >= RESIDENT.get(source, 0), registers


@pytest.mark.skipif(_native.cuda is None, reason=f"no CUDA module: {_native.cuda_reason}")
def test_calls_without_a_device_say_why():
    count, why = _native.cuda.device_count()
    if count:
        pytest.skip("there is a device")
    assert why
    with pytest.raises(RuntimeError, match=re.escape(why)):
        _native.cuda.random(0, 4, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="cuda"):
        _native.cuda.combine([0], [1.0], [4], [1], [], [0], 0, 1.0, 0, 0, 0)
    for n in (1, 40):  # in registers, in shared memory
        with pytest.raises(RuntimeError, match="CUDA"):
            _native.cuda.select([0] * n, n, [4], [1], 0, 0, 0, 1, n, [0] * 4, [0], 0, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        _native.cuda.gram([0], 1, [0, 4], [1], 0, False, [0, 4], 0, 0, 0, 0)


@pytest.mark.skipif(_native.cuda is None, reason=f"no CUDA module: {_native.cuda_reason}")
def test_sizes_are_checked_before_a_launch():
    module = _native.cuda
    too_many = module.COMBINE_MAX_ROWS + 1

    def select(n=4, op=0, f=0, keep=1, count=None):
        count = n if count is None else count
        module.select([0] * n, n, [4], [1], op, 0, f, keep, count, [0] * 4, [0], 0, 0, 0)

    for call, says in (
        (lambda: module.random(0, 5, 0, 0, 0, 0, 0, 2**34, 0, 0), "at most 2\\^34"),
        (
            lambda: module.combine(
                [0] * too_many, [1.0] * too_many, [4], [1], [], [0], 0, 1.0, 0, 0, 0
            ),
            f"at most {too_many - 1} client rows",
        ),
        (lambda: module.combine([0], [1.0, 1.0], [4], [1], [], [0], 0, 1.0, 0, 0, 0), "rows"),
        (lambda: module.combine([0], [1.0], [4], [9], [], [0], 0, 1.0, 0, 0, 0), "unknown code 9"),
        (lambda: module.combine([0], [1.0], [4], [1], [], [], 0, 1.0, 0, 0, 0), "state or out"),
        (lambda: select(n=1025), "at most 1024 client rows"),
        (lambda: select(op=4), "unknown code 4"),
        (lambda: select(op=1, f=2), "f: got 2"),
        (lambda: select(op=2, keep=5), "keep: got 5"),
        (lambda: select(count=3), "without mixing"),
        (lambda: module.gram([0], 1, [0, 4], [1], 3, False, [0, 4], 0, 0, 0, 0), "unknown code 3"),
        (lambda: module.gram([0], 1, [0, 4], [0], 0, False, [0, 4], 0, 0, 0, 0), "float64 sums"),
        (lambda: module.gram([0], 1, [0, 4], [1], 0, False, [0, 3], 0, 0, 0, 0), "end at 4"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_codes_agree_between_triton_and_cpp():
    from flcore.pykernels import sums as kernels

    from flcore import _arrays
    from flcore.ops.combine import ACCUMULATE
    from flcore.ops.rng import STREAM_LENGTH

    codes = [c.value for c in (kernels.F64, kernels.F32, kernels.F16, kernels.BF16)]
    assert codes == list(_arrays.DTYPE_CODES.values())
    assert tuple(kernels.ACCUMULATE) == ACCUMULATE
    assert list(kernels.ACCUMULATE.values()) == list(range(3))
    assert kernels.BINS.value == kernels.ACCUMULATE["reproducible"]
    cuts = tuple(1.5 * 2.0**52 * unit for unit in _native.core.BIN_UNIT)
    assert (kernels.CUT_0.value, kernels.CUT_1.value, kernels.CUT_2.value) == cuts
    assert kernels.BIN_LIMIT.value == _native.core.BIN_LIMIT
    assert kernels.NONFINITE.value == _native.core.COMBINE_NONFINITE
    assert kernels.OUT_OF_RANGE.value == _native.core.COMBINE_OUT_OF_RANGE
    assert STREAM_LENGTH == 2**34

"""The Triton variant of moments and affine maps: bits of the CPU kernel, compiled code, a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _arrays, _native
from flcore.ops import accumulate_moments, affine, moments, moments_each
from flcore.ops.moments import affine_views, moments_views
from flcore.reference import moments as reference
from support import DTYPES, run_compiling
from test_moments import CPU_VARIANTS, TILE, accumulator_dtype, same, to_numpy, to_torch, values

pytest.importorskip("torch")
pytest.importorskip("triton")

needs_interpreter = pytest.mark.skipif("triton" not in CPU_VARIANTS, reason="there is a GPU")


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_bits_of_the_cpu_kernel(dtype, rng):
    x = [to_torch(values(rng, n, dtype)) for n in (0, 1, 17, 300)]  # the interpreter is slow
    long = to_torch(values(rng, TILE + 100, dtype))
    blank = [to_torch(np.zeros(v.shape, accumulator_dtype(dtype))) for v in x]
    results = []
    for variant in ("triton", "cpu"):
        acc = [a + 1 for a in blank]
        found = [moments([*x, long], variant=variant), moments_each([x, x], variant=variant)]
        found.append(accumulate_moments(acc, x, 0.3, nonfinite="propagate", variant=variant))
        views, accs = [_arrays.view(v) for v in x], [_arrays.view(a) for a in acc]
        maps = [*acc, *affine(x, 1.1, -3.3, variant=variant)]
        for weight in (0.7, 0.0):
            blend = (accs, 0.6, weight)
            out = [_arrays.view(_arrays.empty_like(v)) for v in x]
            found.append(moments_views([views], blend=blend, variant=variant))
            assert not affine_views(views, [1.1] * 4, [0.1] * 4, out, blend=blend, variant=variant)
            maps += [o.array for o in out]
        results.append((found, [to_numpy(v).tobytes() for v in maps]))
    assert all(same(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1] == results[1][1]


def test_numbers_agree_between_triton_and_cpp():
    from flcore.pykernels import moments as kernels

    assert kernels.TILE.value == _native.core.MOMENT_TILE
    assert kernels.LANES.value == _native.core.MOMENT_LANES
    assert dict(zip(_arrays.DTYPE_CODES, kernels.LIMITS, strict=True)) == reference.LIMIT


COMPILE = """
import json
from triton_code import compiled, instructions
from flcore.pykernels import moments as k

found = {}
for kernel, pointer, constants in (
    (k.moments_kernel, {"tiles_ptr": "*fp64"}, {"D": 1, "OF": 1}),
    (k.affine_kernel, {"flags_ptr": "*i32"},
     {"D": 3, "OF": 1, "ALIGNED": True, "LIMIT": k.LIMITS[3], "BLOCK": k.BLOCK}),
):
    types = {"table_ptr": "*i64", **pointer, "entries": "i32"}
    code = compiled(kernel, types, constants, **k.OPTIONS)
    found[kernel.__name__] = instructions(code, "fma|mul|add")
print(json.dumps(found))
"""


def test_triton_kernels_compile_to_separate_products_and_sums():
    for case, instructions in run_compiling(COMPILE).items():
        assert not [i for i in instructions if i.startswith("fma")], case
        assert {"mul.rn.f64", "add.rn.f64"} <= set(instructions), case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_the_cpu(dtype, rng):
    sizes = (0, 1, 17, TILE - 1, TILE + 1, 8 * TILE, 1_500_001)
    x = [to_torch(values(rng, n, dtype)) for n in sizes]
    acc = [to_torch(np.zeros(v.shape, accumulator_dtype(dtype))) for v in x]
    there, acc_there = [v.cuda() for v in x], [a.cuda() for a in acc]
    assert same(moments(there), moments(x))
    assert same(accumulate_moments(acc_there, there, 0.3), accumulate_moments(acc, x, 0.3))
    for a, b in zip(
        [*acc_there, *affine(there, 1.1, -3.3)], [*acc, *affine(x, 1.1, -3.3)], strict=True
    ):
        assert to_numpy(a.cpu()).tobytes() == to_numpy(b).tobytes()

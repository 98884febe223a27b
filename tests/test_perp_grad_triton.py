"""The Triton variant of projected gradients: bits of the CPU kernel, compiled code, a GPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flcore import _native
from flcore.ops import perp_grad
from flcore.ops.perp_grad import pair_views, perp_grad_views
from support import DTYPES, np_dtype, run_compiling
from test_perp_grad import SCOPES, VARIANTS, pair

needs_interpreter = pytest.mark.skipif("triton" not in VARIANTS, reason="there is a GPU")


def tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == np_dtype("bfloat16"):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.double().numpy().tobytes() == b.double().numpy().tobytes()


@needs_interpreter
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_bits_of_the_cpu_kernel(dtype, scope, rng):
    sizes = ((1.0, 0), (1.0, 2), (1.0, 300), (1e-5, 17), (1e-5, 90), (0.0, 33))  # it is slow
    pairs = [pair(rng, size, dtype, noise) for noise, size in sizes]
    if scope == "global":
        pairs.append(pair(rng, 4103, dtype))
    weights = [tensor(w) for w, _ in pairs]
    there, here = ([tensor(g.copy()) for _, g in pairs] for _ in range(2))
    perp_grad(weights, there, scope=scope, variant="triton")
    perp_grad(weights, here, scope=scope, variant="cpu")
    assert all(map(same_bits, there, here))


@needs_interpreter
def test_triton_measures_over_all_tensors(rng):
    pairs = [pair(rng, size, "float64", 1e-6) for size in (40, 1, 200)]
    there, here = ([tensor(g.copy()) for _, g in pairs] for _ in range(2))
    weights = [tensor(w) for w, _ in pairs]
    for layers, variant in ((there, "triton"), (here, "cpu")):
        perp_grad(weights, layers, scope="global", renormalize=False, variant=variant)
    assert all(map(same_bits, there, here))


@needs_interpreter
def test_triton_sums_over_processes(rng):
    """`reduce` gets the sums and, where something cancels, the squares of what is left."""
    pairs = [pair(rng, 50, "float64"), pair(rng, 60, "float64", 1e-6)]
    seen: dict[str, list] = {}
    results = []
    for variant in ("triton", "cpu", "reference"):
        layers = [tensor(g.copy()) for _, g in pairs]
        views = pair_views([tensor(w) for w, _ in pairs], layers, [("w", "g")] * 2)

        def reduce(values, variant=variant):
            seen.setdefault(variant, []).append(tuple(values.shape))
            values *= 4  # as if there were four processes with the same shards

        perp_grad_views(views, reduce=reduce, variant=variant)
        results.append(layers)
    assert seen["triton"] == seen["cpu"] == seen["reference"] == [(2, 3), (2,)]
    assert all(map(same_bits, results[0], results[1]))
    alone = perp_grad([w for w, _ in pairs], [g for _, g in pairs])
    for a, b in zip(results[0], alone, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9)


@needs_interpreter
def test_triton_joins_more_tiles_than_lanes(rng):
    from flcore.pykernels import perp_grad as kernels

    rows = rng.standard_normal((300, 3))
    out = torch.empty(2, 3, dtype=torch.float64)
    starts = torch.tensor([0, 257, 300])
    kernels.join_kernel[(2, 3)](torch.from_numpy(rows), starts, out)
    for i, part in enumerate((rows[:257], rows[257:])):
        lanes = np.zeros((128, 3))
        for t, row in enumerate(part):
            lanes[t % 128] += row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        assert (out[i].numpy() == lanes[0]).all()


def test_numbers_agree_between_triton_and_cpp():
    from flcore.pykernels import perp_grad as kernels

    core = _native.core
    assert kernels.TILE.value == core.PERP_TILE and kernels.LANES.value == core.PERP_LANES
    assert kernels.JOIN.value == core.PERP_JOIN
    assert kernels.CANCELS.value == core.PERP_CANCELS
    assert kernels.NOTHING.value == core.PERP_NOTHING


COMPILE = """
import json
from triton_code import compiled, instructions
from flcore.pykernels import perp_grad as k

f64 = "*fp64"
found = {}
for kernel, types, constants in (
    (k.sums_kernel, {"table_ptr": "*i64", "factors_ptr": f64, "tiles_ptr": f64, "entries": "i32"},
     {"D": 0, "REST": False}),
    (k.sums_kernel, {"table_ptr": "*i64", "factors_ptr": f64, "tiles_ptr": f64, "entries": "i32"},
     {"D": 3, "REST": True}),
    (k.join_kernel, {"rows_ptr": f64, "starts_ptr": "*i64", "out_ptr": f64}, {}),
    (k.factors_kernel, {"sums_ptr": f64, "rest_ptr": f64, "options_ptr": f64, "factors_ptr": f64,
                        "count": "i32"}, {"RENORMALIZE": True, "MEASURED": True}),
    (k.apply_kernel, {"table_ptr": "*i64", "factors_ptr": f64, "entries": "i32"},
     {"D": 3, "ALIGNED": True, "BLOCK": k.BLOCK}),
):
    code = compiled(kernel, types, constants, **k.OPTIONS)
    found[f"{kernel.__name__} {constants}"] = instructions(code, "fma|div|sqrt")
print(json.dumps(found))
"""


def test_triton_kernels_compile_to_separate_products_and_exact_roots():
    found = run_compiling(COMPILE)
    assert len(found) == 5
    for case, instructions in found.items():
        assert not [i for i in instructions if i.startswith("fma")], case
        assert set(instructions) <= {"div.rn.f64", "sqrt.rn.f64"}, case


@pytest.mark.gpu
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_gpu_gives_the_bits_of_the_cpu(dtype, scope):
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    for noise in (1.0, 1e-5, 0.0):
        weights = [torch.randn(n, dtype=torch.float64) for n in (0, 2, 17, 4097, 1_500_001)]
        grads = [(w + noise * torch.randn_like(w)).to(kind) for w in weights]
        weights = [w.to(kind) for w in weights]
        there = [g.cuda() for g in grads]
        perp_grad([w.cuda() for w in weights], there, scope=scope)
        perp_grad(weights, grads, scope=scope)
        for a, b in zip(there, grads, strict=True):
            assert same_bits(a.cpu(), b)

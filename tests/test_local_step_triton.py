"""The Triton variant of local steps: bits of the CPU kernel, compiled code."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flcore import _native
from flcore.ops import (
    LocalStep,
    global_norm,
    global_norm_rows,
    local_step,
    local_step_rows,
    round_end,
    round_end_rows,
    sam_shift,
    sam_shift_rows,
    shift,
)
from support import DTYPES, np_dtype, run_compiling
from test_local_step import OPTIONS, VARIANTS, draw

needs_interpreter = pytest.mark.skipif("triton" not in VARIANTS, reason="there is a GPU")


def tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == np_dtype("bfloat16"):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.double().numpy().tobytes() == b.double().numpy().tobytes()


def models(rng, sizes, dtype: str, count: int) -> list[list[torch.Tensor]]:
    parts = [[tensor(v) for v in draw(rng, size, dtype, count)] for size in sizes]
    return [list(tensors) for tensors in zip(*parts, strict=True)]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_bits_of_the_cpu_kernel(dtype, rng):
    x, g, q, buffer = models(rng, (0, 2, 130, 17), dtype, 4)
    chosen = OPTIONS if dtype == "float32" else OPTIONS[2::3]  # it is slow
    for i, options in enumerate(chosen):
        results = []
        for variant in ("triton", "cpu"):
            mine, state = copies(x), copies(buffer)
            more = {"buffer": state} if "momentum" in options else {}
            given_q = q if i % 2 else None
            local_step(mine, g, given_q, lr=0.7, variant=variant, **options, **more)
            results.append(mine + state)
        assert all(map(same_bits, *results)), options


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_points_and_ends_of_the_cpu_kernel(dtype, rng):
    x, g, q, h = models(rng, (0, 2, 130, 17), dtype, 4)
    results = []
    for variant in ("triton", "cpu"):
        dual, own = copies(h), copies(h)
        found = [
            *shift(x, g, -0.7, variant=variant),
            *sam_shift(x, g, 0.3, variant=variant),
            *sam_shift(x, g, 0.3, q=q, alpha=0.5, variant=variant),
            *round_end(x, g, variant=variant),
            *round_end(x, g, kind="dual", state=dual, variant=variant),
            *round_end(x, g, kind="control", state=own, c=q, scale=2.0, variant=variant),
            torch.tensor(global_norm(g, q, alpha=0.5, variant=variant), dtype=torch.float64),
        ]
        results.append([*found, *dual, *own])
    assert all(map(same_bits, *results))


@needs_interpreter
def test_triton_rows(rng):
    x, g, h = (torch.from_numpy(rng.standard_normal((3, 100)).astype(np.float32))[:, :90]
               for _ in range(3))  # fmt: skip
    q = torch.from_numpy(rng.standard_normal(90).astype(np.float32))
    lr, clip = np.array([0.1, 0.2, 0.3]), np.array([1.0, np.inf, 8.0])
    flags = np.array([True, False, True])
    results = []
    for variant in ("triton", "cpu"):
        mine, own, out = x.clone(), h.clone(), torch.zeros(3, 90)
        local_step_rows(mine, g, q, lr=lr, clip=clip, decay=0.1, active=flags, variant=variant)
        ended = round_end_rows(
            mine, x, kind="control", state=own, c=q, scale=1 / lr, active=2, out=out.clone(),
            variant=variant,
        )  # fmt: skip
        point = sam_shift_rows(mine, g, lr, out=out, active=flags, variant=variant)
        norms = [global_norm_rows(g, q, active=a, variant=variant) for a in (None, flags)]
        results.append([mine, own, ended, point, *norms])
    assert all(map(same_bits, *results))


@needs_interpreter
def test_triton_norm_of_several_tiles(rng):
    g = torch.from_numpy(rng.standard_normal(4111).astype(np.float32))
    assert global_norm([g, g[:40]], variant="triton") == global_norm([g, g[:40]], variant="cpu")


@needs_interpreter
def test_triton_prepared_steps_follow_the_gradient(rng):
    x, g, h = (torch.from_numpy(rng.standard_normal((2, 40))) for _ in range(3))
    found = []
    for variant in ("triton", "cpu"):
        mine = x.clone()
        steps = LocalStep(mine, g, variant=variant)
        for grad, active in ((None, None), (h, None), (h, 1), (g, None)):
            steps.step(0.1, clip=1.0, g=grad, active=active)
        found.append(mine)
    assert same_bits(*found)


@needs_interpreter
def test_triton_joins_more_tiles_than_lanes(rng):
    from flcore.pykernels import local_step as kernels

    tiles = rng.random(300)
    starts = np.array([0, 257, 300, 0])
    numbers = np.tile([0.5, 1.0, 0.0, 3.0, 0.0], 2).view(np.int64)
    scales, norms = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
    arguments = (torch.from_numpy(tiles), torch.from_numpy(starts), torch.from_numpy(numbers))
    kernels.scales_kernel[(2,)](*arguments, scales, norms, KIND=kernels.STEP.value)
    for i, part in enumerate((tiles[:257], tiles[257:])):
        lanes = np.zeros(128)
        for t, value in enumerate(part):
            lanes[t % 128] += value
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        assert norms[i] == np.sqrt(lanes[0]) and scales[i] == 3.0 / np.sqrt(lanes[0])


def test_numbers_agree_between_triton_and_cpp():
    from flcore.pykernels import local_step as kernels

    core = _native.core
    assert kernels.TILE.value == core.LOCAL_TILE and kernels.LANES.value == core.LOCAL_LANES
    assert kernels.JOIN.value == core.LOCAL_JOIN


COMPILE = """
import json
from triton_code import compiled, instructions
from flcore.pykernels import local_step as k

f64, words = "*fp64", {"table_ptr": "*i64", "numbers_ptr": "*i64"}
found = {}
def add(kernel, types, constants):
    code = compiled(kernel, types, constants, **k.OPTIONS)
    found[f"{kernel.__name__} {constants}"] = instructions(code, "fma|div|sqrt")

for D in (0, 1):
    add(k.squares_kernel, {**words, "tiles_ptr": f64, "entries": "i32"},
        {"D": D, "Q": True, "FULL": bool(D)})
for kind in (k.STEP.value, k.SAM.value):
    add(k.scales_kernel, {"tiles_ptr": f64, "starts_ptr": "*i64", "numbers_ptr": "*i64",
                          "scales_ptr": f64, "norms_ptr": f64}, {"KIND": kind})
for kind, D in ((k.STEP.value, 1), (k.STEP.value, 3), (k.SAM.value, 1), (k.CONTROL.value, 0)):
    add(k.write_kernel, {**words, "scales_ptr": f64, "entries": "i32"},
        {"D": D, "KIND": kind, "Q": True, "SCALED": True, "FULL": False, "BUFFER": 2,
         "NESTEROV": True, "ALIGNED": True, "BLOCK": k.BLOCK})
print(json.dumps(found))
"""


def test_triton_kernels_compile_to_separate_products_and_exact_roots():
    found = run_compiling(COMPILE)
    assert len(found) == 8
    for case, instructions in found.items():
        assert not [i for i in instructions if i.startswith("fma")], case
        assert set(instructions) <= {"div.rn.f64", "sqrt.rn.f64"}, case

"""Packets and memory on a CUDA device: the bytes of the CPU variants."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import NonFiniteError
from flcore.ops.quantize import quantize
from test_quantize_triton import SETTINGS, memory, on, run

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"

# ---- buckets: pykernels/quantize.py ------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", SETTINGS)
def test_quantize_gives_the_bytes_of_the_cpu(name, rounding, rng):
    for keep, dtype, bucket, numel in (
        ("", "float32", 32, 1_000_003),
        ("e", "float32", 500, 300_001),
        ("eh", "float32", 8192, 300_001),
        ("ehv", "bfloat16", 64, 100_000),
        ("e", "bfloat16", 1, 1000),
    ):
        g = rng.standard_normal(numel).astype(np.float32)
        options = {"bucket": bucket, "rounding": rounding, **SETTINGS[name]}
        if bucket == 1 and quantize_refuses(options):
            continue
        want = run("cpu", g, memory(keep, dtype, numel), **options)
        there = torch.from_numpy(g).to(DEVICE)
        for spare in (True, False):
            state = on(DEVICE, memory(keep, dtype, numel, spare))
            assert run("triton", there, state, **options) == want, (keep, bucket, spare)


def quantize_refuses(options: dict) -> bool:
    """Whether scales would outweigh what a reader takes."""
    return options["codec"] == "affine"


@pytest.mark.parametrize("name", ["absmax 4", "mx e2m1"])
def test_quantize_reads_layers_of_any_dtype(name, rng):
    parts = [rng.standard_normal(n) for n in (100, 0, 70_000, 33)]
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    layers = [torch.from_numpy(x).to(kind) for x, kind in zip(parts, kinds, strict=True)]
    for update in (layers, *[[x] for x in layers]):
        there = [x.to(DEVICE) for x in update]
        want = quantize(update, bucket=100, variant="cpu", **SETTINGS[name])
        assert quantize(there, bucket=100, **SETTINGS[name]).tobytes() == want.tobytes()


def test_quantize_leaves_memory_alone_where_a_value_is_not_finite(rng):
    g = torch.from_numpy(rng.standard_normal(100_000).astype(np.float32)).to(DEVICE)
    g[99_999] = float("nan")
    for spare in (True, False):
        state = on(DEVICE, memory("eh", "float32", 100_000, spare))
        before = {name: (x, x.clone()) for name, x in state.buffers().items()}
        with pytest.raises(NonFiniteError, match="99999"):
            quantize(g, bucket=64, state=state, **SETTINGS["fp e4m3"])
        for name, (x, content) in before.items():
            assert getattr(state, name) is x and torch.equal(x, content)

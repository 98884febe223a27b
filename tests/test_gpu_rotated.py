"""Rotated codes on a GPU: packets and state have the bytes of the CPU kernel."""

from __future__ import annotations

import numpy as np
import pytest

from flcore._state import State
from flcore.errors import NonFiniteError
from flcore.ops.quantize import quantize
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.gpu


def states(kept, numel, device, dtype="float32"):
    """The same random state in NumPy arrays and on the device, with spares or without."""
    rng = np.random.default_rng(3)
    host, there = State(a=0.4, b=0.9, p=0.3, q=0.8), State(a=0.4, b=0.9, p=0.3, q=0.8)
    for i, name in enumerate(kept):
        x = torch.from_numpy(rng.standard_normal(numel).astype(np.float32))
        if dtype == "bfloat16" and name != "h":
            x = x.bfloat16()
            setattr(host, name, x.view(torch.int16).numpy().view(np.uint16).copy())
        else:
            setattr(host, name, x.numpy().copy())
        setattr(there, name, x.to(device))
        if i % 2:
            there.spare[name] = torch.empty_like(there.buffers()[name])
    return host, there


def bytes_of(state):
    found = []
    for x in state.buffers().values():
        if isinstance(x, torch.Tensor):
            x = x.cpu()
            x = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
        found.append(x.tobytes())
    return found


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packets_and_state(bits):
    rng = np.random.default_rng(bits)
    for block in (256, 512, 1024, 2048, 4096):
        for numel in (1, 255, 4097, 300_001):
            g = torch.from_numpy(rng.standard_normal(numel).astype(np.float32))
            for kept, dtype in (
                ("", "float32"),
                ("e", "bfloat16"),
                ("eh", "float32"),
                ("vh", "float32"),
            ):
                host, there = states(kept, numel, "cuda", dtype)
                for measure in ("unbiased", "mse"):
                    options = {"codec": "rotated", "bits": bits, "bucket": block, "seed": 9}
                    want = quantize(g, state=host, measure=measure, **options)
                    got = quantize(
                        g.cuda(), state=there, measure=measure, variant="cuda", **options
                    )
                    assert np.array_equal(got, want), (block, numel, kept, measure)
                assert bytes_of(there) == bytes_of(host), (block, numel, kept)


def test_layers_of_every_type():
    rng = np.random.default_rng(1)
    sizes = (1, 0, 300, 7, 100_000, 1, 900, 0, 1024, 2)
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    g = [torch.from_numpy(rng.standard_normal(k)).to(types[i % 4]) for i, k in enumerate(sizes)]
    options = {"codec": "rotated", "bits": 4, "bucket": 1024}
    got = quantize([x.cuda() for x in g], variant="cuda", **options)
    assert np.array_equal(got, quantize(g, **options))


def test_what_is_not_finite_changes_nothing():
    g = torch.ones(5000, device="cuda")
    g[4999] = float("inf")
    _, there = states("eh", 5000, "cuda")
    before = bytes_of(there)
    with pytest.raises(NonFiniteError):
        quantize(g, codec="rotated", bits=4, bucket=256, state=there)
    assert bytes_of(there) == before

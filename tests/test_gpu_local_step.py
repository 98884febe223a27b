"""Local steps on a CUDA device: bits of the CPU kernel, rows, prepared calls, graphs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.ops import (
    LocalStep,
    global_norm,
    global_norm_rows,
    local_step,
    local_step_rows,
    round_end,
    sam_shift,
)
from flcore.optim import local_step_, sam_perturb_
from support import DTYPES
from test_local_step import OPTIONS

pytestmark = pytest.mark.gpu

SIZES = (0, 2, 17, 4097, 1_500_001)


def same_bits(there: torch.Tensor, here: torch.Tensor) -> bool:
    a, b = there.cpu().contiguous(), here.contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def models(dtype: str, count: int) -> list[list[torch.Tensor]]:
    kind = getattr(torch, dtype)
    return [[torch.randn(n, dtype=torch.float64).to(kind) for n in SIZES] for _ in range(count)]


def to_gpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_have_the_bits_of_the_cpu(dtype):
    torch.manual_seed(0)
    x, g, q, buffer = models(dtype, 4)
    for i, options in enumerate(OPTIONS):
        there, there_state = to_gpu(x), to_gpu(buffer)
        here, here_state = ([t.clone() for t in v] for v in (x, buffer))
        for mine, state, move in ((there, there_state, to_gpu), (here, here_state, list)):
            more = {"buffer": state} if "momentum" in options else {}
            local_step(mine, move(g), move(q) if i % 2 else None, lr=0.7, **options, **more)
        assert all(map(same_bits, there + there_state, here + here_state)), options


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_and_ends_have_the_bits_of_the_cpu(dtype):
    torch.manual_seed(0)
    x, g, q, h = models(dtype, 4)
    found = []
    for move in (to_gpu, lambda tensors: [t.clone() for t in tensors]):
        x_, g_, q_, own = (move(v) for v in (x, g, q, h))
        point = sam_shift(x_, g_, 0.3, q=q_, alpha=0.5)
        u = round_end(x_, g_, kind="control", state=own, c=q_, scale=2.0)
        norm = torch.tensor(global_norm(g_, q_), dtype=torch.float64)
        found.append([*point, *u, *own, norm])
    assert all(map(same_bits, *found))


def test_rows_and_prepared_steps():
    torch.manual_seed(0)
    x, g, h = torch.randn(3, 100, 4810)
    q = torch.randn(4810)
    lr, flags = np.linspace(0.1, 0.3, 100), np.arange(100) % 3 > 0
    here, there = x.clone(), x.cuda()
    for mine, device in ((here, "cpu"), (there, "cuda")):
        own = [v.to(device) for v in (g, h, q)]
        local_step_rows(mine, own[0], own[2], lr=lr, clip=30.0, decay=0.01, active=flags)
        steps = LocalStep(mine, own[0], own[2])
        for grad in (own[0], own[1], own[0]):
            steps.step(0.1, clip=30.0, g=grad, active=70)
            steps.step(0.1, clip=30.0)
    assert same_bits(there, here)
    norms = global_norm_rows(g.cuda())
    assert norms.is_cuda and same_bits(norms, global_norm_rows(g))


def test_a_step_waits_for_nothing():
    """The host is told when it waits for the device; the clip's scale must not make it."""
    x, g, q = torch.randn(3, 1000, device="cuda")
    parameter = torch.nn.Parameter(x.clone())
    parameter.grad = g
    steps = LocalStep(x, g, q)
    rows = torch.randn(4, 250, device="cuda")
    for _ in range(2):  # the first round compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            local_step(x, g, q, lr=0.1, clip=1.0)
            steps.step(0.1, clip=1.0)
            local_step_rows(rows, g.view(4, 250), lr=0.1, clip=1.0)
            local_step_(parameter, lr=0.1, clip=1.0)
            with sam_perturb_(parameter, 0.1):
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_steps_in_a_cuda_graph():
    torch.manual_seed(0)
    x, g = torch.randn(2, 5000, device="cuda")
    want = x.clone()
    steps = LocalStep(x, g)
    start = x.clone()
    steps.step(0.1, clip=1.0)  # compiles, and makes the tables
    x.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps.step(0.1, clip=1.0)
    x.copy_(start)
    for _ in range(3):
        graph.replay()
        local_step(want, g, lr=0.1, clip=1.0)
    assert torch.equal(x, want)


def test_what_is_not_finite_shows():
    x, g = torch.zeros(2, 10, device="cuda")
    g[3] = float("inf")
    local_step(x, g, lr=1.0, clip=1.0)
    assert x.isnan().all()

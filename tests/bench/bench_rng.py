"""Ten million uniforms and normals from the counter RNG, beside the generators people use."""

import numpy as np
import pytest

from flcore.ops import random_normal, random_uniform

NUMEL = 10_000_000


def flcore_uniform(out):
    return lambda: random_uniform(out.size, 1, out=out)


def numpy_philox(out):
    generator = np.random.Generator(np.random.Philox(1))
    return lambda: generator.random(dtype=np.float32, out=out)


def torch_uniform(out):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(out)
    return lambda: tensor.uniform_()


@pytest.mark.parametrize("make", [flcore_uniform, numpy_philox, torch_uniform])
def bench_uniform(make, benchmark):
    out = np.full(1000 if benchmark.disabled else NUMEL, np.nan, np.float32)
    call = make(out)
    call()
    assert 0 <= out.min() and out.max() < 1
    benchmark.group = f"random_uniform n={out.size}"
    benchmark.extra_info.update(bytes=out.nbytes)
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)


def flcore_normal(out):
    return lambda: random_normal(out.size, 1, out=out)


def numpy_ziggurat(out):
    generator = np.random.Generator(np.random.Philox(1))
    return lambda: generator.standard_normal(dtype=np.float32, out=out)


def torch_normal(out):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(out)
    return lambda: tensor.normal_()


@pytest.mark.parametrize("make", [flcore_normal, numpy_ziggurat, torch_normal])
def bench_normal(make, benchmark):
    out = np.full(1000 if benchmark.disabled else NUMEL, np.nan, np.float32)
    call = make(out)
    call()
    assert -7 < out.min() < -1 and 1 < out.max() < 7
    benchmark.group = f"random_normal n={out.size}"
    benchmark.extra_info.update(bytes=out.nbytes)
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)

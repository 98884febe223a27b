"""The CUDA products with quantized weights on a machine without a GPU: fixtures, cases, bounds."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from flcore import _arrays, _native
from flcore.ops import _qmatmul_cuda
from flcore.ops._qmatmul_call import prepare
from flcore.quantization import Scheme, quantize
from host_library import shared
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

HALVES = (torch.float16, torch.bfloat16)
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def bound_device(monkeypatch):
    """Bind the variants to the library; yields a function that sets up the device.

    Each call of it takes the other order of threads, unless `descending` says which.
    """
    module, configure = shared()
    limit = ctypes.CDLL(module.__file__).on_host_limit
    limit.argtypes = [ctypes.c_size_t]
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_arrays, "queue", lambda device: (0, 0))
    orders = itertools.cycle((False, True))

    def set_up(multiprocessors=1, shared_bytes=0, descending=None):
        configure(multiprocessors, next(orders) if descending is None else descending)
        limit(shared_bytes)

    set_up()
    yield set_up
    set_up()


def random_weight(rng, n, k, scheme, **fields):
    w = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    return quantize(w, Scheme.of(scheme, **fields))


def random_x(rng, m, k, dtype):
    return torch.from_numpy(rng.standard_normal((m, k)) + 0.25).to(dtype)


def product(x, weight, bias=None, **options):
    call = prepare(x, weight, bias, **options)
    _qmatmul_cuda.qmatmul(call)
    return call.out


def product_int8(x, weight, bias=None, **options):
    call = prepare(x, weight, bias, **options)
    _qmatmul_cuda.qmatmul_int8(call)
    return call.out


def dense(weight):
    """The weight in float64, unrounded."""
    return torch.from_numpy(np.asarray(weight.dequantize("float64")))


def assert_close(y, x, weight, extra=0.0):
    """One rounding to the dtype of y, and float32 sums of exact products."""
    w = dense(weight)
    want = x.double() @ w.T + extra
    # 2^-17: what two bfloat16 terms leave of a level of a codebook
    sums = 2.0**-17 if weight.scheme.kind == "codebook" and x.dtype == torch.bfloat16 else 2.0**-21
    bound = EPS[y.dtype] * want.abs() + sums * (x.double().abs() @ w.abs().T) + 1e-6
    assert ((y.double() - want).abs() <= bound).all(), (y.double() - want).abs().max()

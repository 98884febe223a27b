"""rotate.cu on a machine without a GPU: the kernel compiled as C++, thread by thread.

As in test_cuda_on_host.py; packets and state are compared with the CPU kernel's bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import numpy as np
import pytest

from flcore import _arrays, _native
from flcore._state import State
from flcore.errors import InvalidInputError, VariantUnavailableError
from flcore.ops.quantize import quantize
from flcore.reference.buckets import Settings
from host_library import shared
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.slow
TYPES = {name: getattr(torch, name) for name in _arrays.DTYPE_CODES}
STATES = ("", "e", "h", "eh", "vh", "ve")


@pytest.fixture(scope="module")
def library():
    """The module and the function that sets multiprocessors and the order of the threads."""
    return shared()


@pytest.fixture(params=["ascending", "descending"])
def rotate(request, library, monkeypatch):
    """The Python variant, bound to the library."""
    module, configure = library
    descending = request.param == "descending"
    configure(2 if descending else 1, descending)
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_arrays, "queue", lambda device: (0, 0))
    return importlib.import_module("flcore.ops._rotate_cuda").quantize


def state_of(kept, numel, seed, bfloat16=False, spare=False, mask=False):
    rng = np.random.default_rng(seed)
    state = State(a=0.4, b=0.9, p=0.3, q=0.8, mask=mask)
    for name in kept:
        x = rng.standard_normal(numel).astype(np.float32)
        if bfloat16 and name != "h":
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        setattr(state, name, x)
        if spare:
            state.spare[name] = np.empty_like(x)
    return state


def encode(function, update, state, *, bits, block, measure=0, seed=2**40 + 3, round=2**32 + 2):
    settings = Settings("rotated", bits, block, measure=measure, seed=seed, round=round)
    views = [_arrays.view(x) for x in update]
    fields = {"epoch": 5, "flags": 16, "source_dtype": "float32", "tensors": b""}
    return function(views, settings, state, fields)


def both(function, update, kept, options, **given):
    """Packet and state of the kernel, and those of the CPU."""
    cpu = sys.modules["flcore.ops.quantize"]._cpu
    numel = sum(x.numel() for x in update)
    found = []
    for run in (function, cpu):
        state = state_of(kept, numel, 3, **given)
        packets = [encode(run, update, state, **options, round=r) for r in range(2)]
        found.append(
            ([p.tobytes() for p in packets], [x.tobytes() for x in state.buffers().values()])
        )
    return found


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packets_have_the_bytes_of_the_cpu_kernel(rotate, bits, rng):
    for block in (256, 512, 1024, 2048, 4096):
        for numel in (1, 3, 200, 256, 257, 1500, 4096, 5000):
            g = rng.standard_normal(numel) * 10.0 ** rng.integers(-35, 35)
            if numel > 1000:
                g[block : 2 * block] = 0
            update = [torch.from_numpy(g.astype(np.float32))]
            for measure in (0, 1):
                options = {"bits": bits, "block": block, "measure": measure}
                found, want = both(rotate, update, "e", options)
                assert found == want, (block, numel, measure)


@pytest.mark.parametrize("kept", STATES)
def test_states_have_the_bits_of_the_cpu_kernel(rotate, kept, rng):
    update = [torch.from_numpy(rng.standard_normal(1300).astype(np.float32))]
    for bfloat16 in (False, True):
        for spare in (False, True):
            options = {"bits": 2, "block": 512}
            given = {"bfloat16": bfloat16, "spare": spare, "mask": kept == "ve"}
            found, want = both(rotate, update, kept, options, **given)
            assert found == want, given


def test_layers_of_every_type_and_length(rotate, rng):
    sizes = (1, 0, 300, 7, 1, 1, 900, 0, 1024, 2)
    update = [
        torch.from_numpy(rng.standard_normal(size)).to(list(TYPES.values())[i % 4])
        for i, size in enumerate(sizes)
    ]
    found, want = both(rotate, update, "eh", {"bits": 4, "block": 256})
    assert found == want
    assert encode(rotate, [], State(), bits=4, block=256).size == 128


@pytest.mark.parametrize("place", ["update", "e", "h"])
def test_what_is_not_finite_changes_nothing(rotate, place, rng):
    g = rng.standard_normal(3000).astype(np.float32)
    for spare in (False, True):
        state = state_of("eh", 3000, 1, spare=spare)
        bad = {"update": g, "e": state.e, "h": state.h}[place]
        kept, bad[2998] = bad[2998], np.inf
        before = [x.copy() for x in state.buffers().values()]
        assert encode(rotate, [torch.from_numpy(g)], state, bits=4, block=256) is None
        for x, y in zip(before, state.buffers().values(), strict=True):
            assert np.array_equal(x, y)
        bad[2998] = kept


def test_the_kernel_names_what_does_not_fit(rotate):
    for options in ({"bits": 5, "block": 256}, {"bits": 4, "block": 300}):
        with pytest.raises(InvalidInputError, match="expected"):
            _native.cuda.rotate(
                numel=1, count=1, layers=[0, 0, 0], state=State().native(), measure=0, check=True,
                seed=0, round=0, scales=0, codes=0, flags=0, device=0, stream=0, **options,
            )  # fmt: skip


def test_the_op_has_this_variant_for_rotated_codes_alone(rotate):
    from flcore import _variants

    for op, names in (("rotate", {"cpu", "reference", "cuda"}),
                      ("quantize", {"cpu", "reference", "triton"})):  # fmt: skip
        assert set(_variants.available(op)) == names
    assert _variants.choose("rotate", "cpu", "cpu") is _variants.choose("quantize", "cpu", "cpu")
    with pytest.raises(VariantUnavailableError, match="cuda"):
        quantize(np.ones(3, np.float32), codec="rotated", bits=4, bucket=256, variant="cuda")

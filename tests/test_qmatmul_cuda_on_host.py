"""qmatmul.cu on a machine without a GPU: compiled as C++, run thread by thread.

As in test_cuda_on_host.py. Tensor cores, matrix loads and asynchronous copies have a meaning in C++
(cuda_on_host/ptx_on_host.h), so that fragments, the ring of stages and the order of sums are those
of the device; a copy lands as late as it may, or with the threads in reverse order at once.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest

from flcore import _native
from flcore.errors import InvalidInputError
from flcore.ops import _qmatmul_cuda
from flcore.ops._qmatmul_call import prepare
from flcore.quantization import QuantizedTensor, Scheme
from flcore.reference import weight_quant as wq
from qmatmul_on_host import (
    EPS,
    HALVES,
    assert_close,
    bound_device,
    dense,
    product,
    product_int8,
    random_weight,
    random_x,
)
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.slow
SCHEMES = (
    *("int2", "int3", "int3-asym", "int4", "int4-asym", "int4-float-zero", "int8", "int8-asym"),
    *("nf4", "fp4", "mxfp4", "fp8", "fp8-e5m2", "q4_0"),
)


@pytest.fixture
def device(monkeypatch):
    """A function that sets multiprocessors, shared memory and the order of threads."""
    yield from bound_device(monkeypatch)


# ---- order of the codes --------------------------------------------------------------------------


def fragment_places(bits, blocks, k):
    """Output and position of every code of the words in fragment order, as the header says."""
    word = np.arange(blocks * (k // 64) * (256 if bits == 8 else 128))
    j, lane, piece = word % 4, word // 4 % 32, word // 128
    g, t = lane // 4, lane % 4
    pieces = k // 64 * (2 if bits == 8 else 1)
    block, piece = piece // pieces, piece % pieces
    if bits == 8:
        i = np.arange(4)
        row = np.broadcast_to((16 * block + g + 8 * (j % 2))[:, None], (len(word), 4))
        at = (piece * 32 + 16 * (j // 2) + 4 * t)[:, None] + i
    else:
        i = np.arange(8)
        row = (16 * block + g)[:, None] + 8 * (i % 2)
        at = (piece * 64 + 16 * j + 4 * t)[:, None] + i // 4 + 2 * (i // 2 % 2)
    return row, at


@pytest.mark.parametrize("scheme", ["int2", "int3-asym", "int4-asym", "int8-asym"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 200), (33, 95)])
def test_fragment_order_is_a_permutation_of_the_codes(device, scheme, shape, rng):
    n, k = shape
    weight = random_weight(rng, n, k, scheme)
    bits = weight.scheme.bits
    stored = 8 if bits == 8 else 4
    blocks, padded = -(-n // 16), -(-k // 64) * 64
    fields = _qmatmul_cuda._fragments(weight)
    codes = fields.arrays[0].numpy()
    assert codes.size == blocks * 16 * padded * stored // 8
    words = codes.view("<u4")
    got = words[:, None] >> (np.arange(32 // stored, dtype=np.uint32) * stored) & (2**stored - 1)
    row, at = fragment_places(stored, blocks, padded)
    places = (row * padded + at).ravel()
    assert np.array_equal(np.sort(places), np.arange(blocks * 16 * padded))  # each once
    matrix = np.empty(blocks * 16 * padded, np.int64)
    matrix[places] = got.ravel()
    chunks = -(-k // 32) * 32
    tiled = weight.tiled().codes.numpy()
    want = np.zeros((blocks * 16, padded), np.int64)
    want[:, :chunks] = wq.unpack_tile16(tiled, blocks * 16, chunks, bits)
    assert np.array_equal(matrix.reshape(want.shape), want)


def test_a_weight_is_reordered_once_and_forgotten_with_it(device, rng):
    weight = random_weight(rng, 20, 40, "nf4").to_layout("tile16")
    first = _qmatmul_cuda._fragments(weight)
    again = QuantizedTensor((20, 40), weight.scheme, "tile16", weight.codes, weight.scales)
    assert _qmatmul_cuda._fragments(weight) is first
    assert _qmatmul_cuda._fragments(again) is first  # the parts are what counts
    before = len(_qmatmul_cuda._kept())
    del weight, again
    gc.collect()
    assert len(_qmatmul_cuda._kept()) == before - 1


def test_a_weight_that_is_written_to_is_reordered_again(device, rng):
    weight, other = (random_weight(rng, 20, 40, "int4").to_layout("tile16") for _ in range(2))
    x = random_x(rng, 3, 40, torch.float16)
    assert_close(product(x, weight), x, weight)
    weight.codes.copy_(other.codes)
    assert_close(product(x, weight), x, weight)
    weight.scales.copy_(other.scales)
    assert torch.equal(product(x, weight), product(x, other))
    with torch.inference_mode():
        made = random_weight(rng, 20, 40, "int4").to_layout("tile16")
        assert_close(product(x, made), x, made)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_hot_rows_give_columns(device, scheme, dtype, rng):
    device(2)
    n, k = 40, 70
    weight = random_weight(rng, n, k, scheme)
    y = product(torch.eye(k).to(dtype), weight)
    want = weight.dequantize("float32").to(dtype).T
    if scheme in ("nf4", "fp4"):  # 22 or 16 of 24 digits, then one rounding
        assert ((y.double() - want.double()).abs() <= 2 * EPS[dtype] * want.double().abs()).all()
        assert (y == want).double().mean() > 0.97
    else:
        assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_exact_for_every_number_of_rows(device, bits, dtype, rng):
    device(3)
    n, k = 45, 77
    scheme = Scheme.of("int4-asym" if bits == 4 else "int8-asym", group=32, scale_dtype="float32")
    q = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, (n, 3)).astype(np.uint8)
    parts = (wq.pack_rows(q, bits), np.ones((n, 3), np.float32), zeros)
    weight = QuantizedTensor.from_parts((n, k), scheme, *(torch.from_numpy(x) for x in parts))
    w = torch.from_numpy(q.astype(np.int64) - np.repeat(zeros, 32, 1)[:, :k].astype(np.int64))
    assert torch.equal(dense(weight).long(), w)
    for m in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65):
        x = torch.from_numpy(rng.integers(-3, 4, (m, k)))
        assert torch.equal(product(x.to(dtype), weight), (x @ w.T).to(dtype)), m
        if m < 6:
            assert torch.equal(product(x.float(), weight), (x @ w.T).float()), m


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_near_the_definition(device, scheme, dtype, rng):
    for multiprocessors, m, n, k in ((1, 5, 37, 200), (5, 17, 260, 333), (3, 9, 140, 650)):
        device(multiprocessors)
        weight = random_weight(rng, n, k, scheme)
        x = random_x(rng, m, k, dtype)
        assert_close(product(x, weight), x, weight)


@pytest.mark.parametrize("group", [16, 32, 48, 80, 128, 160, -1])
@pytest.mark.parametrize("scheme", ["int4-asym", "int4-float-zero", "int8"])
def test_groups_and_types_of_scales(device, scheme, group, rng):
    """Also where blocks of threads meet within a group, which floating zeros must survive."""
    for i, scale in enumerate(("float32", "float16", "bfloat16")):
        for multiprocessors, m, k in ((1, 3, 130), (4, 18, 300), (3, 2, 600)):
            device(multiprocessors)
            weight = random_weight(rng, 50, k, scheme, group=group, scale_dtype=scale)
            x = random_x(rng, m, k, HALVES[i % 2])
            assert_close(product(x, weight), x, weight)


def test_one_scale_for_the_whole_tensor(device, rng):
    weight = random_weight(rng, 20, 100, "int8", group=-1, scope="tensor")
    x = random_x(rng, 4, 100, torch.float16)
    assert_close(product(x, weight), x, weight)


def test_stages_that_fit_smaller_shared_memory(device, rng):
    """166912 bytes: sm_80; 101376: sm_86, where the ring has two or three stages."""
    for limit in (166912, 101376):
        for scheme in ("int8-asym", "nf4", "fp8"):
            for m in (3, 20):
                device(2, limit)
                weight = random_weight(rng, 40, 700, scheme, group=16, scale_dtype="float32")
                x = random_x(rng, m, 700, torch.bfloat16)
                assert_close(product(x, weight), x, weight)
                if scheme == "int8-asym":
                    device(2)
                    first = product_int8(x, weight, act_block=16, asymmetric=True)
                    device(2, limit)
                    second = product_int8(x, weight, act_block=16, asymmetric=True)
                    assert torch.allclose(first.float(), second.float(), rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_bias_and_low_rank(device, dtype, rng):
    for m, multiprocessors in ((1, 1), (17, 3), (66, 2)):
        device(multiprocessors)
        n, k, rank = 75, 260, 5
        weight = random_weight(rng, n, k, "int4")
        x = random_x(rng, m, k, dtype)
        bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
        low = torch.from_numpy(rng.standard_normal((m, rank)).astype(np.float32))
        up = torch.from_numpy(rng.standard_normal((n, rank)).astype(np.float32))
        y = product(x, weight, bias, low=low, up=up)
        assert_close(y, x, weight, bias.double() + low.double() @ up.double().T)


@pytest.mark.parametrize("scheme", ["int4-float-zero", "int8-asym", "nf4", "fp8"])
def test_float32_activations_keep_their_digits(device, scheme, rng):
    device(3)
    weight = random_weight(rng, 50, 190, scheme)
    x = random_x(rng, 6, 190, torch.float32) * 10.0 ** torch.arange(-3, 3)[:, None]
    assert_close(product(x, weight), x, weight)
    one_hot = product(torch.eye(190), weight)
    want = weight.dequantize("float32").T
    assert torch.allclose(one_hot, want, rtol=2.0**-22, atol=0)


def test_codebooks_beyond_float16(device, rng):
    for top in (3e6, 1e-7):
        levels = tuple(float(v) for v in np.float32(top * np.sort(rng.uniform(-1, 1, 16))))
        scheme = Scheme.of("nf4", codebook=levels, scale_dtype="float32")
        q = rng.integers(0, 16, (20, 64)).astype(np.uint8)
        scales = np.full((20, wq.groups(64, scheme.group_size(64))), 1 / top, np.float32)
        parts = (torch.from_numpy(wq.pack_rows(q, 4)), torch.from_numpy(scales))
        weight = QuantizedTensor.from_parts((20, 64), scheme, *parts)
        x = random_x(rng, 3, 64, torch.float16)
        assert_close(product(x, weight), x, weight)


def test_rows_that_are_strided_or_begin_anywhere(device, rng):
    weight = random_weight(rng, 40, 104, "int4")
    for dtype in (*HALVES, torch.float32):
        wide = random_x(rng, 9, 131, dtype)
        for x in (wide[:, :104], wide[:, 3:107], wide[::2, 16:120], wide[4, 1:105]):
            assert_close(product(x, weight), x.reshape(-1, 104), weight)
    out = torch.full((9, 40), 7.0, dtype=torch.float16)
    x = random_x(rng, 9, 104, torch.float16)
    assert product(x, weight, out=out).data_ptr() == out.data_ptr()
    assert_close(out, x, weight)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_what_is_not_finite_stays_in_its_row(device, dtype, rng):
    device(2)
    weight = random_weight(rng, 30, 300, "int4")
    x = random_x(rng, 5, 300, dtype)
    x[1, 299], x[3, 5] = float("nan"), float("inf")
    y = product(x, weight)
    assert y[1].isnan().all() and not y[3].isfinite().any()
    good = [0, 2, 4]
    assert_close(y[good], x[good], weight)
    y = product_int8(x, weight)
    assert y[1].isnan().all() and y[3].isnan().all() and y[good].isfinite().all()


def test_no_k_leaves_what_is_added(device):
    weight = QuantizedTensor.from_parts(
        (3, 0), "int4", torch.empty((3, 0), dtype=torch.uint8), torch.empty((3, 0)).half()
    )
    bias = torch.tensor([1.0, 2.0, 3.0])
    for dtype in HALVES:
        assert torch.equal(
            product(torch.empty((2, 0), dtype=dtype), weight, bias).float(), bias.expand(2, 3)
        )


# ---- the order of sums ---------------------------------------------------------------------------


def test_parts_of_k_are_added_in_order(device):
    """2^24 + 1 - 2^24 is 0 or 1: it depends on the order, which is that of k."""
    scheme = Scheme.of("int8-asym", group=-1, scale_dtype="float32")
    terms = {"large": (64, 2.0**18), "less": (-64, 2.0**18), "one": (1, 1.0)}
    device(2)  # two small blocks each: three of them, one for each 128 k
    for order, want in (
        (("large", "one", "less"), 0.0),
        (("one", "large", "less"), 0.0),
        (("large", "less", "one"), 1.0),
    ):
        q = np.full((16, 384), 100, np.uint8)
        x = torch.zeros((2, 384), dtype=torch.bfloat16)
        for i, name in enumerate(order):
            code, value = terms[name]
            q[:, 128 * i + 40] = 100 + code
            x[:, 128 * i + 40] = value
        parts = (wq.pack_rows(q, 8), np.ones((16, 1), np.float32), np.full((16, 1), 100, np.uint8))
        weight = QuantizedTensor.from_parts(
            (16, 384), scheme, *(torch.from_numpy(p) for p in parts)
        )
        assert (product(x, weight) == want).all(), order


def test_runs_repeat_their_bits_for_any_order_of_threads(device, rng):
    weight = random_weight(rng, 300, 700, "int4-float-zero")
    for m, counts in ((3, (1, 4, 7)), (70, (3,))):
        x = random_x(rng, m, 700, torch.bfloat16)
        for multiprocessors in counts:
            found = []
            for descending in (False, True):
                device(multiprocessors, descending=descending)
                both = product(x, weight), product_int8(x, weight, act_block=128)
                found.append([y.view(torch.int16).numpy().tobytes() for y in both])
            assert found[0] == found[1], (m, multiprocessors)


def test_calls_that_do_not_fit_are_refused(device, rng):
    weight = random_weight(rng, 20, 256, "int4")
    table = random_weight(rng, 20, 256, "nf4")
    x = random_x(rng, 4, 256, torch.float16)
    call = prepare(x, weight)
    native = _qmatmul_cuda._qmatmul_call.native(call)
    plain = {**_qmatmul_cuda.PLAIN, "asymmetric": False, "int8": False}
    fields = _qmatmul_cuda._fragments(weight).fields

    def run(options=plain, fields=fields, **changed):
        _native.cuda.qmatmul_workspace(fields, {**native, **changed}, options, 0)

    run()
    table_fields = _qmatmul_cuda._fragments(table).fields
    for says, refused in (
        ("multiples of 16", lambda: run(fields={**fields, "codes": fields["codes"] + 8})),
        ("rows that begin", lambda: run(x=native["x"] + 2)),
        ("rows that begin", lambda: run(x_stride=257)),
        ("x_dtype: expected 2 or 3", lambda: run(x_dtype=1)),
        ("at least 1", lambda: run(m=0)),
        ("needs one", lambda: run(fields=table_fields)),
        ("has none", lambda: run({**plain, "lookup": 64})),
        ("terms: expected", lambda: run({**plain, "terms": 3})),
        ("integer codes", lambda: run({**plain, "int8": True, "lookup": 64}, table_fields)),
        ("act_block: expected a divisor", lambda: run({**plain, "int8": True}, act_block=48)),
    ):
        with pytest.raises((InvalidInputError, ValueError), match=says):
            refused()

"""Every op on a CUDA device: bits of the CPU kernels, streams, graphs, memory, errors."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore.aggregation import Accumulator, Mean
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops import combine, random_bits, random_normal, random_uniform
from support import DTYPES

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VARIANTS = ("cuda", "triton")
ACCUMULATE = ("float32", "float64", "reproducible")
# Around the 16-byte vectors (2, 4, 8 values), the tiles of both variants (512, 1024, 2048 values)
# and, the last one, enough tiles for every multiprocessor to take several.
SIZES = (1, 2, 7, 9, 511, 512, 513, 1023, 1025, 2047, 2048, 2049, 1_500_001)
ROWS = (1, 2, 4, 5, 8, 9, 17)  # around the four and eight rows that are loaded together
FORMS = {random_bits: torch.uint32, random_uniform: torch.float32, random_normal: torch.float32}


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    for op in ("combine", "random"):
        if why := _variants.available(op, DEVICE)[request.param]:
            pytest.skip(why)
    return request.param


def clients(rng, n: int, size: int, dtype: str, spread: float = 1.0) -> list[torch.Tensor]:
    """n rows on the CPU, zeros of both signs among them."""
    rows = [torch.from_numpy(rng.standard_normal(size) * spread) for _ in range(n)]
    for row in rows:
        row[: size // 5 : 3] = -0.0
        row[1 : size // 5 : 3] = 0.0
    return [row.to(getattr(torch, dtype)) for row in rows]


def to_gpu(update):
    if isinstance(update, torch.Tensor):
        return update.to(DEVICE)
    return [to_gpu(x) for x in update]


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what=None) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.cpu().view(torch.uint8), want.cpu().view(torch.uint8)
    assert torch.equal(got, want), what


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_bits_of_the_cpu_kernel(variant, dtype, accumulate, rng):
    for i, size in enumerate(SIZES):
        n = ROWS[i % len(ROWS)]
        rows, weights = clients(rng, n, size, dtype), rng.uniform(-1, 1, n)
        on_gpu = to_gpu(rows)
        for divisor in (1.0, 3.0):
            options = {"accumulate": accumulate, "divisor": divisor}
            got = combine(on_gpu, weights, variant=variant, **options)
            assert got.device.type == DEVICE
            want = combine(rows, weights, variant="cpu", **options)
            assert_same_bits(got, want, (size, n, divisor))


def test_reference_runs_on_device_tensors(rng):
    rows = clients(rng, 3, 1000, "float64")
    got = combine(to_gpu(rows), [1, 2, 3], variant="reference")
    want = combine(rows, [1, 2, 3], variant="reference")
    assert got.device.type == DEVICE
    assert_same_bits(got, want)


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_small_calls_of_every_kernel(variant, accumulate, rng):
    """Few values through every path; what compute-sanitizer runs."""
    for dtype in DTYPES:
        rows = clients(rng, 5, 2500, dtype)
        on_gpu = to_gpu(rows)
        for start in (0, 1):  # 16-byte accesses, single values
            want = combine([r[start:] for r in rows], [1, 2, 3, 4, 5], accumulate=accumulate)
            views = [r[start:] for r in on_gpu]
            got = combine(views, [1, 2, 3, 4, 5], accumulate=accumulate, variant=variant)
            assert_same_bits(got, want, (dtype, start))
        total = Accumulator(like=on_gpu[0], dtype=accumulate, variant=variant)
        total.add(on_gpu[0]).add(on_gpu[1], 2.0)
        assert bool(torch.isfinite(total.result()).all())
        on_gpu[3][7] = float("nan")
        with pytest.raises(NonFiniteError, match=r"updates\[3\]"):
            combine(on_gpu, [1, 1, 1, 1, 1], accumulate=accumulate, variant=variant)
    for make in FORMS:
        for offset in (0, 1):
            got = make(1001, 1, offset=offset, device=DEVICE, variant=variant)
            assert_same_bits(got, make(1001, 1, offset=offset, device="cpu"))


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_layers_of_all_dtypes(variant, accumulate, rng):
    sizes = (1, 64, 0, 1024, 3000, 7)
    updates = [
        [clients(rng, 1, size, dtype)[0] for size in sizes for dtype in DTYPES] for _ in range(6)
    ]
    weights = rng.uniform(0, 1, 6)
    want = combine(updates, weights, accumulate=accumulate)
    got = combine(to_gpu(updates), weights, accumulate=accumulate, variant=variant)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def test_more_layers_than_one_launch_takes(variant, rng):
    # 1,300 layers: more than the table of a launch holds, of different lengths
    updates = [[clients(rng, 1, 1 + j % 50, "float32")[0] for j in range(1300)] for _ in range(3)]
    want = combine(updates, [1, 2, 3])
    got = combine(to_gpu(updates), [1, 2, 3], variant=variant)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_clients_than_one_launch_takes(variant, dtype, accumulate, rng):
    rows, weights = clients(rng, 4500, 70, dtype), rng.uniform(-1, 1, 4500)
    options = {"accumulate": accumulate, "divisor": 3.0}
    got = combine(to_gpu(rows), weights, variant=variant, **options)
    assert_same_bits(got, combine(rows, weights, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views_and_guarded_output(variant, dtype, rng):
    for size in (1, 9, 1024, 5000):
        for offset in (0, 1, 3):
            rows = clients(rng, 3, size + offset, dtype)
            buffer = torch.full((size + 64,), 7, dtype=getattr(torch, dtype), device=DEVICE)
            out = buffer[32 + offset : 32 + offset + size]
            views = [r[offset:] for r in to_gpu(rows)]
            combine(views, [1, 2, 3], out=out, nonfinite="propagate", variant=variant)
            assert_same_bits(out, combine([r[offset:] for r in rows], [1, 2, 3]))
            assert (buffer[: 32 + offset] == 7).all()
            assert (buffer[32 + offset + size :] == 7).all()


def test_out_may_be_an_input(variant, rng):
    rows = clients(rng, 3, 10_000, "float32")
    want = combine(rows, [1, 2, 3])
    on_gpu = to_gpu(rows)
    result = combine(on_gpu, [1, 2, 3], out=on_gpu[1], nonfinite="propagate", variant=variant)
    assert result is on_gpu[1]
    assert_same_bits(result, want)


def test_strided_and_stacked_inputs(variant, rng):
    base = torch.from_numpy(rng.standard_normal((6, 40, 30)).astype(np.float32))
    on_gpu = base.to(DEVICE)
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert_same_bits(combine(on_gpu, weights, variant=variant), combine(base, weights))
    got = combine(on_gpu.transpose(1, 2), weights, variant=variant)
    assert_same_bits(got, combine(base.transpose(1, 2), weights))


def test_indices_beyond_32_bits(variant):
    numel = (1 << 31) + 4099  # bfloat16: 4 GiB a row
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    rows = [torch.full((numel,), v, dtype=torch.bfloat16, device=DEVICE) for v in (1.0, 2.0)]
    rows[0][-3:] = 5.0
    out = combine(rows, [1.0, 0.5], nonfinite="propagate", variant=variant)
    assert (out[:-3] == 2).all() and (out[-3:] == 6).all()
    del rows, out
    bits = random_bits(1 << 31, 3, offset=5, device=DEVICE, variant=variant)[-4:]
    assert_same_bits(bits, random_bits(4, 3, offset=5 + (1 << 31) - 4, device="cpu"))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("make", FORMS)
def test_random_values_have_the_bits_of_the_cpu_kernel(variant, make):
    dtype = FORMS[make]
    last = 2**32 - 1
    for name in (
        {"seed": 0},
        {"seed": 2**64 - 1, "round": last, "tensor": last, "client": last},
        {"seed": 2**31, "round": 1, "tensor": 2**31, "client": 1},
    ):
        for size in (1, 5, 4096, 70_001):
            for offset in (0, 1, 2, 3, 2**32 - 3, 2**34 - 70_001):
                out = torch.zeros(size + 8, device=DEVICE).view(dtype)
                make(size, **name, offset=offset, out=out[4:-4], variant=variant)
                want = make(size, **name, offset=offset, device="cpu")
                assert_same_bits(out[4:-4], want, (name, size, offset))
                assert not out[:4].cpu().view(torch.int32).any()
                assert not out[-4:].cpu().view(torch.int32).any()


# ---- accumulator -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ACCUMULATE)
def test_accumulator_has_the_bits_of_the_cpu(variant, dtype, rng):
    sizes = (1, 33, 4097)
    updates = [[clients(rng, 1, s, d)[0] for s in sizes for d in DTYPES] for _ in range(6)]
    like = to_gpu(updates[0])
    weights = (3.0, 1.0, 0.0, 2.0, 7.0, 5.0)
    there = [Accumulator(like, dtype=dtype, variant=variant) for _ in range(2)]
    here = [Accumulator(updates[0], dtype=dtype) for _ in range(2)]
    for i, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        there[i % 2].add(to_gpu(update), weight)
        here[i % 2].add(update, weight)
    got = there[0].merge(there[1]).result()
    want = here[0].merge(here[1]).result()
    for one, other in zip(got, want, strict=True):
        assert one.device.type == DEVICE
        assert_same_bits(one, other)


# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_policies(variant, dtype, value, rng):
    rows = to_gpu(clients(rng, 4, 5000, dtype))
    rows[2][[3, 4999]] = value
    weights = [1.0, 2.0, -1.0, 0.5]
    with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
        combine(rows, weights, variant=variant)
    assert caught.value.clients == (2,)
    left = combine(rows, weights, nonfinite="exclude", variant=variant)
    unread = combine(rows, [1.0, 2.0, 0.0, 0.5], variant=variant)
    assert_same_bits(left, unread)
    through = combine(rows, weights, nonfinite="propagate", variant=variant)
    assert (~torch.isfinite(through)).nonzero().flatten().tolist() == [3, 4999]


def test_overflow_of_finite_inputs_is_named(variant):
    rows = [torch.full((5,), 3e38, device=DEVICE) for _ in range(2)]
    with pytest.raises(NonFiniteError, match="finite but their sum overflows"):
        combine(rows, [1, 1], variant=variant)
    with pytest.raises(InvalidInputError, match=r"2\^46"):
        combine(rows, [1, 1], accumulate="reproducible", variant=variant)


# ---- streams and graphs ------------------------------------------------------------------------


def busy(stream_cycles: int = 50_000_000) -> None:
    """Keep the current stream busy for tens of milliseconds."""
    torch.cuda._sleep(stream_cycles)


def test_work_is_queued_on_the_current_stream(variant, rng):
    """A launch on another stream would read the inputs before they are written."""
    source = clients(rng, 4, 100_000, "float32")
    ready = to_gpu(source)
    rows = [torch.zeros_like(r) for r in ready]
    out, noise = torch.zeros_like(ready[0]), torch.empty(1000, device=DEVICE)
    options = {"out": out, "nonfinite": "propagate", "variant": variant}
    combine(rows, [1, 2, 3, 4], **options)  # compiles the Triton kernels
    random_uniform(1000, 1, out=noise, variant=variant)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        for row, values in zip(rows, ready, strict=True):
            row.copy_(values)
        noise.zero_()
        combine(rows, [1, 2, 3, 4], **options)
        random_uniform(1000, 1, out=noise, variant=variant)
        total, noise_copy = out.clone(), noise.clone()
    stream.synchronize()
    assert_same_bits(total, combine(source, [1, 2, 3, 4]))
    assert_same_bits(noise_copy, random_uniform(1000, 1, device="cpu"))


def test_propagate_never_waits_for_the_device(variant, rng):
    rows = to_gpu(clients(rng, 4, 100_000, "float32"))
    out = torch.empty_like(rows[0])
    options = {"out": out, "nonfinite": "propagate", "variant": variant}
    combine(rows, [1, 2, 3, 4], **options)
    torch.cuda.synchronize()
    busy()
    pending = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        combine(rows, [1, 2, 3, 4], **options)
        pending.record()
        assert not pending.query(), "the call returned after the stream had drained"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_captured_graph_replays_with_new_inputs(variant, rng):
    first, second = clients(rng, 9, 20_000, "float32"), clients(rng, 9, 20_000, "float32")
    weights = rng.uniform(-1, 1, 9)
    rows = to_gpu(first)
    out, noise = torch.empty_like(rows[0]), torch.empty(1000, device=DEVICE)

    def step() -> None:
        combine(rows, weights, out=out, nonfinite="propagate", divisor=2.0, variant=variant)
        random_uniform(1000, 5, out=noise, variant=variant)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles what has to be compiled
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for values in (second, first):
        for row, x in zip(rows, values, strict=True):
            row.copy_(x)
        out.fill_(-1)
        noise.fill_(-1)
        torch.empty(1 << 20, device=DEVICE).fill_(3)  # memory that a lost table would be read from
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out, combine(values, weights, divisor=2.0))
        assert_same_bits(noise, random_uniform(1000, 5, device="cpu"))


def test_a_device_that_is_not_the_current_one(variant, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    rows = clients(rng, 3, 5000, "float32")
    got = combine([r.to("cuda:1") for r in rows], [1, 2, 3], variant=variant)
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(got, combine(rows, [1, 2, 3]))


# ---- choice of variant, torch ------------------------------------------------------------------


def test_default_is_a_compiled_variant(rng):
    chosen = _variants.choose("combine", DEVICE)
    assert chosen.__module__ != "flcore.reference.combine"
    rows = clients(rng, 3, 3000, "bfloat16")
    assert_same_bits(Mean()(to_gpu(rows)), Mean()(rows))


def test_cpu_variant_refuses_device_memory(rng):
    from flcore.errors import VariantUnavailableError

    with pytest.raises(VariantUnavailableError, match="CPU memory only"):
        combine(to_gpu(clients(rng, 2, 4, "float32")), [1, 1], variant="cpu")


def test_gradient_and_compile_on_the_device(rng):
    rows = to_gpu(clients(rng, 3, 100, "float32"))
    for row in rows:
        row.requires_grad_()
    combine(rows, [1.0, 2.0, 3.0], divisor=2.0).sum().backward()
    for row, scale in zip(rows, (0.5, 1.0, 1.5), strict=True):
        assert (row.grad == scale).all()
    plain = [row.detach() for row in rows]
    compiled = torch.compile(lambda xs: combine(xs, [1.0, 2.0, 3.0]) + 1, fullgraph=True)
    assert_same_bits(compiled(plain), combine(plain, [1.0, 2.0, 3.0]) + 1)

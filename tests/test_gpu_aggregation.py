"""Order statistics, norms, distances and products on a CUDA device: kernels/select.cu, gram.cu."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops import gram, select
from flcore.ops.select import MEDIANS
from flcore.reference.gram import KINDS
from flcore.reference.select import OPS
from support import DTYPES

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# One to four coordinates a thread in registers; columns of shared memory, whole and cut short
COUNTS = (1, 2, 3, 7, 8, 9, 16, 17, 24, 25, 31, 32, 33, 47, 64, 65, 100, 128, 129, 300)


@pytest.fixture(params=["cuda"])
def variant(request) -> str:
    for op in ("select", "gram"):
        if why := _variants.available(op, DEVICE)[request.param]:
            pytest.skip(why)
    return request.param


def clients(rng, n: int, size: int, dtype: str, ties: bool = False) -> list[torch.Tensor]:
    """n rows on the CPU; `ties` draws from few values, zeros of both signs among them."""
    rows = [rng.standard_normal(size) for _ in range(n)]
    if ties:
        rows = [np.round(2 * row) / 2 for row in rows]
    return [torch.from_numpy(row).to(getattr(torch, dtype)) for row in rows]


def to_gpu(update):
    if isinstance(update, torch.Tensor):
        return update.to(DEVICE)
    return [to_gpu(x) for x in update]


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, what=None) -> None:
    """The same bits; any NaN is as good as another."""
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.cpu(), want.cpu()
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan), what
    assert torch.equal(got[~nan].view(torch.uint8), want[~nan].view(torch.uint8)), what


# ---- select ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_has_the_bits_of_the_cpu_kernel(variant, dtype, op, rng):
    for i, n in enumerate(COUNTS):
        size = (1, 5, 511, 1025, 4099, 70_001)[i % 6]
        options = {"median": MEDIANS[i % 3]}
        if op != "median":
            options |= {
                "f": int(rng.integers(0, (n + 1) // 2)),
                "keep": int(rng.integers(1, n + 1)),
            }
        rows = clients(rng, n, size, dtype, ties=i % 2 == 1)
        got = select(to_gpu(rows), op, variant=variant, **options)
        assert got.device.type == DEVICE
        assert_same_bits(got, select(rows, op, variant="cpu", **options), (n, size, options))


@pytest.mark.parametrize("op", OPS)
def test_every_register_network(variant, op, rng):
    for n in range(1, 33):
        rows = clients(rng, n, 3001, "float32", ties=n % 2 == 1)
        options = {} if op == "median" else {"f": (n - 1) // 2, "keep": n // 2 + 1}
        got = select(to_gpu(rows), op, variant=variant, **options)
        assert_same_bits(got, select(rows, op, variant="cpu", **options), n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_of_mixed_rows(variant, dtype, rng):
    for n, m in ((3, 2), (10, 10), (20, 17), (7, 40), (50, 33)):
        mix = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.5)
        mix[:, 1] = 0  # a row nobody reads
        rows = clients(rng, n, 2000, dtype)
        rows[1][:] = float("nan")
        for op in OPS:
            options = {"f": (m - 1) // 2, "keep": (m + 1) // 2, "mix": mix}
            got = select(to_gpu(rows), op, variant=variant, **options)
            assert_same_bits(got, select(rows, op, variant="cpu", **options), (n, m, op))


def test_select_of_layers_of_all_dtypes(variant, rng):
    sizes = (1, 64, 0, 1024, 3000, 7)
    updates = [
        [clients(rng, 1, size, dtype)[0] for size in sizes for dtype in DTYPES] for _ in range(9)
    ]
    for options in ({"f": 2}, {"f": 2, "mix": np.eye(9)}):
        want = select(updates, "trimmed_mean", **options)
        got = select(to_gpu(updates), "trimmed_mean", variant=variant, **options)
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("n", [5, 40])
def test_select_of_more_layers_than_one_launch_takes(variant, n, rng):
    updates = [[clients(rng, 1, 1 + j % 50, "float32")[0] for j in range(600)] for _ in range(n)]
    got, want = select(to_gpu(updates), variant=variant), select(updates)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views_and_guarded_output(variant, dtype, rng):
    for n in (3, 12, 30, 35):
        for size in (9, 5000):
            for offset in (0, 1, 3):
                rows = clients(rng, n, size + offset, dtype)
                buffer = torch.full((size + 64,), 7, dtype=getattr(torch, dtype), device=DEVICE)
                out = buffer[32 + offset : 32 + offset + size]
                on_gpu = [r[offset:] for r in to_gpu(rows)]
                options = {"f": 1, "nonfinite": "propagate"}
                select(on_gpu, "trimmed_mean", out=out, variant=variant, **options)
                want = select([r[offset:] for r in rows], "trimmed_mean", f=1)
                assert_same_bits(out, want, (n, size, offset))
                assert (buffer[: 32 + offset] == 7).all()
                assert (buffer[32 + offset + size :] == 7).all()


@pytest.mark.parametrize("n", [5, 40])
def test_select_where_out_is_an_input(variant, n, rng):
    rows = clients(rng, n, 10_000, "float32")
    want = select(rows, "near_median", f=1)
    on_gpu = to_gpu(rows)
    options = {"f": 1, "out": on_gpu[1], "nonfinite": "propagate"}
    assert select(on_gpu, "near_median", variant=variant, **options) is on_gpu[1]
    assert_same_bits(on_gpu[1], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [6, 40])
def test_select_of_non_finite_values(variant, n, dtype, rng):
    rows = clients(rng, n, 5000, dtype)
    rows[1][[3, 4000]] = float("inf")
    rows[4][[3, 4999]] = float("nan")
    on_gpu = to_gpu(rows)
    for op in OPS:
        with pytest.raises(NonFiniteError, match=r"updates\[1\], updates\[4\]"):
            select(on_gpu, op, f=2, variant=variant)
        for policy in ("exclude", "propagate"):
            got = select(on_gpu, op, f=2, nonfinite=policy, variant=variant)
            assert_same_bits(got, select(rows, op, f=2, nonfinite=policy), (op, policy))


def test_select_refuses_too_many_rows(variant, rng):
    rows = clients(rng, 1024, 40, "float64")
    got = select(to_gpu(rows), "trimmed_mean", f=100, variant=variant)
    assert_same_bits(got, select(rows, "trimmed_mean", f=100))
    with pytest.raises(InvalidInputError, match="at most 1024 client rows"):
        select(to_gpu([*rows, rows[0]]), variant=variant)


def test_select_beyond_32_bits(variant):
    numel = (1 << 31) + 4099  # bfloat16: 4 GiB a row
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    values = (1.0, 2.0, 7.0)
    rows = [torch.full((numel,), v, dtype=torch.bfloat16, device=DEVICE) for v in values]
    rows[0][-3:] = 5.0
    out = select(rows, nonfinite="propagate", variant=variant)
    assert (out[:-3] == 2).all() and (out[-3:] == 5).all()
    found = gram(rows, variant=variant).distances
    assert found[0, 1] == numel - 3 + 9 * 3 and found[1, 2] == 25.0 * numel
    del rows, out
    torch.cuda.empty_cache()


# ---- gram --------------------------------------------------------------------------------------


def assert_close(got, want, kind: str, wide: bool, what=None) -> None:
    got, want = getattr(got, kind), getattr(want, kind)
    assert got.shape == want.shape
    size = np.abs(want).max() if kind == "products" else np.abs(want)
    # 64 terms in float32, each rounded three times, and everything else in float64
    assert (np.abs(got - want) <= (1e-13 if wide else 3e-7) * size).all(), what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matches_the_reference(variant, dtype, kind, rng):
    # every number of row blocks of four, several blocks of 32, tiles cut short
    for n in (1, 2, 4, 5, 8, 9, 13, 16, 17, 21, 25, 29, 32, 33, 64, 70, 128):
        rows = clients(rng, n, (1, 129, 2100)[n % 3], dtype)
        for precision in ("auto", "float64"):
            options = {"precision": precision}
            got = gram(to_gpu(rows), kind, variant=variant, **options)
            want = gram(rows, kind, variant="reference", **options)
            wide = precision == "float64" or dtype == "float64"
            assert_close(got, want, kind, wide, (n, precision))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 10, 32, 40])
def test_gram_is_the_same_in_every_run(variant, n, kind, rng):
    size = 1_500_001  # units of several tiles
    rows = [torch.randn(size, device=DEVICE) for _ in range(n)]
    first = getattr(gram(rows, kind, variant=variant), kind)
    for _ in range(3):
        assert (getattr(gram(rows, kind, variant=variant), kind) == first).all()
    want = gram([r.cpu() for r in rows], kind)
    assert_close(gram(rows, kind, variant=variant), want, kind, False)


def test_gram_of_rows_that_share_an_offset(variant, rng):
    rows = [(torch.from_numpy(rng.normal(0, 1e-2, 100_000)) + 10).float() for _ in range(6)]
    got = gram([*to_gpu(rows), to_gpu(rows[0])], variant=variant).distances
    assert got[0, 6] == 0
    want = gram([*rows, rows[0]], variant="reference").distances
    assert (np.abs(got - want) <= 3e-7 * want).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_gram_of_layers_of_all_dtypes(variant, per_layer, rng):
    sizes = (1, 64, 0, 1024, 3000, 7)
    updates = [
        [clients(rng, 1, size, dtype)[0] for size in sizes for dtype in DTYPES] for _ in range(9)
    ]
    for kind in KINDS:
        got = gram(to_gpu(updates), kind, per_layer=per_layer, variant=variant)
        want = gram(updates, kind, per_layer=per_layer, variant="reference")
        np.testing.assert_allclose(getattr(got, kind), getattr(want, kind), rtol=1e-9, atol=1e-9)


def test_gram_of_more_layers_than_one_launch_takes(variant, rng):
    updates = [[clients(rng, 1, 1 + j % 50, "float32")[0] for j in range(900)] for _ in range(10)]
    got = gram(to_gpu(updates), per_layer=True, variant=variant)
    assert_close(got, gram(updates, per_layer=True, variant="reference"), "distances", False)


def test_gram_widens_by_itself_and_names_non_finite_rows(variant, rng):
    rows = to_gpu([row * 1e25 for row in clients(rng, 5, 3000, "float32")])
    found = gram(rows, variant=variant)
    assert found.precision == "float64" and np.isfinite(found.distances).all()
    rows[3][2999] = float("inf")
    with pytest.raises(NonFiniteError, match=r"updates\[3\]"):
        gram(rows, variant=variant)
    assert gram(rows, nonfinite="exclude", variant=variant).nonfinite == (3,)


# ---- sanitizers, streams and graphs ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_calls_of_both_kernels(variant, dtype, rng):
    """Few values through every path; what compute-sanitizer runs."""
    for n in (4, 11, 27, 40):
        for start in (0, 1):  # words, single values
            rows = [r[start:] for r in clients(rng, n, 1300, dtype)]
            on_gpu = to_gpu(rows)
            for op in ("median", "near_trimmed"):
                got = select(on_gpu, op, f=1, variant=variant)
                assert_same_bits(got, select(rows, op, f=1), (n, op))
            for kind in KINDS:
                got, want = gram(on_gpu, kind, variant=variant), gram(rows, kind)
                assert_close(got, want, kind, dtype == "float64", (n, kind))
    mix = rng.standard_normal((3, 40))
    assert_same_bits(select(on_gpu, mix=mix, variant=variant), select(rows, mix=mix))


def busy(stream_cycles: int = 50_000_000) -> None:
    """Keep the current stream busy for tens of milliseconds."""
    torch.cuda._sleep(stream_cycles)


@pytest.mark.parametrize("n", [9, 40])
def test_work_is_queued_on_the_current_stream(variant, n, rng):
    """A launch on another stream would read the inputs before they are written."""
    source = clients(rng, n, 100_000, "float32")
    ready = to_gpu(source)
    rows = [torch.zeros_like(r) for r in ready]
    out = torch.zeros_like(ready[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        for row, values in zip(rows, ready, strict=True):
            row.copy_(values)
        select(rows, "trimmed_mean", f=2, out=out, nonfinite="propagate", variant=variant)
        total = out.clone()
        found = gram(rows, "norms", variant=variant).norms
    stream.synchronize()
    assert_same_bits(total, select(source, "trimmed_mean", f=2))
    np.testing.assert_allclose(found, gram(source, "norms").norms, rtol=3e-7)


@pytest.mark.parametrize("n", [9, 40])
def test_propagate_never_waits_for_the_device(variant, n, rng):
    rows = to_gpu(clients(rng, n, 100_000, "float32"))
    options = {"out": torch.empty_like(rows[0]), "nonfinite": "propagate", "variant": variant}
    select(rows, **options)
    torch.cuda.synchronize()
    busy()
    pending = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(rows, **options)
        pending.record()
        assert not pending.query(), "the call returned after the stream had drained"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.parametrize("n", [9, 40])
def test_captured_graph_replays_with_new_inputs(variant, n, rng):
    first, second = clients(rng, n, 20_000, "float32"), clients(rng, n, 20_000, "float32")
    rows = to_gpu(first)
    options = {"out": torch.empty_like(rows[0]), "nonfinite": "propagate", "variant": variant}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        select(rows, "near_median", f=2, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(rows, "near_median", f=2, **options)
    for values in (second, first):
        for row, x in zip(rows, values, strict=True):
            row.copy_(x)
        options["out"].fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(options["out"], select(values, "near_median", f=2))


def test_default_is_the_compiled_variant(variant):
    for op in ("select", "gram"):
        assert _variants.choose(op, DEVICE).__module__ == f"flcore.ops._{op}_cuda"

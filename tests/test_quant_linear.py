"""`flcore.nn.QuantLinear`: values, gradients, types, operators, compilation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flcore import _torch_qmatmul
from flcore.errors import DTypeError, InvalidInputError
from flcore.nn import QuantLinear
from flcore.quantization import Scheme
from quant_layers import SCHEMES, close, layer_of, plain


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


# ---- values and gradients ------------------------------------------------------------------------


def test_by_hand():
    """W = [[-7, 7], [3.5, 0]] exactly, adapters of rank 1 with scaling 2."""
    linear = torch.nn.Linear(2, 2)
    linear.weight.data = torch.tensor([[-7.5, 7.0], [3.5, 0.0]])
    linear.bias.data = torch.tensor([1.0, -1.0])
    scheme = Scheme(bits=4, group=-1, kind="symmetric", rule="centred", scale_dtype="float32")
    layer = QuantLinear.from_linear(linear, scheme, lora_rank=1, lora_alpha=2)
    w = layer.weight.dequantize()
    assert torch.allclose(w[0], torch.tensor([-7.5, 7.0]), atol=0.51)
    layer.lora_a.data = torch.tensor([[1.0, 2.0]])
    layer.lora_b.data = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[1.0, 1.0]])
    want = w.sum(1) + torch.tensor([1.0, -1.0]) + 2 * 3 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(layer(x)[0], want)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_and_gradients(scheme, rank):
    for n, k, lead in ((37, 100, (5,)), (16, 64, (2, 3)), (1, 33, (1,)), (130, 257, (40,))):
        layer = layer_of(scheme, n, k, rank)
        layer.bias.requires_grad_()
        x = torch.randn(*lead, k, requires_grad=True)
        want, leaves = plain(layer, x)
        y = layer(x)
        assert y.shape == want.shape and y.dtype == torch.float32
        close(y, want, torch.float32)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        g = torch.randn_like(y)
        y.backward(g)
        want.backward(g.double())
        close(x.grad, leaves["x"].grad, torch.float32)
        for name in ("bias", "lora_a", "lora_b"):
            if leaves[name] is not None:
                close(getattr(layer, name).grad, leaves[name].grad, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_inputs(dtype):
    layer = layer_of("int4-asym", rank=3)
    x = torch.randn(6, 100).to(dtype).requires_grad_()
    want, leaves = plain(layer, x)
    y = layer(x)
    assert y.dtype == dtype
    close(y, want, dtype)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g.double())
    assert x.grad.dtype == dtype and layer.lora_a.grad.dtype == torch.float32
    # a sum over 37 outputs, or 6 rows, of values that were rounded to the dtype
    close(x.grad, leaves["x"].grad, dtype)
    wide = torch.float32 if dtype == torch.float64 else dtype  # gradients of float32 adapters
    for name in ("lora_a", "lora_b"):
        close(getattr(layer, name).grad, leaves[name].grad, wide)


def test_gradcheck():
    layer = layer_of("nf4", 5, 18, rank=2)
    tensors = [torch.randn(3, 18), torch.randn(5), layer.lora_a.detach(), layer.lora_b.detach()]
    leaves = [t.double().requires_grad_() for t in tensors]

    def run(x, bias, a, b):
        return _torch_qmatmul.linear(x, layer.parts, bias, a, b, scaling=0.5)

    assert torch.autograd.gradcheck(run, leaves)


def test_the_gradient_is_the_adjoint():
    """<J v, g> = <v, J^T g>, the identity that a wrong nibble breaks."""
    for scheme in SCHEMES:
        layer = layer_of(scheme, 70, 90, rank=2, bias=False)
        x = torch.randn(9, 90, requires_grad=True)
        v, g = torch.randn(9, 90), torch.randn(9, 70)
        (back,) = torch.autograd.grad(layer(x), x, g)
        left, right = (layer(v) * g).double().sum(), (v * back).double().sum()
        assert abs(left - right) <= 1e-4 * g.norm() * v.norm()


def test_eight_bit_activations_pass_the_gradient_straight_through():
    layer = layer_of("int4", 48, 128, rank=2, activation_bits=8)
    x = torch.randn(7, 128, requires_grad=True)
    want, leaves = plain(layer, x)
    y = layer(x)
    error = (y.double() - want).norm() / want.norm()
    assert 1e-5 < error < 0.02  # rounded to 8 bits, and no worse
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g.double())
    close(x.grad, leaves["x"].grad, torch.float32)
    close(layer.lora_a.grad, leaves["lora_a"].grad, torch.float32)
    with pytest.raises(DTypeError, match="activation_bits"):
        layer_of("nf4", activation_bits=8)
    with pytest.raises(InvalidInputError, match="activation_bits: expected 16 or 8"):
        layer_of("int4", activation_bits=4)


def test_only_what_is_needed_is_kept_and_computed():
    layer = layer_of("int4", bias=True)
    x = torch.randn(4, 100, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = layer(x)
    assert x.shape not in saved  # a frozen layer keeps none of its activations
    y.sum().backward()
    assert layer.bias.grad is None and x.grad is not None
    layer = layer_of("int4", rank=2)
    layer(x.detach()).sum().backward()  # inputs of the first layer need no gradient
    assert layer.lora_a.grad is not None


def test_backward_twice_and_no_second_derivative():
    layer = layer_of("int4", rank=2)
    x = torch.randn(4, 100, requires_grad=True)
    y = layer(x).sum()
    leaves = (x, layer.lora_a, layer.lora_b)
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * y, leaves, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)
    for grad in torch.autograd.grad(y, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward(retain_graph=True)


def test_autocast():
    layer, x = layer_of("int4", rank=2), torch.randn(4, 100, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.nn.functional.linear(x, torch.zeros(3, 100)).dtype
    assert torch.equal(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.lora_b.grad.dtype == torch.float32


def test_empty_and_strided_inputs():
    layer = layer_of("int3", rank=2)
    assert layer(torch.empty(0, 100)).shape == (0, 37)
    assert layer(torch.empty(2, 0, 100)).shape == (2, 0, 37)
    wide = torch.randn(5, 200)
    torch.testing.assert_close(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))
    torch.testing.assert_close(layer(wide[0, :100]), layer(wide[:1, :100])[0])
    with pytest.raises(InvalidInputError, match="x: expected a last dimension of 100"):
        layer(torch.zeros(3, 99))
    with pytest.raises(DTypeError, match="x: expected"):
        layer(torch.zeros(3, 100, dtype=torch.int32))


# ---- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "rank"), [("int4", 0), ("int4-asym", 2), ("nf4", 2)])
def test_opcheck(scheme, rank):
    layer = layer_of(scheme, 20, 48, rank)
    layer.bias.requires_grad_()
    x = torch.randn(3, 48, requires_grad=True)
    rest = (layer.bias, layer.lora_a, layer.lora_b, layer.scaling)
    torch.library.opcheck(_torch_qmatmul.qmatmul, (x, *layer.parts, *rest))
    if scheme != "nf4":
        torch.library.opcheck(_torch_qmatmul.qmatmul_int8, (x, *layer.parts, *rest))
    low = torch.randn(3, 2) if rank else None
    up = layer.lora_a.detach() if rank else None
    torch.library.opcheck(_torch_qmatmul.qmatmul_dx, (torch.randn(3, 20), *layer.parts, low, up))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    model = torch.nn.Sequential(
        layer_of("int4", 64, 48, 2), torch.nn.GELU(), layer_of("nf4", 8, 64)
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(5, 48, requires_grad=True)
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    a = model[0].lora_a
    for slope, other in zip(
        torch.autograd.grad(got.sum(), (x, a)), torch.autograd.grad(want.sum(), (x, a)), strict=True
    ):
        torch.testing.assert_close(slope, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)


def test_fake_tensors_have_the_right_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = layer_of("int4", rank=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(4, 6, 100, dtype=torch.bfloat16))
    assert y.shape == (4, 6, 37) and y.dtype == torch.bfloat16

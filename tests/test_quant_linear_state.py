"""`flcore.nn.QuantLinear`: adapters, checkpoints, state, copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.nn import QuantLinear
from flcore.quantization import Scheme, quantize
from quant_layers import close, layer_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


# ---- adapters ------------------------------------------------------------------------------------


def test_adapters_start_without_effect_and_alone_are_trained():
    linear = torch.nn.Linear(100, 37)
    layer = QuantLinear.from_linear(linear, "int4", lora_rank=8)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert set(layer.adapter_state_dict()) == {"lora_a", "lora_b"} and layer.scaling == 2
    x = torch.randn(3, 100)
    torch.testing.assert_close(layer(x), QuantLinear.from_linear(linear, "int4")(x))
    for wrong in (-1, 1.5, True):
        with pytest.raises(InvalidInputError, match="lora_rank"):
            QuantLinear.from_linear(linear, "int4", lora_rank=wrong)
    with pytest.raises(InvalidInputError, match="lora_alpha"):
        QuantLinear.from_linear(linear, "int4", lora_rank=2, lora_alpha=0)


def test_training_the_adapters_lowers_a_loss():
    layer = layer_of("int4", rank=4)
    target = layer.weight.dequantize() + torch.randn(37, 2) @ torch.randn(2, 100) / 10
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    x = torch.randn(64, 100)
    losses = []
    codes = layer.codes.clone()
    for _ in range(40):
        loss = (layer(x) - layer.bias - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and torch.equal(layer.codes, codes)


def test_merge():
    layer = layer_of("int4", rank=4)
    x = torch.randn(5, 100)
    merged = layer.merge()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), layer(x))
    wide = layer.merge("int8")
    assert isinstance(wide, QuantLinear) and wide.lora_rank == 0 and wide.scheme.bits == 8
    assert (wide(x) - layer(x)).norm() < 0.02 * layer(x).norm()
    torch.testing.assert_close(layer_of("nf4", bias=False).merge().bias, None)


# ---- checkpoints ---------------------------------------------------------------------------------


def gptq_words(q) -> torch.Tensor:
    """(k, n) codes of 4 bits as (k / 8, n) words."""
    words = sum(q[i::8].astype(np.int64) << (4 * i) for i in range(8))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def test_from_awq_and_from_quantized():
    rng = np.random.default_rng(0)
    q, z = rng.integers(0, 16, (64, 16)), rng.integers(0, 16, (2, 16))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = [
        torch.from_numpy(
            sum(m[:, o::8].astype(np.int64) << (4 * i) for i, o in enumerate(order))
            .astype(np.uint32)
            .view(np.int32)
        )
        for m in (q, z)
    ]
    s = torch.rand(2, 16).half()
    bias = torch.randn(16).half()
    layer = QuantLinear.from_awq(*words, s, bias, lora_rank=2)
    w = (torch.from_numpy(q) - torch.from_numpy(z).repeat_interleave(32, 0)) * s.repeat_interleave(
        32, 0
    ).double()
    x = torch.randn(3, 64)
    close(layer(x), x.double() @ w + bias.double(), torch.float32)
    again = QuantLinear.from_quantized(layer.weight, layer.bias)
    torch.testing.assert_close(again(x), layer(x))


def test_from_gptq_with_scattered_groups():
    rng = np.random.default_rng(1)
    q, z = rng.integers(0, 16, (64, 8)), rng.integers(0, 16, (4, 8))
    g_idx = torch.from_numpy(rng.permutation(np.arange(64) // 16))
    s = torch.rand(4, 8).half()
    qzeros = gptq_words(z.T.copy()).T.contiguous()
    layer = QuantLinear.from_gptq(gptq_words(q), qzeros, s, zero_offset=0, g_idx=g_idx)
    w = (torch.from_numpy(q) - torch.from_numpy(z)[g_idx]) * s[g_idx].double()
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    close(y, x.double() @ w, torch.float32)
    close(layer.dequantize(), w.T, torch.float32)
    close(layer.merge()(x), y, torch.float32)
    y.sum().backward()
    close(x.grad, w.sum(1).expand(3, 64), torch.float32)
    plain = QuantLinear.from_gptq(gptq_words(q), qzeros, s, zero_offset=0)
    assert plain.input_order is None
    with pytest.raises(CheckpointError, match="input_order"):
        plain.load_state_dict(layer.state_dict())


def test_wrong_parts():
    with pytest.raises(DTypeError, match="weight: expected a QuantizedTensor, got Tensor"):
        QuantLinear(torch.zeros(3, 4))
    with pytest.raises(DTypeError, match=r"linear: expected a torch.nn.Linear"):
        QuantLinear.from_linear(torch.nn.ReLU())
    weight = quantize(torch.randn(4, 16), "int8")
    with pytest.raises(InvalidInputError, match="bias: expected 4 floats"):
        QuantLinear(weight, torch.zeros(3))
    with pytest.raises(InvalidInputError, match="input_order"):
        QuantLinear(weight, input_order=torch.zeros(16, dtype=torch.int64))


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4-asym", "int4-float-zero", "nf4"])
def test_state_round_trip(scheme, tmp_path):
    layer, other = layer_of(scheme, rank=3), layer_of(scheme, rank=3)
    x = torch.randn(4, 100)
    before = other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and not torch.equal(before, layer(x))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    third = layer_of(scheme, rank=3)
    third.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(third(x), layer(x))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    third.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(third(x), layer(x))


def test_a_state_of_another_scheme_or_a_damaged_one_is_refused():
    layer = layer_of("int4")
    with pytest.raises(CheckpointError, match="expected a weight"):
        layer.load_state_dict(layer_of(Scheme.of("int4", search="mse")).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        layer.load_state_dict(
            {**layer_of("int8").state_dict(), "_extra_state": layer.get_extra_state()}
        )
    with pytest.raises(CheckpointError, match="extra_state"):
        layer.load_state_dict({**layer.state_dict(), "_extra_state": torch.zeros(3).byte()})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({n: t for n, t in layer.state_dict().items() if n != "scales"})


def test_moves_and_types_leave_the_codes_alone():
    layer = layer_of("int4", rank=2)
    x = torch.randn(3, 100)
    want = layer(x)
    for change in (torch.nn.Module.bfloat16, torch.nn.Module.double, torch.nn.Module.float):
        change(layer)
        assert layer.codes.dtype == torch.uint8 and layer.scales.dtype == torch.float16
    close(layer(x), want, torch.bfloat16)  # adapters and bias were rounded on the way
    assert layer.lora_a.dtype == torch.float32
    there = layer.to("meta")
    assert there.codes.device.type == "meta" and there.scales.dtype == torch.float16


def test_copies_have_memory_of_their_own():
    layer = layer_of("int4", rank=2)
    x = torch.randn(3, 100)
    want = layer(x)
    twin = copy.deepcopy(layer)
    layer.codes.zero_()
    assert torch.equal(twin(x), want) and not torch.equal(layer(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), want)


def test_what_it_says_of_itself():
    layer = layer_of("nf4", 128, 256, rank=2)
    assert repr(layer) == (
        "QuantLinear(256, 128, bits=4, nf4, group=64, bias=True, lora_rank=2, scaling=2)"
    )
    assert layer.nbytes == 128 * 256 // 2 + 128 * 4 * 4
    assert "activation_bits=8" in repr(layer_of("int8", activation_bits=8))

"""`CPUWeight` against exact products, in both of its forms, and the layer that keeps one."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch

from lmops.ops.quantized_matmul_cpu import CPUWeight, cpu_weight_helps
from lmops.quantization import QuantizedTensor, QuantLinear
from lmops.testing import LAYOUTS, arrange, assert_accurate

pytestmark = [
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without fbgemm"),
    pytest.mark.skipif(
        os.environ.get("LMOPS_TRITON_ON_CPU") == "1", reason="tensors on the CPU are the kernel's, not torch's"
    ),
]
SHAPES = [(1, 1), (7, 33), (64, 128), (33, 100), (96, 160), (2, 1024)]


def made(n_out, n_in, format, group_size, kind, dtype=torch.float32, seed=0):
    """A random weight: "symmetric", with "zeros", with "offsets", or "permuted"."""
    draw = torch.Generator().manual_seed(seed)
    if format == "fp8":
        return QuantizedTensor.quantize(torch.randn(n_out, n_in, generator=draw), 8, -1, fp8=True)
    bits = 4 if format == "int4" else 8
    low, high = (0, 16) if bits == 4 else (-128, 128)
    groups = 1 if group_size == -1 else -(-n_in // group_size)
    codes = torch.randint(low, high, (n_out, n_in), generator=draw)
    scales = (torch.rand(n_out, groups, generator=draw) + 0.5).to(dtype)
    zeros = torch.randint(low, high, (n_out, groups), generator=draw) if kind == "zeros" else None
    offsets = torch.randn(n_out, groups, generator=draw) if kind == "offsets" else None
    index = None
    if kind == "permuted" and groups > 1:
        index = (torch.arange(n_in) // group_size)[torch.randperm(n_in, generator=draw)]
    return QuantizedTensor.from_codes(
        codes, scales, zeros, offsets, bits=bits, group_size=group_size, group_index=index
    )


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "offsets", "permuted"])
@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize(
    ("n_out", "n_in", "group_size"),
    [(*shape, size) for shape in SHAPES for size in (-1, 16, 32, 48) if size <= shape[1]],
)
def test_one_row_is_as_accurate_as_float32(n_out, n_in, group_size, format, kind):
    w = made(n_out, n_in, format, group_size, kind)
    x = torch.randn(1, n_in, generator=torch.Generator().manual_seed(1))
    exact = w.dequantize(torch.float64)
    # zero points and offsets are multiplied apart from the codes, as two terms that may cancel: so is the baseline
    parts = [w.codes().double()]
    if w.zeros is not None or w.offsets is not None:
        parts.append(exact - w.codes().double() * scales_of(w))
    baseline = x @ (parts[0] * scales_of(w)).float().T if len(parts) > 1 else x @ exact.float().T
    if len(parts) > 1:
        baseline = baseline + x @ parts[1].float().T
    weight = CPUWeight(w)
    assert_accurate(weight.matmul(x), x.double() @ exact.T, baseline)
    assert (weight._bags is None, weight._half is None) == (False, True)


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("n_out", [64, 130, 333])
def test_one_row_by_parts_of_the_outputs(n_out, format, monkeypatch):
    w, x = made(n_out, 96, format, 32, "offsets"), torch.randn(1, 96)
    whole = CPUWeight(w)
    expected = whole.matmul(x)
    monkeypatch.setattr("lmops.ops.quantized_matmul_cpu._SUMS", 64)
    parts = CPUWeight(w)
    assert torch.equal(parts.matmul(x), expected)
    assert (len(whole._bags.parts), len(parts._bags.parts)) == (1, -(-n_out // 64))


def scales_of(w):
    scales = w.scales.double().T
    size = w.shape[1] if w.group_size == -1 else w.group_size
    columns = scales.repeat_interleave(size, 1)[:, : w.shape[1]]
    return columns if w.permutation is None else columns[:, w.permutation.long().argsort()]


def assert_a_float32_product(y, x, weight):
    """The bound that a sum in any order has: n eps sum |x| |w| (Higham, Accuracy and Stability, 3.5)."""
    x, weight = x.double(), weight.double()
    bound = x.shape[-1] * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T)
    assert bool(((y - x @ weight.T).abs() <= bound).all())


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
@pytest.mark.parametrize("rows", [2, 9, 70])
def test_more_rows_round_the_weight_to_float16(rows, n_out, n_in, format):
    w = made(n_out, n_in, format, -1, "symmetric")
    x = torch.randn(rows, n_in, generator=torch.Generator().manual_seed(1))
    weight = CPUWeight(w)
    assert_a_float32_product(weight.matmul(x), x, w.dequantize().half())
    assert (weight._bags is None, weight._half is None) == (True, False)


def test_fp8_and_one_row():
    w = made(8, 32, "fp8", -1, "symmetric")
    x = torch.randn(1, 32)
    assert_a_float32_product(CPUWeight(w).matmul(x), x, w.dequantize().half())


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-8, 1e-5, 1e6, 7e37])
def test_weights_over_and_under_float16(magnitude):
    numbers = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    w = QuantizedTensor.quantize(numbers * magnitude, 8, 32)
    exact, x = w.dequantize(torch.float64), torch.randn(3, 32) / 10
    factor = 2.0 ** exact.abs().max().frexp().exponent.item()
    rounded = (exact / factor).half().double() * factor
    assert_a_float32_product(CPUWeight(w).matmul(x), x, rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64)])
def test_other_dtypes_and_ranks(shape, dtype):
    w, bias = made(24, 64, "int4", 32, "offsets"), torch.randn(24)
    x = torch.randn(shape).to(dtype)
    y = CPUWeight(w).matmul(x, bias)
    truth = x.double() @ w.dequantize(torch.float64).T + bias.double()
    baseline = torch.nn.functional.linear(x, w.dequantize().to(dtype), bias.to(dtype))
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 24))
    assert_accurate(y, truth, baseline)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 4])
def test_layouts_of_x(rows, layout):
    weight = CPUWeight(made(24, 64, "int4", 32, "zeros"))
    x = arrange(torch.randn(rows, 64), layout)
    assert torch.equal(weight.matmul(x), weight.matmul(x.contiguous()))


@torch.no_grad()
def test_a_layer_keeps_it_until_its_weight_changes():
    layer = QuantLinear.from_quantized(made(24, 64, "int4", 32, "symmetric"))
    other = QuantLinear.from_quantized(made(24, 64, "int4", 32, "symmetric", seed=1))
    x = torch.randn(1, 64)
    before, wanted = layer(x), other(x)
    kept = layer._cpu_weight
    assert kept is not None
    layer(x)
    assert layer._cpu_weight is kept
    for copied in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        assert copied._cpu_weight is None
        assert torch.equal(copied(x), before)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    assert "_cpu_weight" not in "".join(layer.state_dict())


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_where_it_does_not_help():
    layer = QuantLinear.from_quantized(made(24, 64, "int4", 32, "symmetric"), torch.zeros(24))
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert cpu_weight_helps(x, layer.packed, layer.bias)
        assert not cpu_weight_helps(x.double(), layer.packed, layer.bias)
        assert not cpu_weight_helps(x[:0], layer.packed, layer.bias)
        assert not cpu_weight_helps(x.to("meta"), layer.packed, layer.bias)
    assert not cpu_weight_helps(x, layer.packed, layer.bias)  # the bias wants a gradient
    assert not cpu_weight_helps(x.clone().requires_grad_(), layer.packed, None)
    assert cpu_weight_helps(x, layer.packed, None)
    with torch.no_grad():
        assert torch.compile(layer, backend="eager", fullgraph=True)(x).shape == (2, 24)
        with pytest.raises(
            ValueError, match=r"x must be \(\.\.\., 64\) for a weight of shape \(24, 64\), got \(2, 63\)"
        ):
            layer(x[:, :63])
        with pytest.raises(TypeError, match="x must be float16, bfloat16 or float32"):
            layer(x.long())

"""lmops.ops.int8_matmul: 8-bit products against the same codes multiplied in float64."""

import pytest
import torch

from lmops.ops.int8_matmul import int8_matmul, int8_matmul_forward
from lmops.quantization import QuantizedTensor
from lmops.reference.quantization import quantize_rows
from lmops.testing import arrange, assert_accurate

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def check(path, x, q, bias=None, smooth=None):
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = quantize_rows(rows if smooth is None else rows.float() / smooth.float(), q.format)
    truth = (codes.double() @ q.codes().double().T) * scales.double() * q.scales.double()
    truth = truth if bias is None else truth + bias.double()
    on = [None if t is None else t.to(path.device) for t in (bias, smooth)]
    y = int8_matmul(x.to(path.device), q.to(path.device), on[0], smooth=on[1])
    truth = truth.view(y.shape)
    assert_accurate(y, truth, truth.to(x.dtype))


@pytest.mark.parametrize(
    ("dtype", "scales", "shape", "rows"),
    [
        (BF16, BF16, (130, 600), 3), (HALF, FP32, (70, 64), 130), (FP32, HALF, (40, 1003), 17), (BF16, FP32, (1, 1), 1),
        (HALF, FP32, (17, 1), 4),
    ],
)  # fmt: skip
def test_int8(path, dtype, scales, shape, rows):
    x = torch.randn(rows, shape[1]).to(dtype)
    x[0] *= 100
    bias = torch.randn(shape[0]).to(dtype) if rows % 2 else None
    smooth = torch.rand(shape[1]) + 0.5 if rows == 3 else None
    check(path, x, QuantizedTensor.quantize(torch.randn(shape).to(scales), 8), bias, smooth)


def test_long_rows(path):
    """Rows that are read twice, since they do not fit a tile."""
    check(path, torch.randn(2, 9_000).bfloat16(), QuantizedTensor.quantize(torch.randn(5, 9_000), 8))


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
def test_layouts_of_x(path, layout):
    check(path, arrange(torch.randn(4, 3, 70).half(), layout), QuantizedTensor.quantize(torch.randn(9, 70), 8))


def test_zeros_nan_and_infinity(path):
    x = torch.randn(5, 70, device=path.device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 4] = float("inf")
    q = QuantizedTensor.quantize(torch.randn(9, 70), 8).to(path.device)
    y = int8_matmul(x, q).cpu()
    assert torch.equal(y[0], torch.zeros(9))
    assert y[1:3].isnan().all()
    assert y[3:].isfinite().all()
    assert int8_matmul(x[:0], q).shape == (0, 9)


def test_gradient_is_that_of_the_product_with_the_weight(path):
    q = QuantizedTensor.quantize(torch.randn(9, 70), 8)
    x, bias, smooth = torch.randn(2, 3, 70), torch.randn(9), torch.rand(70) + 0.5
    x, bias = (t.to(path.device).requires_grad_() for t in (x, bias))
    dy = torch.randn(2, 3, 9)
    y = int8_matmul(x, q.to(path.device), bias, smooth=smooth.to(path.device))
    dx, db = torch.autograd.grad(y, (x, bias), dy.to(path.device))
    assert_accurate(dx, dy.double() @ q.dequantize(torch.float64) / smooth.double(), dy @ q.dequantize() / smooth)
    torch.testing.assert_close(db.cpu(), dy.sum((0, 1)))


def test_fp8_where_the_target_has_it(path, request):
    q = QuantizedTensor.quantize(torch.randn(70, 200), 8, fp8=True)
    x = torch.randn(5, 200).bfloat16()
    device = request.config.option.device
    has = path.kind == "torch" or device == "sm_90"
    if device == "cuda":
        has = has or (torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9))
    if has:
        check(path, x, q)
    else:
        with pytest.raises(NotImplementedError, match="needs products of e4m3"):
            int8_matmul(x, q)


@pytest.mark.fake_tensors
def test_opcheck_and_compile(path):
    q = QuantizedTensor.quantize(torch.randn(9, 70), 8).to(path.device)
    x, bias = torch.randn(2, 3, 70, device=path.device), torch.randn(9, device=path.device)
    torch.library.opcheck(int8_matmul_forward, (x, q.packed, q.scales, None, bias, q.format))
    compiled = torch.compile(lambda x: int8_matmul(x, q, bias).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), int8_matmul(x, q, bias).sin())


Q = QuantizedTensor.quantize(torch.randn(6, 40), 8)
X = torch.randn(3, 40)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: int8_matmul(X, X), TypeError, "w must be a .*QuantizedTensor, got Tensor"),
        (lambda: int8_matmul(X, QuantizedTensor.quantize(X, 4)), ValueError, "w must have 8 bits, one scale a row"),
        (lambda: int8_matmul(X, QuantizedTensor.quantize(X, 8, 32)), ValueError, "w must have 8 bits, one scale a row"),
        (lambda: int8_matmul(X.double(), Q), TypeError, "x must be float16, bfloat16 or float32, got torch.float64"),
        (lambda: int8_matmul(X[:, :39], Q), ValueError, r"x must be \(..., 40\) for a weight of shape \(6, 40\)"),
        (lambda: int8_matmul(X, Q, torch.ones(5)), ValueError, r"bias must be \(6,\) floating point"),
        (lambda: int8_matmul(X, Q, smooth=torch.ones(6)), ValueError, r"smooth must be \(40,\) floating point"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

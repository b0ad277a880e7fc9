"""lmops.ops.quantized_matmul: the CPU implementation and the kernels against products with the dequantized weight."""

import pytest
import torch

from lmops.ops.quantized_matmul import (
    quantized_matmul,
    quantized_matmul_backward,
    quantized_matmul_forward,
    quantized_matmul_tile,
)
from lmops.quantization import QuantizedTensor
from lmops.reference.quantization import quantized_matmul as reference
from lmops.testing import arrange, assert_accurate

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def make(n_out, n_in, format="int4", group_size=-1, shift="", scales=BF16, permuted=False):
    """A quantized weight of random numbers."""
    w = torch.randn(n_out, n_in).to(scales)
    if format == "fp8":
        return QuantizedTensor.quantize(w, 8, fp8=True)
    bits = int(format[3:])
    q = QuantizedTensor.quantize(w, bits, group_size, symmetric=shift != "zeros")
    zeros = None if q.zeros is None else q.zeros.T
    offsets = None
    if shift in ("offsets", "positive"):  # about 0, or all weights on one side of it
        offsets = (0.5 if shift == "positive" else -8) * q.scales.T + torch.randn(q.scales.T.shape).to(scales) / 8
    index = None
    if permuted:
        index = (torch.arange(n_in) // (n_in if group_size == -1 else group_size))[torch.randperm(n_in)]
    return QuantizedTensor.from_codes(
        q.codes(), q.scales.T, zeros, offsets, bits=bits, group_size=group_size, group_index=index
    )


def check(path, q, x, bias=None, backward=True):
    """Result and gradients against the product with the dequantized weight: in float64, and in x's type by torch."""

    def run(function, x, bias):
        inputs = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
        y = function(*inputs)
        dy = torch.sin(torch.arange(y.numel())).view(y.shape).to(y)
        return y, *(torch.autograd.grad(y, inputs, dy) if backward else ())

    weights = {dtype: q.dequantize(dtype) for dtype in (torch.float64, x.dtype)}
    truth = run(
        lambda x, *b: reference(x, weights[torch.float64], *b), x.double(), None if bias is None else bias.double()
    )
    baseline = run(lambda x, *b: reference(x, weights[x.dtype], *b), x, bias)
    on = q.to(path.device)
    bias = None if bias is None else bias.to(path.device)
    actual = run(lambda x, *b: quantized_matmul(x, on, *b), x.to(path.device), bias)
    assert actual[0].dtype == x.dtype
    for a, t, b in zip(actual, truth, baseline, strict=True):
        assert_accurate(a, t, b)


# what can differ in a kernel: the format, where groups end, how they are shifted, the types, and the tile by the rows
CASES = [
    # format, group_size, shift, scales, x, (n_out, n_in), rows
    ("int4", 128, "", BF16, BF16, (130, 512), 1),
    ("int4", 128, "", HALF, HALF, (130, 512), 16),
    ("int4", 128, "zeros", HALF, HALF, (64, 256), 64),
    ("int4", 32, "zeros", BF16, BF16, (70, 304), 17),
    ("int4", 32, "offsets", HALF, BF16, (70, 304), 33),
    ("int4", 64, "offsets", HALF, HALF, (16, 130), 5),
    ("int4", 32, "offsets", HALF, BF16, (80, 640), 5),
    ("int4", 32, "positive", HALF, BF16, (48, 384), 65),
    ("int4", 48, "zeros", BF16, BF16, (33, 200), 5),
    ("int4", 48, "offsets", FP32, BF16, (48, 416), 40),
    ("int4", 16, "zeros", HALF, HALF, (144, 520), 17),
    ("int4", 50, "offsets", FP32, BF16, (33, 200), 5),
    ("int4", -1, "", BF16, BF16, (7, 33), 3),
    ("int4", 1000, "", FP32, HALF, (9, 1003), 2),
    ("int8", -1, "", HALF, HALF, (130, 144), 130),
    ("int8", -1, "", FP32, BF16, (70, 300), 33),
    ("int8", -1, "zeros", BF16, BF16, (70, 80), 2),
    ("int8", 64, "zeros", BF16, BF16, (70, 300), 17),
    ("int8", 32, "zeros", HALF, HALF, (1, 96), 2),
    ("int8", 32, "", HALF, BF16, (144, 320), 3),
    ("int8", 16, "offsets", BF16, HALF, (40, 70), 2),
    ("fp8", -1, "", HALF, HALF, (40, 70), 2),
    ("fp8", -1, "", FP32, BF16, (40, 70), 20),
    ("fp8", -1, "", FP32, FP32, (40, 70), 20),
    ("int4", 32, "zeros", FP32, FP32, (70, 304), 40),
    ("int8", -1, "", HALF, FP32, (33, 1), 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c))
def test_formats(path, case):
    format, group_size, shift, scales, dtype, (n_out, n_in), rows = case
    q = make(n_out, n_in, format, group_size, shift, scales)
    check(path, q, torch.randn(rows, n_in).to(dtype), torch.randn(n_out).to(dtype) if rows % 2 else None)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
def test_layouts_of_x(path, layout):
    q = make(48, 136, group_size=32)
    check(path, q, arrange(torch.randn(4, 6, 136).bfloat16(), layout), backward=layout == "transposed")


def test_act_order(path):
    check(path, make(40, 136, group_size=32, permuted=True, shift="zeros"), torch.randn(2, 3, 136).bfloat16())


def test_one_row_and_none(path):
    q = make(40, 128, group_size=32).to(path.device)
    x = torch.randn(128, device=path.device).bfloat16()
    assert torch.equal(quantized_matmul(x, q), quantized_matmul(x[None], q)[0])
    empty = torch.empty(2, 0, 128, device=path.device, dtype=BF16, requires_grad=True)
    bias = torch.ones(40, device=path.device, dtype=BF16, requires_grad=True)
    y = quantized_matmul(empty, q, bias)
    dx, db = torch.autograd.grad(y, [empty, bias], torch.ones_like(y))
    assert y.shape == (2, 0, 40)
    assert dx.shape == (2, 0, 128)
    assert torch.equal(db.cpu(), torch.zeros(40).bfloat16())


def test_the_weight_as_dequantized(path):
    """Rows of the identity give back the weight, bit by bit as `dequantize` rounds it, where the types are the same."""
    for format, group_size, shift, dtype in (
        ("int4", 32, "zeros", BF16),
        ("int8", 32, "zeros", HALF),
    ):
        q = make(37, 96, format, group_size, shift, dtype)
        y = quantized_matmul(torch.eye(96, dtype=dtype, device=path.device), q.to(path.device))
        expected = q.dequantize(dtype).T
        if path.kind == "torch":  # it multiplies in float32, and rounds once too
            expected = q.dequantize().T.to(dtype)
        assert torch.equal(y.cpu(), expected)


def test_every_call_gives_the_same_bits(path):
    q = make(64, 1024, group_size=128).to(path.device)
    x = torch.randn(3, 1024, device=path.device).bfloat16()
    assert torch.equal(quantized_matmul(x, q), quantized_matmul(x, q))


def test_nan_and_infinity_stay_in_their_row(path):
    q = make(40, 136, group_size=32).to(path.device)
    x = torch.randn(3, 136, device=path.device).bfloat16()
    clean = quantized_matmul(x, q)
    x[1, 5] = float("nan")
    y = quantized_matmul(x, q)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("case", CASES[:2] + [CASES[10]], ids=lambda c: f"{c[0]}-{c[4]}-{c[6]}")
def test_bytes_moved(launches, case):
    """With few rows the weight is read once, 16 bytes a lane; nothing spills, and shared memory has no conflicts."""
    format, group_size, shift, scales, dtype, _, rows = case
    q = make(256, 1024, format, group_size, shift, scales)
    x = torch.randn(min(rows, 16), 1024).to(dtype)
    quantized_matmul(x, q)
    product = launches[0]
    tile = quantized_matmul_tile(len(x), 256, len(q.packed), group_size, False, dtype, False, "sm_90")
    tiles = 256 // tile.block_m
    loaded = product.c["global_ld_bytes"] + product.c["global_cp_bytes"]
    assert product.c["unique_bytes_read"] >= q.packed.nbytes
    # besides the weight: x a tile; scales a lane of four, the next unit's too
    assert loaded <= 1.02 * q.packed.nbytes + tiles * x.nbytes + 4 * 2 * q.scales.nbytes + 4 * 256 * 2 * tile.splits
    assert product.c["global_cp_bytes"] >= q.packed.nbytes
    assert product.c["bank_conflicts"] == 0
    assert product.spills == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n_rows", [1, 33, 200, 5000])
def test_no_split_is_empty(n_rows, target):
    """The kernel tells the compiler so, which then leaves out the test in front of its loop."""
    for n_out in (8, 512, 4096):
        for units in range(1, 300):
            tile = quantized_matmul_tile(n_rows, n_out, units, 32, True, torch.bfloat16, False, target)
            assert (tile.splits - 1) * -(-units // tile.splits) < units


def test_gradcheck_of_the_cpu_implementation():
    q = make(6, 40, group_size=16, shift="zeros", permuted=True)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, bias: quantized_matmul(x, q, bias), (x, bias))


@pytest.mark.fake_tensors
def test_opcheck(path):
    q = make(24, 136, group_size=32, shift="zeros", permuted=True).to(path.device)
    weight = q.packed, q.scales, q.zeros, q.offsets, q.permutation
    x, bias = torch.randn(2, 3, 136, device=path.device).bfloat16(), torch.randn(24, device=path.device).bfloat16()
    torch.library.opcheck(quantized_matmul_forward, (x, *weight, bias, q.format, q.group_size))
    dy = torch.randn(2, 3, 24, device=path.device).bfloat16()
    torch.library.opcheck(quantized_matmul_backward, (dy, *weight, q.format, q.group_size, 136))


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    q = make(24, 136, group_size=32, shift="zeros", scales=FP32).to(path.device)

    def loss(x, bias):
        return quantized_matmul(x * 2, q, bias).sin().sum()

    x, bias = (torch.randn(s, device=path.device).requires_grad_() for s in ((5, 136), (24,)))
    expected, actual = loss(x, bias), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, bias)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, bias)) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_bias_alone_needs_no_gradient_of_x(path):
    q = make(24, 136, group_size=32).to(path.device)
    bias = torch.zeros(24, device=path.device, requires_grad=True)
    y = quantized_matmul(torch.randn(2, 136, device=path.device).bfloat16(), q, bias)
    (db,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(db, torch.full_like(bias, 2))


Q = make(6, 40, group_size=16)
X = torch.randn(3, 40)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantized_matmul(X, torch.randn(6, 40)), TypeError, "w must be a .*QuantizedTensor, got Tensor"),
        (lambda: quantized_matmul(X.int(), Q), TypeError, "x must be float16, bfloat16 or float32"),
        (lambda: quantized_matmul(X[:, :39], Q), ValueError, r"x must be \(..., 40\) for a weight of shape \(6, 40\)"),
        (lambda: quantized_matmul(X, Q, torch.ones(5)), ValueError, r"bias must be \(6,\) floating point"),
        (lambda: quantized_matmul(X, Q, torch.ones(6).int()), ValueError, r"bias must be \(6,\) floating point"),
        (lambda: quantized_matmul(X.to("meta"), Q), ValueError, "w must be on meta like x, got cpu"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

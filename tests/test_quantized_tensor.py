"""QuantizedTensor: the packed layout, rounding, states, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmops.quantization import QuantizedTensor
from lmops.reference.quantization import pack, unpack

FORMATS = {"int4": (0, 15), "int8": (-128, 127)}


def random_codes(format, shape):
    if format == "fp8":
        return torch.randn(shape).to(torch.float8_e4m3fn)
    low, high = FORMATS[format]
    return torch.randint(low, high + 1, shape)


def raw(codes):
    return codes.view(torch.uint8).int() if codes.dtype == torch.float8_e4m3fn else codes.int()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int4", "int8", "fp8"]), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31))
def test_pack_and_unpack(format, n_out, n_in, seed):
    torch.manual_seed(seed)
    codes = random_codes(format, (n_out, n_in))
    packed = pack(codes, format)
    assert packed.shape == (-(-n_in // (128 if format == "int4" else 64)), n_out, 32)
    assert torch.equal(raw(unpack(packed, format, n_in)), raw(codes))


@pytest.mark.parametrize(("format", "parts"), [("int4", 4), ("int8", 2)])
def test_the_layout_is_the_documented_one(format, parts):
    """Every code where the formula puts it: word 16 c + 8 h + 2 t + b of a part is at place 8 t + 4 c + 2 h + b."""
    codes = random_codes(format, (3, 200))
    packed = pack(codes, format).tolist()
    bits, columns = 16 // parts, 32 * parts
    for row in range(3):
        for column in range(200):
            unit, part, word = column // columns, column % columns // 32, column % 32
            c, h, t, b = word // 16, word // 8 % 2, word // 2 % 4, word % 2
            found = packed[unit][row][8 * t + 4 * c + 2 * h + b] >> bits * part & (1 << bits) - 1
            assert found == int(codes[row, column]) & (1 << bits) - 1


@pytest.mark.parametrize("shift", ["", "zeros", "offsets"])
@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("group_size", [-1, 16, 24, 32, 100])
def test_dequantize_is_the_definition(format, group_size, shift):
    n_out, n_in = 5, 130
    groups = 1 if group_size == -1 else -(-n_in // group_size)
    codes, scales = random_codes(format, (n_out, n_in)), torch.rand(n_out, groups).half()
    zeros = torch.randint(0, 17, (n_out, groups)) if shift == "zeros" else None
    offsets = torch.randn(n_out, groups) if shift == "offsets" else None
    q = QuantizedTensor.from_codes(codes, scales, zeros, offsets, bits=int(format[3:]), group_size=group_size)
    group = torch.arange(n_in) // (n_in if group_size == -1 else group_size)
    s = scales.double()[:, group]
    if shift == "offsets":
        expected = s * codes + offsets.half().double()[:, group]
    else:
        expected = s * (codes - (zeros[:, group] if shift == "zeros" else 8 if format == "int4" else 0))
    assert torch.equal(q.dequantize(torch.float64), expected)
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    assert torch.equal(q.dequantize(rows=slice(1, 4)), q.dequantize()[1:4])
    assert torch.equal(q.codes().int(), codes.int())
    torch.testing.assert_close(q.dequantize().double(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 50])
def test_quantize_is_within_half_a_step(bits, group_size, symmetric):
    w = torch.randn(9, 130) * torch.rand(9, 1)
    w[3] = 0
    w[4, 0] = 1e-30
    w[5].abs_()
    q = QuantizedTensor.quantize(w, bits, group_size, symmetric=symmetric)
    scales = q.scales.T[:, torch.arange(130) // (130 if group_size == -1 else group_size)]
    error = (q.dequantize() - w).abs()
    # asymmetric: the zero point is rounded too, so an end of the range can be half a step further out
    assert (error <= scales * (0.5 if symmetric else 1.0) * (1 + 1e-4)).all()
    assert torch.equal(q.dequantize()[3], torch.zeros(130))
    assert error.mean() < 0.3 * scales.mean()


def test_quantize_to_fp8():
    w = torch.randn(7, 65)
    q = QuantizedTensor.quantize(w, 8, fp8=True)
    assert q.format == "fp8"
    assert q.codes().dtype == torch.float8_e4m3fn
    # 3 bits behind the leading one: 2^-4 of a number that is not subnormal
    assert ((q.dequantize() - w).abs() <= w.abs() / 16 + q.scales.T * 2.0**-10).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_take_the_type_of_the_weight(dtype):
    q = QuantizedTensor.quantize(torch.randn(3, 40).to(dtype), 4, 32)
    assert q.scales.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    small = QuantizedTensor.quantize(torch.full((3, 40), 1e-7), 8, scale_dtype=torch.float16)
    assert small.dequantize().isfinite().all()


def test_group_index_is_act_order():
    w = torch.randn(6, 100)
    ordered = QuantizedTensor.quantize(w, 4, 32, symmetric=False)
    index = (torch.arange(100) // 32)[torch.randperm(100)]
    q = QuantizedTensor.from_codes(
        ordered.codes(), ordered.scales.T, ordered.zeros.T, group_size=32, group_index=index, name="layer"
    )
    expected = ordered.scales.T[:, index] * (ordered.codes().float() - ordered.zeros.T[:, index])
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(q.codes(), ordered.codes())
    same = QuantizedTensor.from_codes(
        ordered.codes(), ordered.scales.T, ordered.zeros.T, group_size=32, group_index=torch.arange(100) // 32
    )
    assert same.permutation is None
    assert torch.equal(same.dequantize(), ordered.dequantize())


def every_kind():
    w = torch.randn(6, 100)
    q = QuantizedTensor.quantize(w, 4, 32, symmetric=False)
    yield q
    yield QuantizedTensor.quantize(w.half(), 8)
    yield QuantizedTensor.quantize(w, 8, fp8=True)
    yield QuantizedTensor.from_codes(q.codes(), q.scales.T, None, -7 * q.scales.T, group_size=32)
    index = (torch.arange(100) // 32).flip(0)
    yield QuantizedTensor.from_codes(q.codes().flip(1), q.scales.T, group_size=32, group_index=index)


@pytest.mark.parametrize("q", list(every_kind()), ids=repr)
def test_states_survive(q, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(q.tensors(), tmp_path / "q.safetensors")
    buffer = io.BytesIO()
    torch.save(q.tensors(), buffer)
    buffer.seek(0)
    copies = [
        QuantizedTensor.from_tensors(load_file(tmp_path / "q.safetensors")),
        QuantizedTensor.from_tensors(torch.load(buffer)),
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        q.to("cpu"),
    ]
    for c in copies:
        assert (c.format, c.group_size, tuple(c.shape)) == (q.format, q.group_size, tuple(q.shape))
        assert torch.equal(c.dequantize(), q.dequantize())
    meta = q.to("meta")
    assert meta.device.type == "meta"
    assert meta.nbytes == q.nbytes == sum(t.nbytes for t in q.parts().values())
    kinds = {"zeros": q.zeros is not None, "offsets": q.offsets is not None, "permuted": q.permutation is not None}
    empty = QuantizedTensor.empty(
        q.shape, q.bits, q.group_size, fp8=q.format == "fp8", scale_dtype=q.scales.dtype, device="meta", **kinds
    )
    for name, part in q.parts().items():
        made = getattr(empty, name)
        assert (made.shape, made.dtype) == (part.shape, part.dtype)


def test_int4_bytes():
    """4.25 bits a weight with a scale of 16 bits a group of 64, 4.125 with 128."""
    assert QuantizedTensor.quantize(torch.randn(256, 1024).half(), 4, 64).nbytes == 256 * 1024 * 4.25 / 8
    assert QuantizedTensor.quantize(torch.randn(256, 1024).half(), 4, 128).nbytes == 256 * 1024 * 4.125 / 8


W = torch.randn(4, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: QuantizedTensor.quantize(W, 3), ValueError, "bits must be 4 or 8, got 3"),
        (lambda: QuantizedTensor.quantize(W, 4, 15), ValueError, "group_size must be -1 .* or 16 to 1024, got 15"),
        (lambda: QuantizedTensor.quantize(W, 4, 128), ValueError, "at most the 64 columns .* or -1, got 128"),
        (lambda: QuantizedTensor.quantize(W.int()), TypeError, "weight must be floating point, got torch.int32"),
        (lambda: QuantizedTensor.quantize(W[0]), ValueError, r"weight must be \(n_out, n_in\), got \(64,\)"),
        (lambda: QuantizedTensor.quantize(W[:0]), ValueError, r"at least one row and one column, got \(0, 64\)"),
        (lambda: QuantizedTensor.quantize(W / 0, name="a.b"), ValueError, "weight of a.b has"),
        (lambda: QuantizedTensor.quantize(W * 1e8, scale_dtype=torch.float16), ValueError, "too large for scales in"),
        (lambda: QuantizedTensor.quantize(W, scale_dtype=torch.float64), ValueError, "scales must be float16"),
        (lambda: QuantizedTensor.quantize(W, 8, 32, fp8=True), ValueError, "fp8 needs bits=8, group_size=-1"),
    ],
)  # fmt: skip
def test_quantize_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.full((2, 40), 16)}, ValueError, "codes of x must be 0 to 15, got 16 to 16"),
        ({"codes": torch.zeros(2, 40)}, TypeError, "codes of x must be integers"),
        ({"codes": torch.zeros(40, dtype=torch.int8)}, ValueError, "codes of x must be"),
        ({"bits": 5}, ValueError, "bits must be 4 or 8, got 5"),
        ({"scales": torch.ones(2, 3)}, ValueError, r"scales of x must be \(n_out, groups\) = \(2, 2\), got \(2, 3\)"),
        ({"scales": torch.full((2, 2), float("nan"))}, ValueError, "scales of x have NaN or infinite values"),
        ({"zeros": torch.ones(2, 2)}, TypeError, "zeros of x must be integers"),
        ({"zeros": torch.full((2, 2), 17)}, ValueError, "zeros of x must be 0 to 16, got 17 to 17"),
        ({"zeros": torch.ones(2, 2).int(), "offsets": torch.ones(2, 2)}, ValueError, "at most one is allowed"),
        ({"group_index": torch.zeros(40).int()}, ValueError, "group_index of x must give every group 32 columns"),
        ({"group_index": torch.zeros(3).int()}, ValueError, r"group_index of x must be \(40,\) integers"),
    ],
)  # fmt: skip
def test_from_codes_refuses(change, error, message):
    given = {"codes": torch.zeros(2, 40).int(), "scales": torch.ones(2, 2), "group_size": 32, "name": "x", **change}
    with pytest.raises(error, match=message):
        QuantizedTensor.from_codes(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": None}, r"missing \['packed'\]"),
        ({"more": torch.ones(1)}, r"unknown \['more'\]"),
        ({"packed": torch.zeros(1, 4, 32)}, r"packed of x must be \(1, 4, 32\) in torch.int16, got .* torch.float32"),
        ({"packed": torch.zeros(2, 4, 32, dtype=torch.int16)}, r"packed of x must be \(1, 4, 32\)"),
        ({"scales": torch.ones(3, 4)}, r"scales of x must be \(2, 4\) in"),
        ({"zeros": torch.ones(2, 4)}, r"zeros of x must be \(2, 4\) in torch.uint8"),
        ({"info": torch.tensor([9, 0, 4, 64, 32])}, r"info of x must be \[1, format, n_out, n_in, group_size\]"),
        ({"info": torch.tensor([1, 0, 4, 640, 32])}, "packed of x must be"),
        ({"permutation": torch.arange(1, 65, dtype=torch.int32)}, "permutation of x must hold each column, 0 to 63"),
    ],
)  # fmt: skip
def test_from_tensors_refuses(change, message):
    tensors = {**QuantizedTensor.quantize(W, 4, 32).tensors(), **change}
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.from_tensors({k: t for k, t in tensors.items() if t is not None}, name="x")

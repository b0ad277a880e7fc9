"""lmops.ops.quantized_embedding: rows of a quantized table against the dequantized one, bit by bit."""

import pytest
import torch

from lmops.ops.quantized_embedding import quantized_embedding, quantized_embedding_forward
from lmops.quantization import QuantizedTensor

TABLE = torch.randn(51, 200)


def kinds():
    yield QuantizedTensor.quantize(TABLE.half(), 4, 32)
    q = QuantizedTensor.quantize(TABLE.bfloat16(), 4, 50, symmetric=False)
    yield q
    index = (torch.arange(200) // 50)[torch.randperm(200)]
    yield QuantizedTensor.from_codes(q.codes(), q.scales.T, offsets=-3 * q.scales.T, group_size=50, group_index=index)
    yield QuantizedTensor.quantize(TABLE, 8)
    yield QuantizedTensor.quantize(TABLE, 8, 64, symmetric=False)
    yield QuantizedTensor.quantize(TABLE, 8, fp8=True)


@pytest.mark.parametrize("q", list(kinds()), ids=repr)
def test_rows_of_the_table(path, q):
    tokens = torch.randint(0, 51, (2, 5))
    for dtype in (None, torch.bfloat16):
        y = quantized_embedding(tokens.to(path.device), q.to(path.device), dtype).cpu()
        expected = q.dequantize(dtype or q.scales.dtype)[tokens]
        if q.offsets is None:
            assert torch.equal(y, expected)
        else:  # a fused multiply-add rounds once where torch rounds twice
            torch.testing.assert_close(y, expected)


def test_shapes_and_strides(path):
    q = QuantizedTensor.quantize(TABLE, 8).to(path.device)
    tokens = torch.randint(0, 51, (6, 4), device=path.device, dtype=torch.int32)
    expected = q.dequantize()[tokens[::2, 1].long()]
    assert torch.equal(quantized_embedding(tokens[::2, 1], q), expected)
    assert quantized_embedding(tokens[:0], q).shape == (0, 4, 200)
    assert quantized_embedding(tokens[0, 0], q).shape == (200,)


def test_tokens_outside_of_the_table(path):
    q = QuantizedTensor.quantize(TABLE, 8).to(path.device)
    tokens = torch.tensor([3, 51, -1], device=path.device)
    if path.kind == "torch":
        with pytest.raises(ValueError, match=r"tokens must be 0 to 50, got -1 to 51"):
            quantized_embedding(tokens, q)
        assert quantized_embedding(tokens[:1], q).isfinite().all()
    else:
        assert quantized_embedding(tokens, q).isnan().all(1).tolist() == [False, True, True]


@pytest.mark.fake_tensors
def test_opcheck_and_compile(path):
    q = QuantizedTensor.quantize(TABLE, 8).to(path.device)
    tokens = torch.randint(0, 51, (2, 5), device=path.device)
    torch.library.opcheck(
        quantized_embedding_forward, (tokens, q.packed, q.scales, None, None, None, "int8", -1, 200, torch.float16)
    )
    compiled = torch.compile(lambda t: quantized_embedding(t, q) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), quantized_embedding(tokens, q) * 2)


def test_bad_input():
    q = QuantizedTensor.quantize(TABLE, 8)
    with pytest.raises(TypeError, match=r"w must be a .*QuantizedTensor, got Tensor"):
        quantized_embedding(torch.tensor([1]), TABLE)
    with pytest.raises(TypeError, match=r"tokens must be int32 or int64, got torch.float32"):
        quantized_embedding(torch.ones(1), q)
    with pytest.raises(TypeError, match=r"dtype must be float16, bfloat16 or float32, got torch.float64"):
        quantized_embedding(torch.tensor([1]), q, torch.float64)
    with pytest.raises(ValueError, match=r"w must be on meta like tokens, got cpu"):
        quantized_embedding(torch.tensor([1], device="meta"), q)

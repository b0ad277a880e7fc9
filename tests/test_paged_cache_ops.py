"""store_kv, copy_blocks, swap_blocks: what is written, bit by bit, and that nothing else is; rows of 8 and 4 bits."""

import dataclasses

import pytest
import torch

from lmops.ops.paged_cache import (
    KVPages,
    append_slots,
    append_slots_forward,
    copy_blocks,
    copy_blocks_forward,
    store_kv,
    store_kv_forward,
    store_tile,
    swap_blocks,
)
from lmops.reference.paged_cache import dequantize_rows, quantize_rows, rotate, store_rows
from lmops.testing import arrange, assert_accurate

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
FORMATS = ("native", *CODES)


def new_pages(n_blocks, block_size, heads, dim, value_dim=None, *, format="native", dtype=HALF, device="cpu",
              layout="heads first"):  # fmt: skip
    """Pages full of what nobody wrote: the same bits in two pages of the same arguments."""
    generator = torch.Generator().manual_seed(3)

    def tensor(dtype, *columns):
        # one element of memory in two, or all of it; in the cache's order or in that of the indices
        step = 2 if layout == "strided" else 1
        shape = (heads, n_blocks, block_size, *columns[:-1], step * (columns[-1] if columns else 1))
        flat = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        t = flat.view(dtype)[..., 0][..., ::step].to(device)
        t = t if columns else t[..., 0]
        t = t.movedim(0, 2)
        return t if layout != "tokens first" else t.contiguous()

    per_byte = 2 if format == "int4" else 1
    if format == "native":
        return KVPages(tensor(dtype, dim), tensor(dtype, value_dim or dim))
    scales = [tensor(dtype, *((2,) if format == "int4" else ())) for _ in range(2)]
    return KVPages(
        tensor(CODES[format], dim // per_byte), tensor(CODES[format], (value_dim or dim) // per_byte), *scales
    )  # fmt: skip


def tensors(pages):
    return [getattr(pages, f.name) for f in dataclasses.fields(pages) if getattr(pages, f.name) is not None]


def bits(pages):
    return [t.detach().cpu().contiguous().view(torch.uint8).clone() for t in tensors(pages)]


def assert_same(actual, expected):
    """Bit by bit; any NaN is any other."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        if a.dtype.itemsize == 1:
            a, b = a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def expect(k, v, pages, slot_mapping, cos=None, sin=None, positions=None, interleaved=False):
    """What the reference makes of CPU tensors."""
    if cos is not None:
        k = rotate(k, cos[positions], sin[positions], interleaved)
    store_rows(k, pages.k, pages.k_scale, slot_mapping)
    store_rows(v, pages.v, pages.v_scale, slot_mapping)


def rope(n_positions, rope_dim, dtype=FP32):
    angles = torch.rand(n_positions, rope_dim // 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check(path, k, v, slots, pages=None, *, cos=None, sin=None, positions=None, interleaved=False, **how):
    heads, dim = k.shape[1:]
    arguments = (how.pop("n_blocks", 5), how.pop("block_size", 4), heads, dim, v.shape[2])
    pages, expected = new_pages(*arguments, device=path.device, **how), new_pages(*arguments, **how)
    slots = torch.tensor(slots, dtype=torch.int64)
    on = [t if t is None else t.to(path.device) for t in (cos, sin, positions)]
    store_kv(
        k.to(path.device), v.to(path.device), pages, slots.to(path.device), cos=on[0], sin=on[1], positions=on[2],
        interleaved=interleaved,
    )  # fmt: skip
    expect(k, v, expected, slots, cos, sin, positions, interleaved)
    assert_same(pages, expected)


SLOTS = [3, 19, -1, 7, 4, 0, -1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "scales", "heads", "dim", "value_dim", "block_size"),
    [(HALF, HALF, 3, 64, 64, 4), (BF16, HALF, 1, 128, 32, 1), (FP32, FP32, 2, 72, 10, 17), (BF16, FP32, 5, 6, 256, 64)],
)
def test_rows_go_to_their_slots(path, format, dtype, scales, heads, dim, value_dim, block_size):
    k, v = torch.randn(7, heads, dim).to(dtype) * 3, torch.randn(7, heads, value_dim).to(dtype)
    slots = [min(slot, 5 * block_size - 1) for slot in (SLOTS if block_size > 1 else [3, 1, -1, 4, 0, 2, -1])]
    check(path, k, v, slots, format=format, dtype=dtype if format == "native" else scales, block_size=block_size)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("pages", ["strided", "tokens first"])
@pytest.mark.parametrize("format", ["native", "int8", "int4"])
def test_any_strides(path, layout, pages, format):
    k, v = (arrange(torch.randn(7, 3, 24).half(), layout) for _ in range(2))
    check(path, k, v, SLOTS, format=format, layout=pages)
    check(path, k[:3], v[:3], [8, 9, 10], format=format, layout=pages)
    qkv = torch.randn(3, 7, 24, 3).half().permute(1, 0, 3, 2)
    check(path, qkv[:, :, 1], qkv[:, :, 2], SLOTS, format=format, layout=pages)


@pytest.mark.parametrize("native", [HALF, BF16, FP32])
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
def test_native_pages_of_another_type(path, native, dtype):
    k, v = torch.randn(2, 7, 3, 16).to(dtype)
    check(path, k, v, SLOTS, dtype=native)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rope_dim"), [(64, 64), (24, 8), (80, 32), (20, 12)])
def test_keys_are_rotated_on_the_way_in(path, format, interleaved, dim, rope_dim):
    dtype = BF16 if dim == 64 else FP32 if dim == 24 else HALF
    k, v = torch.randn(7, 2, dim).to(dtype), torch.randn(7, 2, 16).to(dtype)
    cos, sin = rope(50, rope_dim, HALF if dim == 80 else FP32)
    how = {"cos": cos, "sin": sin, "positions": torch.tensor([0, 49, 3, 7, 3, 12, 1]), "interleaved": interleaved}
    check(path, k, v, SLOTS, format=format, dtype=dtype if format == "native" else HALF, **how)


def test_rotation_is_that_of_transformers():
    """Pairs (i, i + rope_dim / 2) as in Llama, pairs (2 i, 2 i + 1) as complex numbers."""
    x, (cos, sin) = torch.randn(5, 3, 8, dtype=torch.float64), rope(5, 8, torch.float64)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    both = [torch.cat([t, t], -1)[:, None] for t in (cos, sin)]
    torch.testing.assert_close(rotate(x, cos, sin, False), x * both[0] + half * both[1])
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(rotate(x, cos, sin, True), torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("scales", [HALF, FP32])
def test_rows_out_of_the_ordinary(path, format, scales):
    """Zeros, the ends of float16 and float32, ties, infinity and NaN."""
    x = torch.randn(20, 1, 16)
    x[0] = 0
    x[1] = 7.25
    for i, size in enumerate((1e-7, 1e-5, 6e-5, 1e-30, 1e-42, 65_504, 8.4e6, 3e7, 1e20, 1e37)):
        x[2 + i] *= size
    x[12, 0, 3] = float("nan")
    x[13, 0, 15] = float("inf")
    x[14, 0, 0] = float("-inf")
    x[15] = torch.arange(16) - 7.5
    x[16] = torch.tensor([127, -127, 0.5, -0.5, 1.5, 2.5, -1e-3, 3.5, 126.5, 126.4, -126.5, 4.5, 1, 2, 3, 0])
    x[17] = torch.tensor(
        [448, -448, -1e-4, 2**-9, 1.5 * 2**-9, 2.5 * 2**-10, 2**-10, 2**-6, 0.0155, 17, 19, 21] + [0] * 4
    )
    x[18] = 3.4028234663852886e38 * torch.tensor([1, -1] * 8)
    x[19] = -5.0
    check(path, x, x.flip(-1), list(range(20)), format=format, dtype=scales)


@pytest.mark.parametrize("format", CODES)
def test_what_is_read_is_near(format):
    """Half a step of the grid away at most, and what rounding the scale costs."""
    x = torch.randn(200, 64) * torch.logspace(-2, 3, 200)[:, None]
    codes, scales = quantize_rows(x, format, HALF)
    y = dequantize_rows(codes, scales, FP32)
    largest, spread = x.abs().amax(-1, True), x.amax(-1, True) - x.amin(-1, True)
    if format == "int8":
        assert ((y - x).abs() <= largest / 127 * 0.5 * (1 + 2**-9) + largest * 2**-11).all()
    elif format == "int4":
        assert ((y - x).abs() <= spread / 15 * 0.5 * (1 + 2**-9) + spread * 2**-11 + largest * 2**-11).all()
    else:
        assert ((y - x).abs() <= torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10) + largest * 2**-11).all()
    assert y.dtype == FP32
    assert_accurate(dequantize_rows(codes, scales, HALF), dequantize_rows(codes, scales, torch.float64), y.half())


@pytest.mark.parametrize("format", CODES)
def test_rows_that_cannot_be_stored_read_nan_and_big_ones_stay_finite(format):
    x = torch.randn(3, 16)
    x[0, 3], x[1, 5], x[2, 6] = float("nan"), float("inf"), 3e38
    y = dequantize_rows(*quantize_rows(x, format, HALF), FP32)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()
    zeros = dequantize_rows(*quantize_rows(torch.zeros(2, 16), format, HALF), FP32)
    assert torch.equal(zeros, torch.zeros(2, 16))


def test_every_e4m3_number_and_the_ties_between(path):
    """Codes of rows whose scale is 1, against torch's conversion."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(0.0))])
    x = torch.cat([x, -x, x.new_zeros(-2 * len(x) % 63)]).view(-1, 1, 63)
    x = torch.cat([x, torch.full((len(x), 1, 1), 448.0)], -1)
    pages = new_pages(len(x), 1, 1, 64, format="fp8", dtype=FP32, device=path.device)
    store_kv(x.to(path.device), x.to(path.device), pages, torch.arange(len(x), device=path.device))
    assert torch.equal(pages.k.cpu().view(torch.uint8)[:, 0, 0], x.to(torch.float8_e4m3fn).view(torch.uint8)[:, 0])


def test_nothing_to_store(path):
    for n_tokens, heads in ((0, 3), (2, 1)):
        pages = new_pages(5, 4, heads, 16, device=path.device)
        before = bits(pages)
        k = torch.randn(n_tokens, heads, 16, device=path.device).half()
        store_kv(k, k, pages, torch.full((n_tokens,), -1, device=path.device))
        assert all(map(torch.equal, bits(pages), before))


def test_padding_is_not_read(path):
    """NaN in tokens of slot -1 and positions that are not there change nothing."""
    k = torch.randn(3, 2, 16).half()
    k[1] = float("nan")
    cos, sin = rope(4, 16)
    check(path, k, k, [3, -1, 5], cos=cos, sin=sin, positions=torch.tensor([0, 0, 3]))
    pages = new_pages(5, 4, 2, 16, device=path.device)
    k, cos, sin = (t.to(path.device) for t in (k, cos, sin))
    positions, slots = (torch.tensor(t, device=path.device) for t in ([0, 99, 3], [3, -1, 5]))
    store_kv(k, k, pages, slots, cos=cos, sin=sin, positions=positions)
    assert pages.k[0, 3].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_slots_that_are_not_there(path, format):
    """Named errors on a CPU, before anything is written; a kernel leaves these rows out."""
    pages = new_pages(5, 4, 2, 16, format=format, device=path.device)
    expected = new_pages(5, 4, 2, 16, format=format)
    k = torch.randn(3, 2, 16).half()
    for slots in ([4, 20, 5], [4, -2, 5], [4, 2**40, 5]):
        mapping = torch.tensor(slots)
        if path.kind == "torch":
            with pytest.raises(ValueError, match=rf"slot_mapping must be -1 to 19, got {min(slots)} to {max(slots)}"):
                store_kv(k, k, pages, mapping)
        else:
            store_kv(k.to(path.device), k.to(path.device), pages, mapping.to(path.device))
            expect(k, k, expected, torch.tensor([4, -1, 5]))
        assert_same(pages, expected)
    if path.kind == "torch":
        for slots in ([4, 4, 5], [4, -1, 4]):
            with pytest.raises(ValueError, match=r"slot_mapping must have each slot once, got 4 more than once"):
                store_kv(k, k, pages, torch.tensor(slots))
        assert_same(pages, expected)


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize(("n_new", "n_queries"), [(1, 1), (5, 2), (2, 70), (0, 3)])
def test_where_tokens_are_appended(path, moving, n_new, n_queries):
    """Against Python integers; strided lengths and tables, entries below 0, and sequences that fill their blocks."""
    size, lengths = 16, [0, 15, 16, 64 - n_new, 3]
    entries = [[7, 2, 9, 4]] * 4 + [[-1] * 4]
    table = arrange(torch.tensor(entries, dtype=torch.int32, device=path.device), "transposed")
    strided = torch.tensor([[n, -5] for n in lengths], dtype=torch.int32, device=path.device)[:, 0]
    slots, positions, places, after = append_slots(strided, table, n_new, n_queries, size, moving=moving)
    new = [(row, n + j) for row, n in enumerate(lengths) for j in range(n_new)]
    expected = [entries[s][p // size] * size + p % size if entries[s][0] >= 0 else -1 for s, p in new]
    assert slots.tolist() == expected
    assert positions.tolist() == [p for _, p in new]
    assert places.tolist() == [[n + i * moving for i in range(n_queries)] for n in lengths]
    assert after.tolist() == [n + n_new for n in lengths]
    assert {t.dtype for t in (slots, positions, places)} == {torch.int64}
    assert after.dtype == torch.int32


@pytest.mark.kernels_only
def test_tokens_behind_the_table_have_no_slot(path):
    lengths = torch.tensor([30, 32, -1], dtype=torch.int32, device=path.device)
    table = torch.tensor([[1, 2]] * 3, dtype=torch.int32, device=path.device)
    slots, _, _, after = append_slots(lengths, table, 3, 1, 16)
    assert slots.tolist() == [46, 47, -1, -1, -1, -1, -1, 16, 17]
    assert after.tolist() == [33, 35, 2]


def test_positions_that_are_not_there(path):
    pages = new_pages(5, 4, 2, 16, device=path.device)
    before = bits(pages)
    k, (cos, sin) = torch.randn(3, 2, 16, device=path.device).half(), rope(4, 16)
    cos, sin, slots = (t.to(path.device) for t in (cos, sin, torch.tensor([4, 8, 5])))
    for bad in (-1, 4, 2**40):
        positions = torch.tensor([0, bad, 3], device=path.device)
        if path.kind == "torch":
            with pytest.raises(ValueError, match=r"positions must be 0 to 3, the rows of cos, got .*to"):
                store_kv(k, k, pages, slots, cos=cos, sin=sin, positions=positions)
            assert all(map(torch.equal, bits(pages), before))
        else:
            store_kv(k, k, pages, slots, cos=cos, sin=sin, positions=positions)
            assert pages.k[2, 0].isnan().all()
            assert pages.k[1, 0].isfinite().all()
            assert torch.equal(pages.v[2, 0], k[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("block_size", "dim", "layout"), [(4, 64, "heads first"), (17, 10, "strided"), (1, 24, "tokens first")]
)
def test_copy_blocks(path, format, block_size, dim, layout):
    arguments = (9, block_size, 3, dim, 2 * dim)
    how = {"format": format, "layout": layout}
    pages = new_pages(*arguments, device=path.device, **how)
    whole = torch.tensor([[0, 8], [3, 1], [3, 2]])
    copy_blocks(pages, whole.to(path.device))
    counted = [(8, 5, 1), (1, 7, block_size), (0, 6, block_size // 2), (0, 4, 0)]
    copy_blocks(pages, counted)
    expected = new_pages(*arguments, **how)
    for t in tensors(expected):
        t = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
        for src, dst, n in [*((s, d, block_size) for s, d in whole.tolist()), *counted]:
            t[dst, :n] = t[src, :n]
    assert_same(pages, expected)


def test_copies_that_are_not_possible(path):
    pages = new_pages(5, 4, 2, 16, device=path.device)
    before = bits(pages)
    for copies, message in (
        ([(0, 5)], "copies must be of blocks 0 to 4, got 0 to 5"),
        ([(-1, 2)], "copies must be of blocks 0 to 4, got -1 to 2"),
        ([(0, 1, 5)], "copies must be of 0 to 4 tokens, got 5 to 5"),
        ([(0, 2), (1, 2)], "got block 2 copied to more than once"),
        ([(0, 2), (2, 3)], "got block 2 both copied and copied to"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_blocks(pages, copies)
        if path.kind == "torch":
            with pytest.raises(ValueError, match=message):
                copy_blocks(pages, torch.tensor(copies))
        elif "blocks 0 to 4" in message:
            copy_blocks(pages, torch.tensor(copies, device=path.device))
        assert all(map(torch.equal, bits(pages), before))
    copy_blocks(pages, [])
    copy_blocks(pages, torch.empty(0, 3, dtype=torch.int64, device=path.device))
    assert all(map(torch.equal, bits(pages), before))
    for copies, error, message in (
        ([(0, 1.0)], TypeError, r"copies must be tuples of int, got \(0, 1.0\)"),
        ([(0, 1), (0, 1, 2)], ValueError, r"copies must be tuples \(src, dst\) or"),
        (torch.zeros(1, 2), TypeError, "copies must be int64, got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.int64), ValueError, r"copies must be \(n, 2\) or \(n, 3\), got \(1, 4\)"),
        (
            torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            ValueError,
            "copies must be on .* like the pages, got meta",
        ),
    ):
        with pytest.raises(error, match=message):
            copy_blocks(pages, copies)


@pytest.mark.parametrize("format", FORMATS)
def test_swap_blocks(format):
    there, back = (
        new_pages(n, 4, 3, 16, format=format, layout=layout) for n, layout in ((9, "heads first"), (3, "tokens first"))
    )
    before = bits(there)
    swap_blocks(there, back, [(5, 0), (0, 1), (7, 2)])
    for a, b in zip(before, bits(back), strict=True):
        assert torch.equal(a[[5, 0, 7]], b)
    swap_blocks(back, there, [(1, 2), (0, 8)])
    for a, b in zip(bits(there), before, strict=True):
        assert torch.equal(a[2], b[0])
        assert torch.equal(a[8], b[5])
        assert torch.equal(a[[0, 1, 3, 4, 5, 6, 7]], b[[0, 1, 3, 4, 5, 6, 7]])
    swap_blocks(back, there, [(0, 3), (1, 1), (2, 6)])
    for a, b in zip(bits(there), before, strict=True):
        assert torch.equal(a[[3, 1, 6]], b[[5, 0, 7]])
        assert torch.equal(a[[0, 4, 5, 7]], b[[0, 4, 5, 7]])
    swap_blocks(back, there, [])
    after = bits(there)
    for pairs, message in (
        ([(3, 0)], "pairs must be of blocks 0 to 2 of src_pages, got 3 to 3"),
        ([(0, 9)], "pairs must be of blocks 0 to 8 of dst_pages, got 9 to 9"),
        ([(0, 1), (1, 1)], "pairs must have each block of dst_pages once"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_blocks(back, there, pairs)
    for other in (new_pages(9, 4, 3, 32, format=format), new_pages(9, 4, 3, 16, dtype=FP32)):
        with pytest.raises(ValueError, match="dst_pages must be like src_pages: k of shape"):
            swap_blocks(back, other, [(0, 0)])
    assert all(map(torch.equal, bits(there), after))


@pytest.mark.parametrize("format", ["native", "int8"])
def test_pages_keep_no_graph(path, format):
    pages = new_pages(5, 4, 2, 16, format=format, device=path.device, dtype=FP32)
    k = torch.randn(3, 2, 16, device=path.device, requires_grad=True)
    cos, sin = (t.to(path.device).requires_grad_() for t in rope(3, 16))
    for slots in ([0, 1, 2], [4, 9, 3]):
        slots = torch.tensor(slots, device=path.device)
        store_kv(k * 1, k * 2, pages, slots)
        store_kv(k.detach(), k.detach(), pages, slots, cos=cos, sin=sin, positions=slots % 3)
    assert not any(t.requires_grad for t in tensors(pages))


@pytest.mark.fake_tensors
@pytest.mark.parametrize("format", ["native", "int4"])
def test_opcheck_and_compile(path, format):
    pages = new_pages(5, 4, 2, 16, format=format, device=path.device)
    k = torch.randn(3, 2, 16, device=path.device).half()
    cos, sin = (t.to(path.device) for t in rope(10, 16))
    positions, slots = torch.tensor([5, 6, 0], device=path.device), torch.tensor([3, -1, 7], device=path.device)
    four = (pages.k, pages.v, pages.k_scale, pages.v_scale)
    torch.library.opcheck(store_kv_forward, (k, k, *four, slots, cos, sin, positions, True))
    torch.library.opcheck(copy_blocks_forward, (*four, torch.tensor([[1, 2, 3]], device=path.device)))
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=path.device)
    torch.library.opcheck(append_slots_forward, (lengths, lengths[:, None].expand(2, 3), 2, 1, 4, True))

    def step(k):
        store_kv(k * 2, k.cos(), pages, slots, cos=cos, sin=sin, positions=positions)
        return k.sin()

    expected = new_pages(5, 4, 2, 16, format=format)
    torch.compile(step, fullgraph=True, backend="aot_eager")(k)
    on_cpu = [t.cpu() for t in (k * 2, k.cos(), slots, cos, sin, positions)]
    on_cpu[5] = torch.where(on_cpu[2] < 0, 0, on_cpu[5])
    expect(on_cpu[0], on_cpu[1], expected, on_cpu[2], *on_cpu[3:])
    if torch.equal(pages.k.cpu().view(torch.uint8), new_pages(5, 4, 2, 16, format=format).k.view(torch.uint8)):
        raise AssertionError("nothing was written")
    compiled = pages
    assert_same(compiled, expected)


PAGES = new_pages(5, 4, 2, 16)
KV = torch.randn(3, 2, 16).half()
MAP = torch.tensor([0, 1, 2])
COS = torch.ones(9, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: store_kv(KV.double(), KV, PAGES, MAP), TypeError, "k must be float16, bfloat16 or float32, got"),
        (lambda: store_kv(KV, KV.float(), PAGES, MAP), TypeError, "v must be torch.float16 like k, got torch.float32"),
        (lambda: store_kv(KV[0], KV[0], PAGES, MAP), ValueError, r"k must be \(tokens, 2, 16\) for these pages, got"),
        (lambda: store_kv(KV[:, :1], KV, PAGES, MAP), ValueError, r"k must be \(tokens, 2, 16\) for these pages"),
        (lambda: store_kv(KV, KV[..., 1:], PAGES, MAP), ValueError, r"v must be \(3, 2, 16\) for these k and pages"),
        (lambda: store_kv(KV, KV[:2], PAGES, MAP), ValueError, r"v must be \(3, 2, 16\) for these k and pages"),
        (lambda: store_kv(KV, KV, PAGES, MAP.int()), TypeError, "slot_mapping must be int64, got torch.int32"),
        (lambda: store_kv(KV, KV, PAGES, MAP[:2]), ValueError, r"slot_mapping must be \(3,\), a number a token of k"),
        (lambda: store_kv(KV, KV, PAGES, MAP.to("meta")), ValueError, "slot_mapping must be on cpu like k, got meta"),
        (lambda: store_kv(KV, KV.to("meta"), PAGES, MAP), ValueError, "v must be on cpu like k, got meta"),
        (lambda: store_kv(*[KV.to("meta")] * 2, PAGES, MAP.to("meta")), ValueError, "pages must be on meta like k"),
        (lambda: store_kv(KV, KV, PAGES, MAP, cos=COS), ValueError, "must be given together, got cos"),
        (
            lambda: store_kv(KV, KV, PAGES, MAP, cos=COS.int(), sin=COS, positions=MAP),
            TypeError,
            "cos must be floating",
        ),
        (lambda: store_kv(KV, KV, PAGES, MAP, cos=COS, sin=COS[:, 1:], positions=MAP), ValueError, "sin must be"),
        (lambda: store_kv(KV, KV, PAGES, MAP, cos=COS.repeat(1, 2), sin=COS, positions=MAP), ValueError, "cos must be"),
        (
            lambda: store_kv(KV, KV, PAGES, MAP, cos=COS, sin=COS, positions=MAP[1:]),
            ValueError,
            r"positions must be \(3",
        ),
        (
            lambda: store_kv(
                KV, KV, new_pages(5, 4, 2, 16, format="int4"), MAP, cos=COS[:, 1:], sin=COS[:, 1:], positions=MAP
            ),
            ValueError,
            "rope_dim must be a multiple of 4 for int4 pages",
        ),
        (
            lambda: KVPages(KV, KV),
            ValueError,
            r"k must be \(n_blocks, block_size, kv_heads, head_dim\), got \(3, 2, 16\)",
        ),
        (lambda: KVPages(PAGES.k.double(), PAGES.v), TypeError, "k must be .*, got torch.float64"),
        (lambda: KVPages(PAGES.k, PAGES.v.float()), TypeError, "v must be torch.float16 like k, got torch.float32"),
        (lambda: KVPages(PAGES.k, PAGES.v[:, :3]), ValueError, r"v must be \(5, 4, 2, value_dim\) like k, got"),
        (lambda: KVPages(PAGES.k, PAGES.v, KV), ValueError, "k_scale must be None for pages of torch.float16"),
        (
            lambda: KVPages(PAGES.k.char(), PAGES.v.char()),
            ValueError,
            r"k_scale must be \(5, 4, 2\) for pages of torch.int8, got None",
        ),
        (
            lambda: KVPages(PAGES.k.byte(), PAGES.v.byte(), KV, KV),
            ValueError,
            r"k_scale must be \(5, 4, 2, 2\) for pages of torch.uint8",
        ),
        (
            lambda: KVPages(PAGES.k.char(), PAGES.v.char(), *[PAGES.k[..., 0].double()] * 2),
            TypeError,
            "k_scale must be float16 or float32",
        ),
        (lambda: KVPages(PAGES.k, PAGES.v.to("meta")), ValueError, "v must be on cpu like k, got meta"),
    ],
)
def test_bad_input(call, error, message):
    before = bits(PAGES)
    with pytest.raises(error, match=message):
        call()
    assert all(map(torch.equal, bits(PAGES), before))


def test_what_pages_say():
    pages = new_pages(5, 4, 2, 16, 10, format="int4")
    assert (pages.n_blocks, pages.block_size, pages.n_kv_heads, pages.head_dim, pages.value_dim) == (5, 4, 2, 16, 10)
    assert pages.format == "int4"
    assert {f: new_pages(1, 1, 1, 2, format=f).format for f in FORMATS} == {f: f for f in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rope_dim", [0, 128])
def test_bytes_of_a_store(launches, format, rope_dim):
    """Counted in the compiled code: keys and values are loaded once and stored once, 16 bytes at a time."""
    n_tokens, heads, dim = 16, 8, 128
    k, v = torch.randn(2, n_tokens, heads, dim).half()
    how = {}
    if rope_dim:
        cos, sin = rope(n_tokens, rope_dim)
        how = {"cos": cos, "sin": sin, "positions": torch.arange(n_tokens)}
    store_kv(k, v, new_pages(2, 16, heads, dim, format=format), torch.randperm(32)[:n_tokens], **how)
    (launch,) = launches
    bits, scales = {"native": (16, 0), "int8": (8, 2), "fp8": (8, 2), "int4": (4, 4)}[format]
    stored = 2 * n_tokens * heads * (dim * bits // 8 + scales)
    # of each token besides: its slot, its position and the angles, in sectors of 32 bytes
    beside = 32 + (32 + 2 * dim // 2 * 4 if rope_dim else 0)
    assert launch.c["l2_load_sectors_unique_per_cta"] * 32 == k.nbytes + v.nbytes + n_tokens * beside
    assert launch.c["global_st_bytes"] == stored
    if not rope_dim:
        # a request of a warp moves 512 bytes; one loads the slot, and a row has its scales
        warps = launch.c["global_ld_requests"] - (k.nbytes + v.nbytes) // 512
        assert warps <= 4 * n_tokens
        codes = 2 * n_tokens * heads * dim * bits // 8 // 512
        assert codes <= launch.c["global_st_requests"] <= codes + 2 * 2 * n_tokens * (scales > 0)
    assert launch.spills == 0
    assert launch.c["bank_conflicts"] == 0


def test_bytes_of_a_copy(launches):
    pages = new_pages(8, 16, 8, 128)
    copy_blocks(pages, [(0, 1, 16), (2, 3, 5), (4, 5, 0)])
    (launch,) = launches
    moved = 2 * (16 + 5) * 8 * 128 * 2
    assert launch.c["global_st_bytes"] == moved
    assert launch.c["unique_bytes_read"] == moved + 3 * 3 * 8
    assert launch.c["global_st_requests"] <= moved // 512 + 2 * 2 * 8
    assert launch.c["global_st_sectors"] * 32 == moved


@pytest.mark.parametrize("n_heads", [1, 3, 8, 128])
@pytest.mark.parametrize(
    ("width", "part", "bits"), [(64, 64, 16), (128, 64, 8), (80, 16, 4), (256, 256, 32), (576, 64, 16)]
)
def test_tile(n_heads, width, part, bits):
    tile = store_tile(n_heads, width, part, bits)
    padded = 1 << (width - 1).bit_length()
    assert tile.rows * padded <= max(1_024, padded)
    assert tile.rows < 2 * n_heads
    assert tile.rows == 1 or tile.rows * padded == 1_024 or tile.rows >= n_heads
    assert tile.threads in (32, 64, 128, 256)
    # no thread stores less than 16 bytes of the narrowest part, if there are 32 that could
    assert tile.threads == 32 or tile.rows * (1 << (part - 1).bit_length()) * bits // 8 >= 16 * tile.threads

"""lmops.paged_attention: the reference, the CPU implementation and the kernels."""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmops.ops import paged_attention as module
from lmops.ops.paged_attention import n_parts, paged_attention, paged_attention_op, paged_tile
from lmops.ops.paged_cache import KVPages
from lmops.reference.attention import attention as dense
from lmops.reference.paged_attention import paged_attention as reference
from lmops.reference.paged_cache import dequantize_rows, quantize_rows
from lmops.testing import assert_accurate

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
RAGGED = ((0, 0), (1, 1), (40, 1), (0, 2), (131, 6), (70, 70))  # keys and queries of each sequence
NAN = float("nan")
FORMS = ("native", "int8", "fp8", "int4")


@dataclass
class Case:
    """A batch over pages, and the same keys and values as numbers, for the reference."""

    query: torch.Tensor
    pages: KVPages
    table: torch.Tensor
    context: torch.Tensor
    cu_q: torch.Tensor
    numbers: tuple[torch.Tensor, torch.Tensor]

    def to(self, device):
        moved = {name: getattr(self, name).to(device) for name in ("query", "table", "context", "cu_q")}
        pages = KVPages(*(None if t is None else t.to(device) for t in vars(self.pages).values()))
        return replace(self, pages=pages, **moved)


def make(
    sequences=RAGGED, *, block_size=16, heads=4, kv_heads=2, dim=32, value_dim=None, dtype=BF16, form="native",
    left=None, shared=0, in_order=False,
) -> Case:  # fmt: skip
    """Slots that nothing was written to hold NaN. Blocks behind a window of `left` are -1, as unused ones are."""
    used = [-(-n // block_size) for n, _ in sequences]
    n_blocks = sum(used) + 2
    shape = (kv_heads, n_blocks, block_size)
    numbers, stored = [], []
    for d in (dim, value_dim or dim):
        x = torch.full((*shape, d), NAN, dtype=FP32 if dtype == FP32 else dtype)
        scales = None
        numbers.append(x.permute(1, 2, 0, 3))
        stored.append((x.permute(1, 2, 0, 3), scales))
    free = list(range(n_blocks)) if in_order else torch.randperm(n_blocks).tolist()
    table = torch.full((len(sequences), max([1, *used])), -1, dtype=torch.int32)
    written = torch.zeros(n_blocks, block_size, dtype=torch.bool)
    prefix: list[int] = []
    for s, (n_keys, n_queries) in enumerate(sequences):
        blocks = prefix[: shared // block_size]
        blocks += [free.pop(0) for _ in range(used[s] - len(blocks))]
        prefix = prefix or blocks
        for i, block in enumerate(blocks):
            written[block, : n_keys - i * block_size] = True
            behind = left is not None and (i + 1) * block_size <= n_keys - n_queries - left
            table[s, i] = -1 if behind else block
            if behind:
                written[block] = False
    tensors = []
    for x in numbers:
        x[written] = torch.randn(int(written.sum()), kv_heads, x.shape[3]).to(x.dtype)
        if form == "native":
            tensors.append((x, None))
        else:
            codes, scales = quantize_rows(x.float(), form, FP32 if dtype == FP32 else HALF)
            tensors.append((codes, scales))
    (k, k_scale), (v, v_scale) = tensors
    as_numbers = tuple(dequantize_rows(codes, scales, torch.float64) for codes, scales in tensors)
    cu_q = torch.tensor([0, *(n for _, n in sequences)]).cumsum(0).int()
    query = torch.randn(int(cu_q[-1]), heads, dim).to(dtype)
    context = torch.tensor([n for n, _ in sequences], dtype=torch.int32)
    return Case(query, KVPages(k, v, k_scale, v_scale), table, context, cu_q, as_numbers)


def check(case: Case, path, *, uniform=False, causal=True, window=None, **options):
    """Output and LSE against the reference, by the accuracy rule."""
    left, right = window or (None, None)
    given = {name: value for name, value in options.items() if name in ("scale", "softcap", "alibi_slopes", "sinks")}
    expected = {**given, "left": left, "right": 0 if causal else right, "softcap": given.get("softcap") or 0.0}

    def by_reference(dtype):
        q = case.query.to(dtype)
        keys, values = (t.to(torch.promote_types(dtype, FP32)) for t in case.numbers)
        return reference(q, keys, values, case.table, case.context, case.cu_q, **expected)

    truth, baseline = by_reference(torch.float64), by_reference(case.query.dtype)
    on = case.to(path.device)
    moved = {n: t.to(path.device) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    query = on.query
    if uniform:
        query = query.unflatten(0, (len(on.context), -1))
    else:
        moved |= {"cu_seqlens_q": on.cu_q, "max_seqlen_q": max(b - a for a, b in pairwise(case.cu_q.tolist()))}
    out, lse = paged_attention(
        query, on.pages, on.table, on.context, causal=causal, window=window, return_lse=True, **moved
    )
    if uniform:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert out.dtype == case.query.dtype
    assert lse.dtype == FP32
    assert_accurate(out, truth[0], baseline[0])
    # what the kernel multiplies with is as precise as the query, what torch's does on a CPU, no more
    assert_accurate(lse.to(case.query.dtype), truth[1], baseline[1].to(case.query.dtype))
    return out, lse


def test_reference_is_dense_attention_of_each_sequence():
    case = make(((9, 4), (5, 5)), block_size=4, dtype=FP32)
    out, lse = reference(case.query, *(t.float() for t in case.numbers), case.table, case.context, case.cu_q, right=0)
    blocks = case.table[0, :3].long()
    keys, values = (t.float()[blocks].flatten(0, 1)[:9].transpose(0, 1)[None] for t in case.numbers)
    o, l = dense(case.query[:4].transpose(0, 1)[None], keys, values, right=0, bottom_right=True)
    assert torch.equal(out[:4], o[0].transpose(0, 1))
    assert torch.equal(lse[:, :4], l[0])


COMPILED = {  # what the simulator runs of all: each is a kernel of its own, and compiling it takes longest
    (1, BF16, "native"), (17, BF16, "native"), (17, HALF, "int4"), (64, BF16, "native"), (64, BF16, "int8"),
    (64, HALF, "int4"), *((16, BF16, form) for form in FORMS), (16, HALF, "native"), (16, HALF, "fp8"),
    (16, FP32, "native"), (16, FP32, "int8"),
}  # fmt: skip
MATRIX = [
    pytest.param(*one, marks=() if one in COMPILED else pytest.mark.not_simulated)
    for one in product((1, 16, 17, 64), (BF16, HALF, FP32), FORMS)
]


@pytest.mark.kernels_only
@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("n_queries", [1, 40])
def test_quantized_pages_are_exact_where_float32_may_be_rounded(path, form, n_queries):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(make(((50, n_queries),), dim=128, dtype=FP32, form=form), path)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(("block_size", "dtype", "form"), MATRIX)
def test_ragged_batch(path, block_size, dtype, form):
    check(make(block_size=block_size, dtype=dtype, form=form), path)


GEOMETRIES = [
    (1, 1, 16, 16),
    (4, 4, 64, 64),
    (6, 2, 80, 80),
    (8, 1, 128, 128),
    (5, 1, 24, 40),
    (2, 1, 256, 256),
    (2, 2, 6, 10),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "form"),
    [(*one, "native") for one in GEOMETRIES]
    + [(*one, "int4") for one in GEOMETRIES if one[2] in (6, 16, 256)]
    + [pytest.param(*one, "int8", marks=pytest.mark.not_simulated) for one in GEOMETRIES],
)
def test_decode(path, heads, kv_heads, dim, value_dim, form):
    case = make(
        ((37, 1), (1, 1), (64, 1)), heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, dtype=HALF, form=form
    )
    check(case, path, uniform=True)


def test_float32_queries_of_half_precision_pages(path):
    case = make(dtype=HALF)
    check(replace(case, query=case.query.float()), path)


@pytest.mark.parametrize(("dtype", "form"), [(HALF, "native"), (FP32, "int4")])
def test_head_dim_512(path, dtype, form):
    check(make(((70, 3),), heads=2, kv_heads=1, dim=512, dtype=dtype, form=form), path)


def test_one_query_without_a_query_dimension(path):
    case = make(((37, 1), (5, 1)), dtype=FP32).to(path.device)
    out, lse = paged_attention(case.query, case.pages, case.table, case.context, return_lse=True)
    q = case.query.unsqueeze(1)
    expected, expected_lse = paged_attention(q, case.pages, case.table, case.context, return_lse=True)
    assert torch.equal(out, expected[:, 0])
    assert torch.equal(lse, expected_lse[..., 0])


FEATURES = {
    "window": {"window": (20, None)},
    "window on both sides": {"window": (20, 3), "causal": False},
    "not causal": {"causal": False},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "alibi a sequence": {"alibi_slopes": torch.rand(6, 4, generator=torch.Generator().manual_seed(1))},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "negative scale": {"scale": -0.3},
    "everything": {"window": (33, None), "softcap": 4.0, "alibi_slopes": torch.ones(4), "sinks": torch.ones(4)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(path, name):
    options = FEATURES[name]
    check(make(dtype=FP32 if name == "softcap" else HALF, left=options.get("window", (None,))[0]), path, **options)


@pytest.mark.parametrize("form", ["native", "int4"])
@pytest.mark.parametrize(
    "options", [{}, {"sinks": torch.ones(2)}, {"window": (150, None)}], ids=["", "sinks", "window"]
)
def test_keys_are_split_over_programs(path, monkeypatch, form, options):
    """A long context for few programs: 12 parts, of which the shorter sequences fill some."""
    monkeypatch.setattr(module, "LEAST_KEYS", 64)
    sequences = ((780, 1), (130, 1), (0, 1), (64, 1))
    case = make(sequences, heads=2, kv_heads=1, dim=16, form=form, dtype=HALF, left=options.get("window", (None,))[0])
    assert n_parts(4, case.table.shape[1] * 16, 4 * 4 * 2 * 16, 108) > 10
    out, lse = check(case, path, uniform=True, **options)
    if "sinks" not in options:
        assert (out[2] == 0).all()
        assert (lse[:, 2] == -torch.inf).all()


@pytest.mark.parametrize(("shared", "form"), [(64, "int8"), (160, "native")])
def test_shared_prefix(path, shared, form):
    """The first keys of all sequences are read once for all queries; the result is what it is without."""
    sequences = ((200, 1), (shared + 3, 3), (165, 5))
    case = make(sequences, heads=4, kv_heads=1, dim=16, dtype=HALF, form=form, shared=shared, block_size=32)
    check(case, path, shared_prefix=shared, softcap=5.0)
    check(case, path, shared_prefix=shared, sinks=torch.ones(4))


@pytest.mark.kernels_only
@pytest.mark.parametrize("window", [None, (40, None)])
def test_batch_invariant(path, window):
    """A sequence's rows are bitwise the same alone, in a batch, and as the last rows of a longer chunk."""
    case = make(((150, 1), (90, 40), (33, 7)), dtype=BF16).to(path.device)

    def run(query, table, context, lengths):
        cu_q = torch.tensor([0, *lengths]).cumsum(0).int().to(path.device)
        return paged_attention(
            query, case.pages, table, context, cu_seqlens_q=cu_q, max_seqlen_q=max(lengths), window=window,
            batch_invariant=True, return_lse=True,
        )  # fmt: skip

    out, lse = run(case.query, case.table, case.context, (1, 40, 7))
    for s, (a, b) in enumerate(pairwise(case.cu_q.tolist())):
        for first in (a, b - 1):
            one, one_lse = run(case.query[first:b], case.table[s : s + 1], case.context[s : s + 1], (b - first,))
            assert torch.equal(one, out[first:b])
            assert torch.equal(one_lse, lse[:, first:b])


def test_repeatable_and_nothing_leaks(path):
    """Every slot that is not seen holds NaN, here also values with infinity; the results are finite and the same."""
    case = make(dtype=HALF, left=20)
    for t in (case.pages.k, case.pages.v):
        t[t.isnan()] = torch.tensor([NAN, float("inf")]).half().repeat(int(t.isnan().sum()))[: int(t.isnan().sum())]
    first, _ = check(case, path, window=(20, None))
    again, _ = check(case, path, window=(20, None))
    assert torch.equal(first, again)


def test_nan_that_is_seen_reaches_those_who_see_it(path):
    case = make(((40, 3),), dtype=FP32)
    block, slot = case.table[0, 38 // 16], 38 % 16  # the key of the query before the last
    for t in (case.pages.v, case.numbers[1]):
        t[block, slot] = NAN
    check(case, path)


@pytest.mark.parametrize("form", ["native", "int4"])
def test_views_of_pages_and_queries(path, form):
    """Strides as they come: heads of a fused projection, pages of every second block, a table cut from a larger one."""
    case = make(((50, 2), (20, 2)), dtype=HALF, form=form)
    wide = torch.full((len(case.query), 9, 32), NAN).half()
    wide[:, 2:6] = case.query
    pages = [None if t is None else torch.stack([t, t.flip(0)], 1)[:, 0] for t in vars(case.pages).values()]
    table = torch.cat([torch.full_like(case.table, 99), case.table, torch.full_like(case.table, 99)], 1)
    at = case.table.shape[1]
    check(replace(case, query=wide[:, 2:6], pages=KVPages(*pages), table=table[:, at : 2 * at]), path)


@pytest.mark.not_simulated  # each example would be compiled
@settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=4),
    block_size=st.integers(1, 40),
    group=st.sampled_from([1, 2, 3, 7]),
    left=st.none() | st.integers(0, 60),
    form=st.sampled_from(["native", "int8", "fp8", "int4"]),
)
def test_any_batch(path, data, block_size, group, left, form):
    torch.manual_seed(0)
    sequences = [(n, min(n, q)) for n, q in data]
    case = make(sequences, block_size=block_size, heads=group, kv_heads=1, dim=16, dtype=HALF, form=form, left=left)
    check(case, path, window=(left, None))


def test_empty(path):
    case = make(((0, 0),), dtype=HALF).to(path.device)
    out, lse = paged_attention(
        case.query, case.pages, case.table, case.context, cu_seqlens_q=case.cu_q, return_lse=True
    )
    assert out.shape == (0, 4, 32)
    assert lse.shape == (4, 0)
    none = torch.empty(1, 0, dtype=torch.int32, device=path.device)
    query = torch.ones(1, 4, 32, device=path.device).half()
    out, lse = paged_attention(query, case.pages, none, torch.zeros_like(case.context), return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.kernels_only
def test_bad_numbers_read_nothing_outside_the_pages(path):
    """What the CPU refuses, a GPU does not look at: the simulator faults on an access outside, here there is none."""
    case = make(((40, 1), (30, 1)), dtype=HALF)
    case.table[0, 0], case.table[0, 1], case.table[1, 0] = 10**6, -7, case.pages.n_blocks
    case.context[1] = 10**6
    on = case.to(path.device)
    assert paged_attention(on.query, on.pages, on.table, on.context).shape == (2, 4, 32)
    on.context[:] = torch.tensor([-5, -(2**31)])
    assert (paged_attention(on.query, on.pages, on.table, on.context) == 0).all()


@pytest.mark.parametrize(("form", "instructions"), [("native", 80), ("int8", 270), ("fp8", 300), ("int4", 420)])
def test_bytes_moved(path, launches, form, instructions):
    """Keys and values are loaded once a key head, not once a query head; instructions a KiB of them, in warps."""
    case = make(((1024, 1), (1000, 1)), heads=8, dim=128, form=form)
    check(case, path, uniform=True)
    first = launches[0]
    loaded = sum(first.c[f"global_{kind}_bytes"] for kind in ("ld", "cp", "tma"))
    tensors = [t for t in vars(case.pages).values() if t is not None]
    held = sum(2024 * t[0, 0].numel() * t.element_size() for t in tensors)
    # several lanes load the scale of a key; they do so at once, and it comes from memory once
    assert loaded <= (1.03 if form == "native" else 1.3) * held
    assert first.c["unique_bytes_read"] <= 1.03 * held  # with queries and the table
    assert first.c["bank_conflicts"] == 0
    assert first.spills == 0
    assert sum(first.classes.values()) <= instructions * held / 1024
    assert first.classes["mma"]


@pytest.mark.fake_tensors
def test_operator(path):
    case = make(((40, 3), (9, 3)), dtype=FP32, form="int8").to(path.device)
    pages = vars(case.pages).values()
    args = (case.query, *pages, case.table, case.context, case.cu_q, None, None, None, 3, 0.2, 5, 0, 0.0, 0, False)
    torch.library.opcheck(paged_attention_op, args)


@pytest.mark.fake_tensors
def test_compiles_in_one_graph(path):
    case = make(((40, 1), (9, 1)), dtype=FP32).to(path.device)

    def decode(query, context):
        return paged_attention(query * 2, case.pages, case.table, context) + 1

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.query, case.context), decode(case.query, case.context))


def test_launch_depends_on_shapes_alone():
    assert n_parts(8, 131_072, 4096, 132) == 64  # one sequence on an H100: about four programs a core
    assert n_parts(528, 2_048, 1 << 20, 132) == 1
    assert n_parts(512, 32_768, 1 << 20, 132) == 8  # one of them may be long, and the others short
    assert n_parts(4_096, 32_768, 1 << 25, 132) == 2  # memory for the results of parts is bounded
    assert n_parts(1, 255, 64, 132) == 1
    for dim in (16, 64, 128, 256, 512):
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            few, many = (paged_tile(dim, 2, rows, target) for rows in (4, 1_000))
            assert few.block_m == 16 <= many.block_m


def test_blocks_in_a_row_are_not_copied(monkeypatch):
    """On the CPU a sequence whose blocks follow one another is read where it is."""
    copied = []
    gather = module._gather
    monkeypatch.setattr(module, "_gather", lambda *args: copied.append(1) or gather(*args))
    for in_order in (True, False):
        case = make(((100, 1), (50, 1)), in_order=in_order)
        paged_attention(case.query, case.pages, case.table, case.context)
        assert len(copied) == (0 if in_order else 4)


ERRORS = [
    (lambda c: {"query": c.query.double()}, TypeError, "query must be float16, bfloat16 or float32, got torch.float64"),
    (lambda c: {"query": c.query.half()}, TypeError, "query must be torch.float32 like the pages, or float32, got"),
    (lambda c: {"query": c.query[..., :8]}, ValueError, "query must have the pages' head_dim 32"),
    (lambda c: {"query": c.query[:, :3]}, ValueError, "query's heads must be a multiple of the pages' 2, got 3"),
    (lambda c: {"query": c.query[:1]}, ValueError, "query must be of the 2 sequences of block_table, got 1"),
    (lambda c: {"query": c.query[0]}, ValueError, "query must be (sequences, heads, head_dim)"),
    (lambda c: {"block_table": c.table.long()}, ValueError, "block_table must be int32 of shape (sequences, blocks)"),
    (lambda c: {"context_lens": c.context[:1]}, ValueError, "context_lens must be int32 of shape (2,)"),
    (lambda c: {"context_lens": c.context + 99}, ValueError, "context_lens must be 0 to 48, the 3 blocks of 16"),
    (lambda c: {"block_table": c.table + 90}, ValueError, "block_table must name blocks 0 to 5, got"),
    (lambda c: {"block_table": c.table + 90, "sinks": torch.ones(4)}, ValueError, "block_table must name blocks 0 to"),
    (lambda c: {"block_table": c.table * 0 - 1}, ValueError, "block_table must name blocks 0 to 5, got"),
    (
        lambda c: {"cu_seqlens_q": c.cu_q + 1},
        ValueError,
        "cu_seqlens_q must start at 0, not decrease, and end at the 2",
    ),
    (lambda c: {"cu_seqlens_q": c.cu_q[:2]}, ValueError, "cu_seqlens_q must be int32 of shape (3,)"),
    (lambda c: {"cu_seqlens_q": c.cu_q * 2 // 2, "max_seqlen_q": 0}, ValueError, "max_seqlen_q is 0, but sequence 0"),
    (lambda c: {"softcap": -1.0}, ValueError, "softcap must be positive"),
    (lambda c: {"scale": NAN}, ValueError, "scale must be finite, got nan"),
    (lambda c: {"window": 5}, ValueError, "window must be a pair (left, right)"),
    (lambda c: {"sinks": torch.ones(3)}, ValueError, "sinks must have the shape (4,)"),
    (lambda c: {"alibi_slopes": torch.ones(3, 4)}, ValueError, "alibi_slopes must have the shape (4,) or (2, 4)"),
    (lambda c: {"shared_prefix": 49}, ValueError, "shared_prefix must be 0 to 48"),
    (lambda c: {"shared_prefix": 16}, ValueError, "shared_prefix is 16 tokens, which all sequences must have"),
    (lambda c: {"shared_prefix": 16, "window": (3, None)}, NotImplementedError, "shared_prefix cannot be combined"),
    (lambda c: {"query": c.query.clone().requires_grad_()}, NotImplementedError, "paged_attention has no gradient"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_bad_arguments(change, error, message):
    case = make(((40, 1), (9, 1)), dtype=FP32)
    given = {"query": case.query, "pages": case.pages, "block_table": case.table, "context_lens": case.context}
    with pytest.raises(error) as caught:
        paged_attention(**(given | change(case)))
    assert message in str(caught.value)
